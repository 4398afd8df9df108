#!/usr/bin/env bash
# Make the environment when there is none and start one of the package's doors on this machine, with all its devices:
#
#   bash launch/run.sh [--dry_run] train --gin_file=runs/distill.gin --gin.MODEL_DIR="'runs/distill'" ...
#
# It is also what the other scripts start on each host of a pod or cluster, where the processes find each other.
# DISTILLSPEC_EXTRAS names extras of setup.py to install, such as tpu; an NVIDIA GPU adds cuda by itself.
set -euo pipefail

DRY_RUN=""
if [ "${1:-}" = --dry_run ]; then
  DRY_RUN=1
  shift
fi
DOOR="${1:-}"
[ $# -eq 0 ] || shift
case "$DOOR" in
  train | evaluate | transfer | study | generate_targets | prepare_data | convert | plan | report) ;;
  *)
    echo "error: '$DOOR' is no door: say what to start, one of train, evaluate, transfer, study, generate_targets," \
      "prepare_data, convert, plan, report" >&2
    exit 2
    ;;
esac
if [ -n "$DRY_RUN" ]; then
  printf '%q ' python -m "distillspec_jax.$DOOR" "$@"
  exit
fi
# shellcheck disable=SC2034  # make_environment.sh reads it
EXTRAS="${DISTILLSPEC_EXTRAS:-}"
source "$(dirname "${BASH_SOURCE[0]}")/make_environment.sh"
exec "$PYTHON" -m "distillspec_jax.$DOOR" "$@"
