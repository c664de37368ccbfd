#!/usr/bin/env bash
# Install what the tests need and run them all: lint, format, types, pytest.
# On Debian or Ubuntu as root, missing Debian packages are installed too.
#   bash tests/run.sh [pytest options]        VENV=… uses another virtual environment
# Of tests with many slow cases a part is run; --all runs every one, for hours.
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
)
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
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
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/mypy" --strict job
if [ $# -gt 0 ]; then exec "$venv/bin/python" -m pytest "$@"; fi
# two at a time on one thread each, groups first: containers and the cluster wait for much; then
# those that measure time or need the machine to themselves.
# What fails is tried once more and reported as rerun: a machine may be slow for a while.
failed=0
OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest -n 2 --dist loadgroup --reruns 1 -m 'not alone' || failed=$?
"$venv/bin/python" -m pytest --reruns 1 -m alone || failed=$?
exit "$failed"
