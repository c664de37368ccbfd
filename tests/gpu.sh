#!/usr/bin/env bash
# Check the job on one CUDA device and print a table of seconds, images/s and accuracy.
# Installs nothing and needs no network: torch and pytest must be there already.
#   bash tests/gpu.sh [pytest options]        PYTHON=python3 chooses the interpreter
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export WANDB_MODE=offline GPU_CHECKS_DEVICE=${GPU_CHECKS_DEVICE:-cuda}
"$python" - <<'EOF'
import importlib.util, os, sys
missing = [name for name in ("torch", "pytest") if not importlib.util.find_spec(name)]
if missing:
    sys.exit(f"tests/gpu.sh: this Python has no {missing[0]}: choose another, PYTHON=...")
import torch
if os.environ["GPU_CHECKS_DEVICE"] == "cuda" and not torch.cuda.is_available():
    sys.exit("tests/gpu.sh: torch finds no CUDA device here")
EOF
exec "$python" -m pytest -s -p no:cacheprovider tests/gpu_checks.py "$@"
