#!/usr/bin/env bash
# What launch/tpu_pod.sh calls on each worker of a slice: a job that goes on when the connection to it breaks.
#
#   bash launch/on_worker.sh start train --gin_file=...   # in the background
#   bash launch/on_worker.sh follow [LINES]               # show what it says until it ends; exits as it does
#   bash launch/on_worker.sh stop                         # SIGTERM: train saves and ends
#
# ~/distillspec_jax_job holds its output (log), its process (pid) and how it ended (code).
set -euo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$HERE/options.sh"
JOB="$HOME/distillspec_jax_job"

runs() { # after the machine was started anew the number may be another's
  [ -s "$JOB/pid" ] && [ ! -e "$JOB/code" ] && grep -qas 'launch/\|distillspec_jax' "/proc/$(cat "$JOB/pid")/cmdline"
}

wait_for() { # a file that is about to be written
  for _ in $(seq 100); do
    [ ! -s "$1" ] || return 0
    sleep 0.1
  done
  die "$(hostname): the job has left no $1: was it killed?"
}

WHAT="${1:-}"
[ $# -eq 0 ] || shift
case "$WHAT" in
  start)
    ! runs || die "$(hostname): a job runs here already: --follow shows it, --stop ends it"
    mkdir -p "$JOB"
    rm -f "$JOB/pid" "$JOB/code"
    setsid bash "${BASH_SOURCE[0]}" inside "$@" </dev/null >"$JOB/log" 2>&1 &
    wait_for "$JOB/pid"
    ;;
  inside)
    cd "$HERE/.." # what relative paths in the arguments are relative to
    CODE=0
    bash "$HERE/run.sh" "$@" &
    echo $! >"$JOB/pid"
    wait $! || CODE=$?
    echo "$CODE" >"$JOB/code"
    ;;
  follow)
    [ -s "$JOB/pid" ] || die "$(hostname): no job was started here"
    FOLLOWING=()
    ! runs || FOLLOWING=(-f "--pid=$(cat "$JOB/pid")")
    tail -n "${1:-100}" "${FOLLOWING[@]}" "$JOB/log"
    wait_for "$JOB/code"
    exit "$(cat "$JOB/code")"
    ;;
  stop) ! runs || kill -TERM "$(cat "$JOB/pid")" ;;
  *) die "'$WHAT' is none of start, follow, stop" ;;
esac
