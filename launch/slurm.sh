#!/usr/bin/env bash
# Start a door (train or evaluate) on GPU nodes of a Slurm cluster, one process a node:
#
#   bash launch/slurm.sh --nodes=4 [--gpus_per_node=8] [--partition=...] [--account=...] [--time=24:00:00] \
#     [--name=distillspec] [--grace=300] [--restarts=10] [--dry_run] train --gin_file=runs/distill.gin ...
#
# Call it from a checkout that all nodes see; the environment is made here, before anything is queued. Slurm sends
# SIGTERM --grace seconds before the end of --time: the run saves, and launch/slurm_job.sh puts the job back into the
# queue, up to --restarts times, where it goes on from what it saved. --dry_run prints the exact commands and does
# nothing.
set -euo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$HERE/options.sh"
read_options "nodes" \
  "gpus_per_node=8 partition= account= time=24:00:00 name=distillspec grace=300 restarts=10" "" "$@"
require_door

OPTIONS=("--job-name=$OPT_NAME" "--nodes=$OPT_NODES" --ntasks-per-node=1 "--gpus-per-node=$OPT_GPUS_PER_NODE")
OPTIONS+=("--time=$OPT_TIME" "--signal=TERM@$OPT_GRACE" --requeue --exclusive --export=ALL --output=%x-%j.log)
OPTIONS+=(--open-mode=append "--chdir=$(cd "$HERE/.." && pwd)")
[ -z "$OPT_PARTITION" ] || OPTIONS+=("--partition=$OPT_PARTITION")
[ -z "$OPT_ACCOUNT" ] || OPTIONS+=("--account=$OPT_ACCOUNT")
# shellcheck disable=SC2034  # make_environment.sh reads it
EXTRAS="cuda" # this node may have no GPU: say so by hand
source "$HERE/make_environment.sh"
run sbatch "${OPTIONS[@]}" "$HERE/slurm_job.sh" "$OPT_RESTARTS" "${DOOR[@]}"
