#!/usr/bin/env bash
# Install what the tests need and run them: lint, format, types, pytest.
#   bash tests/run.sh                    everything; as root on Debian or Ubuntu, missing Debian
#                                        packages are installed too
#   bash tests/run.sh unit               lint, format, types, tests/unit: no root, no package, minutes
#   bash tests/run.sh PYTEST-OPTIONS     e.g. --all: every case of tests that else run a sample
# VENV=… uses another virtual environment.
set -euo pipefail
cd "$(dirname "$0")/.."

debian_packages=(
  # the container engine of tests/system/test_containers.py
  aardvark-dns
  buildah
  catatonit
  conmon
  iproute2
  iptables
  mmdebstrap
  netavark
  podman
  runc
  # the Slurm cluster of tests/system/test_slurm.py
  munge
  slurm-client
  slurmctld
  slurmd
  # the browser of tests/system/test_report_page.py
  chromium
)
install_packages() {
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
}
installing=
if [ "${1:-}" != unit ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  missing=()
  # a Python of another origin brings its own venv
  if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then missing+=(python3-venv); fi
  for package in "${debian_packages[@]}"; do
    [[ $(dpkg-query --show --showformat='${Status}' "$package" 2>/dev/null) == *' installed' ]] || missing+=("$package")
  done
  case "${missing[*]}" in
    '') ;;
    *python3-venv*) install_packages ;;
    *) # beside pip
      install_packages &
      installing=$!
      ;;
  esac
fi

unset PYTHONDONTWRITEBYTECODE # hundreds of processes import job
venv=${VENV:-.venv}
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
temporary=$(mktemp -d "${TMPDIR:-/tmp}/gs.XXXX") # of killed jobs too; kept if a test fails
if [ -z "${1:-}" ]; then
  # the image of the containers is built beside pip, which uses one core
  export ENGINE_OF_TESTS=$temporary/engine
  mkdir "$ENGINE_OF_TESTS"
  {
    [ -z "$installing" ] || tail --pid="$installing" --follow /dev/null
    PYTHONPATH=tests exec "$venv/bin/python" -m support.engine "$ENGINE_OF_TESTS"
  } &
  engine=$!
  trap 'kill "$engine" 2>/dev/null || true; wait "$engine" || true; rm -rf "$ENGINE_OF_TESTS"' EXIT
fi
"$venv/bin/python" -m pip install --quiet --no-compile --editable '.[test]'
[ -z "$installing" ] || wait "$installing"

export WANDB_MODE=${WANDB_MODE:-offline}
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
pytest=("$venv/bin/python" -m pytest)
one_thread=(env OMP_NUM_THREADS=1 "${pytest[@]}")
failed=0
export TMPDIR=$temporary
"$venv/bin/mypy" --strict job & # on one core
types=$!
# what all test processes import is compiled once, beside it; they tell of any error themselves
case "${1:-}" in '' | unit) "${one_thread[@]}" --collect-only --quiet >/dev/null || true ;; esac
case "${1:-}" in
  unit) "${one_thread[@]}" -n 3 --dist worksteal tests/unit "${@:2}" || failed=$? ;;
  '') # on one thread each: first one case of each test that measures the coverage of job/ (90 % at
    # least), whose tracer doubles the time of a test; then all others, long groups first, more at a
    # time than there are cores, because containers, the cluster and killed jobs wait for much; then
    # those that need the machine to themselves
    most=("${one_thread[@]}" --dist loadgroup --no-loadscope-reorder -m 'not alone')
    "${most[@]}" -n 3 --part covering --cov || failed=$?
    "${most[@]}" -n 4 --part rest || failed=$?
    mapfile -t alone < <(grep -rl --include='test_*.py' mark.alone tests)
    "${pytest[@]}" -m alone "${alone[@]}" || failed=$?
    ;;
  *) "${pytest[@]}" "$@" || failed=$? ;;
esac
wait "$types" || failed=$?
[ "$failed" != 0 ] || rm -rf "$temporary"
exit "$failed"
