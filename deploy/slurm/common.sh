# shellcheck shell=bash disable=SC2034  # variables for those who source it
#
# What baton.sbatch and pool.sbatch share; they source it.
#
# Slurm sends SIGTERM to every process of a job that is cancelled or requeued, and SIGKILL to what is left after KillWait.
# All of it drains meanwhile; a script only has to wait. Before the time limit it alone gets SIGUSR1 (--signal=B:USR1@120),
# and drains in order. A signal to srun would kill its tasks: they are told by scancel.

fail() { echo "baton: $*" >&2; exit 2; }

home=${BATON_HOME:-$SLURM_SUBMIT_DIR}
python=${BATON_PYTHON:-$home/.venv/bin/python}
launch=$home/deploy/launch/launch.py
[ -x "$python" ] || fail "$python is not there: run make install, or set BATON_PYTHON to a Python that has Baton"

asked=
trap 'asked=cancel' TERM
trap 'asked=limit' USR1

# An array's first task has the array's own job id, by which all would be told.
job=$SLURM_JOB_ID
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID

# Those that were cancelled must be through before Slurm kills them.
kill_wait=$(scontrol show config | awk '$1 == "KillWait" { print $3 }')
BATON_FLAGS="--drain-timeout-s $((${kill_wait:-30} * 4 / 5)) ${BATON_FLAGS:-}"
port=${BATON_PORT:-8000}
export BATON_COORDINATOR_FLAGS="--host 0.0.0.0 --port $port --link-port 0 ${BATON_COORDINATOR_FLAGS:-}"

alive() { kill -0 "$1" 2>/dev/null; }
pause() { sleep "$1" & wait $!; }  # unlike sleep alone, a signal ends it
finish() {  # signals do not end the wait; its status, once
    local status
    while :; do
        wait "$1"
        status=$?
        alive "$1" || return "$status"
    done
}
drain() {  # PID OF SRUN, JOB: its steps, as often as it takes until slurmctld answers
    while alive "$1" && ! scancel --signal=TERM "$2"; do pause 5; done
}

# Tasks serve on when others of their pool end, or lose their node.
pool() { exec srun --no-kill --kill-on-bad-exit=0 --wait=0 "$@"; }
