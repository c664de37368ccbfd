#!/usr/bin/env bash
# Check and measure the job on one CUDA device; print tables and write them as JSON.
# Installs nothing and needs no network: torch and pytest must be there already.
#   bash tests/gpu.sh [pytest options]        PYTHON=python3 chooses the interpreter
#   bash tests/gpu.sh --cpu [pytest options]  rehearse the same checks without a GPU, on smaller data
# The JSON file is gpu-checks.json, or GPU_CHECKS_OUTPUT.
set -euo pipefail
export GPU_CHECKS_OUTPUT=${GPU_CHECKS_OUTPUT:-$PWD/gpu-checks.json}
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export WANDB_MODE=offline GPU_CHECKS_DEVICE=${GPU_CHECKS_DEVICE:-cuda}
if [ "${1:-}" = --cpu ]; then
  export GPU_CHECKS_DEVICE=cpu
  shift
fi
"$python" - <<'PYTHON'
import importlib.util, os, sys
missing = [name for name in ("torch", "pytest") if not importlib.util.find_spec(name)]
if missing:
    sys.exit(f"tests/gpu.sh: this Python has no {missing[0]}: choose another, PYTHON=...")
import torch
if os.environ["GPU_CHECKS_DEVICE"] == "cuda" and not torch.cuda.is_available():
    sys.exit("tests/gpu.sh: torch finds no CUDA device here; --cpu rehearses the checks without one")
PYTHON
exec "$python" -m pytest -s -p no:cacheprovider tests/gpu_checks.py "$@"
