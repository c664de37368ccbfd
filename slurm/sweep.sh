#!/usr/bin/env bash
# A Slurm job array of `gammaslim prune` jobs that differ in one option. Each task has its own run folder.
#
# In a clone of the repository that is set up as slurm/prune.sh describes:
#   sbatch slurm/sweep.sh                                                        # --rate 0.95 0.9 0.85 0.8, demo data
#   sbatch --array=0-2 slurm/sweep.sh target macs=0.7 macs=0.5 macs=0.3 -- --data D
#   sbatch --array=0-9%4 --gpus-per-node 1 slurm/sweep.sh seed {0..9} -- --data D   # at most four at a time
# The first word is the option to vary, without --. Its values follow, one per task of the array; after -- come the options
# that all tasks share.
#
# Edit     the lines below, or pass the same options to sbatch, which take precedence. All other settings: slurm/prune.sh.
# Compare  bash slurm/sweep.sh --merge runs/sweep-JOB, at any time, or automatically once all tasks have ended:
#            sbatch --dependency=afterany:JOB --wrap 'bash slurm/sweep.sh --merge runs/sweep-JOB'
# Watch    squeue --me; tail -f gammaslim-sweep-JOB_TASK.out
# Stop     scancel JOB for all, scancel JOB_TASK or touch runs/sweep-JOB/RUN/STOP for one of them
# Resume   as described in slurm/prune.sh; a single task: sbatch slurm/prune.sh … --output runs/sweep-JOB/RUN
# Clean up rm -r runs/sweep-JOB gammaslim-sweep-JOB_*.out

#SBATCH --job-name=gammaslim-sweep
#SBATCH --output=%x-%A_%a.out
#SBATCH --array=0-3
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@60
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2
# ---- Site settings. A line with two # is inactive.
##SBATCH --partition=gpu
##SBATCH --account=project
##SBATCH --time=08:00:00
##SBATCH --gpus-per-node=1
##SBATCH --mem=32G
# ---- End of site settings.

set -euo pipefail

fail() { # code, reason
  printf 'Error: %s\n' "$2" >&2
  exit "$1"
}

merge() { # folder of runs
  [ -d "$1" ] || fail 66 "there is no folder $1"
  local run runs=() program=${SLIM_VENV:-${VIRTUAL_ENV:-.venv}}/bin/gammaslim
  for run in "$1"/*/; do
    [ ! -f "$run/config.toml" ] || runs+=("$run") # otherwise the task never began
  done
  [ "${#runs[@]}" -gt 0 ] || fail 66 "there is no run in $1 yet"
  [ -x "$program" ] || program=.venv/bin/gammaslim
  [ -x "$program" ] || program=gammaslim
  "$program" report "${runs[@]}" --output "$1/report.html"
}

if [ "${1:-}" = --merge ]; then
  merge "${2:?the folder of the sweep, e.g. runs/sweep-JOB}"
  exit
fi
[ -n "${SLURM_ARRAY_TASK_ID:-}" ] || fail 2 "this is a Slurm job array: sbatch --array=0-2 slurm/sweep.sh rate 0.9 0.8 0.7"

option=rate
values=(0.95 0.9 0.85 0.8)
if [ $# -gt 0 ] && [[ $1 != -* ]]; then
  option=$1
  values=()
  shift
  while [ $# -gt 0 ] && [ "$1" != -- ]; do
    values+=("$1")
    shift
  done
fi
[ "${1:-}" != -- ] || shift

[ "$SLURM_ARRAY_TASK_ID" -lt "${#values[@]}" ] ||
  fail 2 "task $SLURM_ARRAY_TASK_ID has no value of --$option: ${#values[@]} values want sbatch --array=0-$((${#values[@]} - 1))"
value=${values[SLURM_ARRAY_TASK_ID]}
# Slurm runs a copy of this file, so look for the other script where the job was submitted
prune=${SLIM_PRUNE:-$SLURM_SUBMIT_DIR/slurm/prune.sh}
[ -f "$prune" ] || fail 66 "there is no $prune: submit from the repository's folder, or set SLIM_PRUNE"

sweep=${SLIM_RUNS:-$PWD/runs}/sweep-$SLURM_ARRAY_JOB_ID
printf 'sweep: --%s %s, task %s of %s; to compare all: bash slurm/sweep.sh --merge %s\n' \
  "$option" "$value" "$SLURM_ARRAY_TASK_ID" "${#values[@]}" "$sweep"
exec bash "$prune" "$@" "--$option" "$value" --output "$sweep/$option-${value//\//_}"
