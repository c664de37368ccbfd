#!/usr/bin/env bash
# `gammaslim prune` as a Slurm job: one node or many, GPUs or none. It saves before its time limit and resumes automatically.
#
# Set up, in a clone of the repository on storage that all nodes share:
#   python3 -m venv .venv && .venv/bin/pip install .
#   .venv/bin/gammaslim prune --data D --dry-run        # check everything, on the login node
#   sbatch --gpus-per-node 1 slurm/prune.sh --data D    # options of sbatch before the script, options of prune after it
#   sbatch --nodes 2 --gpus-per-node 4 --cpus-per-task 32 slurm/prune.sh --data D
# Each node runs one process per GPU; without GPUs one process, or --ntasks-per-node N.
#
# Edit     the lines below, or pass the same options to sbatch, which take precedence.
# Watch    squeue --me; tail -f gammaslim-JOB.out; runs/slurm-JOB/status.json and metrics.jsonl
# Stop     touch runs/slurm-JOB/STOP (the job saves and ends with code 75), or scancel JOB (saves too if Slurm's KillWait,
#          30 seconds by default, is long enough). Neither is requeued automatically.
# Resume   A job that Slurm stops (time limit, preemption, scontrol requeue, a lost node) is requeued and resumes from its
#          last saved position. To resume a job that you stopped, run scontrol requeue JOB while Slurm still knows it; later,
#          submit it again with --output runs/slurm-JOB after the script.
# Clean up rm -r runs/slurm-JOB gammaslim-JOB.out
# The job has the exit code of gammaslim. 2, 65, 66, 73, 78: change the command; 74: fix the disk. See job/README.md.

#SBATCH --job-name=gammaslim
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@60
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2
# ---- Site settings. A line with two # is inactive. CPUs are counted per node: about 8 per GPU (not --cpus-per-gpu).
##SBATCH --partition=gpu
##SBATCH --account=project
##SBATCH --time=08:00:00
##SBATCH --gpus-per-node=1
##SBATCH --mem=32G

SLIM_VENV=${SLIM_VENV:-}                   # contains bin/gammaslim; empty: the activated environment, .venv, or PATH. Add `module load …` on a line here
SLIM_CONTAINER=${SLIM_CONTAINER:-}         # apptainer:/shared/gammaslim.sif or pyxis:/shared/gammaslim.sqsh (or pyxis:REGISTRY#IMAGE:TAG)
SLIM_BIND=${SLIM_BIND:-}                   # folders outside the current one for a container: /data:/data:ro,/scratch:/scratch
SLIM_RUNS=${SLIM_RUNS:-$PWD/runs}          # parent of the run folders, on shared storage
SLIM_MAX_REQUEUES=${SLIM_MAX_REQUEUES:-50} # largest number of requeues of a job that saved and stopped
# ---- End of site settings.

set -uo pipefail

say() { printf 'slurm: %s\n' "$*"; }

fail() { # code, reason
  printf 'Error: %s\n' "$2" >&2
  exit "$1"
}

[ -n "${SLURM_JOB_ID:-}" ] || fail 2 "this is a Slurm job: sbatch slurm/prune.sh"
job=$SLURM_JOB_ID
# one task of an array may have the job number of the whole array
[ -z "${SLURM_ARRAY_JOB_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
restarts=${SLURM_RESTART_COUNT:-0}
nodes=$SLURM_JOB_NUM_NODES
arguments=("$@") # before --output is added

# The run folder keeps its name when the job is requeued, so that the job finds its saved position.
run=${GAMMASLIM_PRUNE_OUTPUT:-}
for ((i = 1; i <= $#; i++)); do
  case ${!i} in
    --output=*) run=${!i#--output=} ;;
    --output)
      next=$((i + 1))
      run=${!next:-}
      ;;
  esac
done
if [ -z "$run" ]; then
  run=$SLIM_RUNS/slurm-$job
  set -- --output "$run" "$@"
fi

# One launcher per node starts the processes of the node. It must not inherit the variables of another launcher.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE NNODES NODE_RANK MASTER_ADDR MASTER_PORT
unset PET_NNODES PET_NODE_RANK PET_MASTER_ADDR PET_MASTER_PORT
processes=${SLURM_NTASKS_PER_NODE:-1}
[ "$processes" -le 1 ] || [ -z "${SLURM_GPUS_PER_TASK:-}" ] || # the single task of the node would get the GPUs of one process
  fail 2 "--gpus-per-task cannot be combined with --ntasks-per-node here: use sbatch --gpus-per-node"
launch=(launch --nnodes "$nodes")
[ "$processes" -le 1 ] || launch+=(--nproc "$processes")
# srun does not inherit --cpus-per-task from sbatch (22.05 to 23.02)
export SRUN_CPUS_PER_TASK=$((${SLURM_CPUS_PER_TASK:-1} * processes))
export PYTHONUNBUFFERED=1
# --wait: a node whose launcher has ended waits for the others, long enough for a clean stop, but not forever
srun=(srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --export=ALL --mpi=none --kill-on-bad-exit=0 --wait=60)

in_use() { # port
  grep -qiE "^ *[0-9]+: [0-9A-F]+:$(printf %04X "$1") " /proc/net/tcp /proc/net/tcp6 2>/dev/null
}
if [ "$nodes" -gt 1 ]; then # the processes meet on this node, at a port derived from the job number
  MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))
  while in_use "$MASTER_PORT"; do MASTER_PORT=$((20000 + (MASTER_PORT - 19999) % 12000)); done
  export MASTER_PORT
fi

case $SLIM_CONTAINER in
  '')
    places=("${VIRTUAL_ENV:-/nowhere}/bin/gammaslim" .venv/bin/gammaslim "$(command -v gammaslim)")
    [ -z "$SLIM_VENV" ] || places=("$SLIM_VENV/bin/gammaslim")
    program=()
    for place in "${places[@]}"; do
      [ "${#program[@]}" -gt 0 ] || [ ! -x "$place" ] || program=("$place")
    done
    [ "${#program[@]}" -gt 0 ] || fail 78 "there is no ${SLIM_VENV:-$PWD/.venv}/bin/gammaslim: set SLIM_VENV at the top of slurm/prune.sh"
    ;;
  apptainer:*)
    program=(apptainer exec --bind "$PWD${SLIM_BIND:+,$SLIM_BIND}" --pwd "$PWD")
    [ -z "${SLURM_GPUS_ON_NODE:-}${SLURM_GPUS:-}" ] || program+=(--nv)
    program+=("${SLIM_CONTAINER#*:}" gammaslim)
    ;;
  pyxis:*)
    srun+=("--container-image=${SLIM_CONTAINER#*:}" "--container-mounts=$PWD:$PWD${SLIM_BIND:+,$SLIM_BIND}")
    srun+=("--container-workdir=$PWD" --no-container-mount-home)
    program=(gammaslim)
    ;;
  *) fail 78 "SLIM_CONTAINER=$SLIM_CONTAINER is neither apptainer:FILE nor pyxis:IMAGE" ;;
esac

# A signal becomes a stop request. Slurm sends USR1 before the time limit and, on some sites, before a preemption, and
# TERM at a preemption, scancel and requeue. The STOP file reaches the run even where the signal of srun does not.
asked='' signals=0 step=''
pass_on() {
  [ ! -d "$run" ] || : >"$run/STOP"
  [ -z "$step" ] || kill -USR1 "$step"
} 2>/dev/null
# shellcheck disable=SC2329 # the traps call it
ask() {
  asked=$1
  signals=$((signals + 1))
  pass_on
}
trap 'ask USR1' USR1
trap 'ask TERM' TERM

say "job $job, start $((restarts + 1)), on $nodes nodes: $SLURM_JOB_NODELIST"
[ "$SRUN_CPUS_PER_TASK" -ge $((4 * ${SLURM_GPUS_ON_NODE:-0})) ] ||
  say "only $SRUN_CPUS_PER_TASK CPUs for $SLURM_GPUS_ON_NODE GPUs may load images too slowly: increase sbatch --cpus-per-task, which counts per node"
say "${program[*]}, run folder $run; to stop it: touch $run/STOP"
"${srun[@]}" "${program[@]}" "${launch[@]}" -- prune "$@" &
step=$!
[ -z "$asked" ] || pass_on # the signal arrived before the step was started
while :; do
  before=$signals
  wait "$step"
  code=$?
  [ "$signals" != "$before" ] || break # otherwise a signal interrupted the wait, and the step still runs
done
trap '' USR1 TERM

stopped_by_hand=''
if [ -n "$asked" ]; then
  rm -f "$run/STOP"
  [ "$code" -le 128 ] || code=75 # the signal arrived before the launcher handled signals: nothing is lost
elif [ -e "$run/STOP" ]; then
  stopped_by_hand=yes
fi

print_resume_command() {
  printf 'slurm: to resume: sbatch [the same options] slurm/prune.sh'
  printf ' %q' --output "$run" "${arguments[@]}"
  printf '\n'
}

# A job that was cancelled, or that Slurm already requeues, is no longer running. Without an answer it counts as running.
still_running() {
  state=$(scontrol -o show job "$job") || return 0
  [[ $state == *JobState=RUNNING* ]]
}

requeue() { # reason
  if [ "$restarts" -ge "$SLIM_MAX_REQUEUES" ]; then
    say "$1, but the job was already restarted $restarts times and SLIM_MAX_REQUEUES is $SLIM_MAX_REQUEUES"
    print_resume_command
  elif scontrol requeue "$job"; then
    say "$1; the job is requeued"
  else
    say "$1, but Slurm does not let the job requeue itself (scontrol requeue $job)"
    print_resume_command
  fi
}

# The processes notice a dead node long before Slurm does.
a_node_is_lost() {
  [ "$nodes" -gt 1 ] && ! timeout 90 srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --cpus-per-task=1 \
    --overlap --mpi=none true
}

case $code in
  0 | 2 | 65 | 66 | 73 | 74 | 78) ;; # the error message is enough
  75)
    if [ -n "$stopped_by_hand" ]; then
      say "stopped by $run/STOP"
      print_resume_command
    elif still_running; then
      requeue "stopped${asked:+ by $asked}, saved"
    else
      say "stopped${asked:+ by $asked}, saved; Slurm has ended the job"
    fi
    ;;
  *)
    if ! still_running; then
      say "code $code; Slurm has ended the job"
    elif a_node_is_lost; then
      requeue "a node does not answer (code $code)"
    fi
    ;;
esac
exit "$code"
