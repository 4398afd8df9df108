#!/usr/bin/env bash
# Start a door on GPU nodes of a Slurm cluster, one process a node:
#
#   bash launch/slurm.sh --nodes=4 [--gpus_per_node=8] [--partition=...] [--account=...] [--time=24:00:00] \
#     [--name=distillspec] [--dry_run] train --gin_file=runs/distill.gin ...
#
# Call it from a checkout that all nodes see; the environment is made here, before anything is queued. Slurm sends
# SIGTERM two minutes before the end (and when it pre-empts): the run saves, and --requeue starts it again where it was.
# --dry_run prints the exact command and does nothing.
set -euo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$HERE/options.sh"
read_options "nodes" "gpus_per_node=8 partition= account= time=24:00:00 name=distillspec" "" "$@"
require_door

OPTIONS=("--job-name=$OPT_NAME" "--nodes=$OPT_NODES" --ntasks-per-node=1 "--gpus-per-node=$OPT_GPUS_PER_NODE" "--time=$OPT_TIME")
OPTIONS+=(--exclusive --requeue --signal=TERM@120 --output=%x-%j.log)
[ -z "$OPT_PARTITION" ] || OPTIONS+=("--partition=$OPT_PARTITION")
[ -z "$OPT_ACCOUNT" ] || OPTIONS+=("--account=$OPT_ACCOUNT")
if [ -z "$DRY_RUN" ]; then
  # shellcheck disable=SC2034  # make_environment.sh reads it
  EXTRAS="cuda" # this node may have no GPU: say so by hand
  source "$HERE/make_environment.sh"
fi
run sbatch "${OPTIONS[@]}" --wrap="cd $(quoted "$(cd "$HERE/.." && pwd)") && exec srun bash launch/run.sh $(quoted "${DOOR[@]}")"
