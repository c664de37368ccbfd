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
if [ "${1:-}" != unit ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  missing=()
  # a Python of another origin brings its own venv
  if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then missing+=(python3-venv); fi
  for package in "${debian_packages[@]}"; do
    [[ $(dpkg-query --show --showformat='${Status}' "$package" 2>/dev/null) == *' installed' ]] || missing+=("$package")
  done
  if [ "${#missing[@]}" -gt 0 ]; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
  fi
fi

venv=${VENV:-.venv}
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --editable '.[test]'

export WANDB_MODE=${WANDB_MODE:-offline}
unset PYTHONDONTWRITEBYTECODE # hundreds of processes import job
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/mypy" --strict job
pytest=("$venv/bin/python" -m pytest)
one_thread=(env OMP_NUM_THREADS=1 "${pytest[@]}")
if [ "${1:-}" = unit ]; then exec "${one_thread[@]}" -n 3 --dist worksteal tests/unit "${@:2}"; fi
if [ $# -gt 0 ]; then exec "${pytest[@]}" "$@"; fi
# on one thread each: first those that measure the coverage of job/ (90 % at least), whose tracer
# doubles the time of a test: one case of each test in the fast files; then their other cases; then
# the other files, groups first, more at a time than there are cores, because containers, the
# cluster and killed jobs wait for much; then those that need the machine to themselves
most=("${one_thread[@]}" --dist loadgroup -m 'not alone')
covering=(tests/unit)
for commands in bench commands predictions sensitivity_command slim_command tracking; do
  covering+=("tests/integration/test_$commands.py")
done
failed=0
"${most[@]}" -n 2 "${covering[@]}" --cases first --cov || failed=$?
"${most[@]}" -n 3 "${covering[@]}" --cases others || failed=$?
"${most[@]}" -n 4 "${covering[@]/#/--ignore=}" || failed=$?
"${pytest[@]}" -m alone || failed=$?
exit "$failed"
