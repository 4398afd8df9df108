#!/usr/bin/env bash
# Make the environment when there is none and start one of the package's doors on this machine, with all its devices:
#
#   bash launch/run.sh [--dry_run] train --gin_file=runs/distill.gin --gin.MODEL_DIR="'runs/distill'" ...
#
# It is also what the other scripts start on each host of a pod or cluster, where the processes find each other.
# DISTILLSPEC_EXTRAS names extras of setup.py to install, such as tpu; an NVIDIA GPU adds cuda by itself. --dry_run
# prints the exact commands, of the environment as well where it is yet to be made, and does nothing.
set -euo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$HERE/options.sh"

DRY_RUN=""
if [ "${1:-}" = --dry_run ]; then
  DRY_RUN=1
  shift
fi
NAME="${1:-}"
[ $# -eq 0 ] || shift
case "$NAME" in
  train | evaluate | transfer | study | generate_targets | prepare_data | convert | plan | report) ;;
  *)
    die "'$NAME' is no door: say what to start, one of train, evaluate, transfer, study, generate_targets," \
      "prepare_data, convert, plan, report"
    ;;
esac
# shellcheck disable=SC2034  # make_environment.sh reads it
EXTRAS="${DISTILLSPEC_EXTRAS:-}"
source "$HERE/make_environment.sh"
if [ -n "$DRY_RUN" ]; then
  quoted "$PYTHON" -m "distillspec_jax.$NAME" "$@"
  exit
fi
exec "$PYTHON" -m "distillspec_jax.$NAME" "$@"
