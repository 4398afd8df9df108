#!/usr/bin/env bash
# The job that launch/slurm.sh queues, run by Slurm in the checkout: one process a node, and back into the queue when
# they were stopped before their end:
#
#   slurm_job.sh RESTARTS train --gin_file=runs/distill.gin ...
set -u
RESTARTS="$1"
shift
export DISTILLSPEC_EXTRAS=cuda DISTILLSPEC_EXIT_WHEN_TOLD=42

trap : TERM # the processes get the notice, too; this script has to outlive them
srun --kill-on-bad-exit=0 bash launch/run.sh "$@"
CODE=$? # the highest of all processes

# Told to stop, and saved (42); another process was lost (3); killed (over 127). Anything else is an end, or a mistake
# that would be made again.
[ "$CODE" -eq 42 ] || [ "$CODE" -eq 3 ] || [ "$CODE" -gt 127 ] || exit "$CODE"
if [ "${SLURM_RESTART_COUNT:-0}" -ge "$RESTARTS" ]; then
  echo "error: ended with $CODE after $RESTARTS restarts (--restarts): queue it again to go on" >&2
  exit "$CODE"
fi
case "$(scontrol show job "$SLURM_JOB_ID")" in
  *JobState=RUNNING*) scontrol requeue "$SLURM_JOB_ID" ;;
  *) ;; # cancelled by its owner; or pre-empted, and Slurm has put it back itself
esac
exit "$CODE"
