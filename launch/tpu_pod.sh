#!/usr/bin/env bash
# Start a door on all workers of a Cloud TPU slice:
#
#   bash launch/tpu_pod.sh --name=pod --zone=us-west4-a [--accelerator=v5litepod-64] [--version=v2-alpha-tpuv5-lite] \
#     [--project=...] [--create [--spot]] [--delete] [--setup="..."] [--dry_run] train --gin_file=runs/distill_xxl.gin ...
#
# --create makes the slice first, --delete deletes it at the end, whatever became of the job. The checkout's committed
# files go to the workers as they are; --dry_run prints the exact commands and does nothing. Paths in the arguments
# must be seen by every worker: --setup is a command that each runs first, such as mounting a file store.
set -euo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$HERE/options.sh"
read_options "name zone" "accelerator=v5litepod-64 version=v2-alpha-tpuv5-lite project= setup=" "create spot delete" "$@"
require_door

WHERE=("--zone=$OPT_ZONE")
[ -z "$OPT_PROJECT" ] || WHERE+=("--project=$OPT_PROJECT")
ARCHIVE="${TMPDIR:-/tmp}/distillspec_jax.tar.gz"

tpu_vm() { run gcloud compute tpus tpu-vm "$@" "${WHERE[@]}"; }
on_all_workers() { tpu_vm ssh "$OPT_NAME" --worker=all --command="$1"; }
delete_slice() { tpu_vm delete "$OPT_NAME" --quiet; }

if [ -n "$OPT_CREATE" ]; then
  KIND=("--accelerator-type=$OPT_ACCELERATOR" "--version=$OPT_VERSION")
  [ -z "$OPT_SPOT" ] || KIND+=(--spot)
  tpu_vm create "$OPT_NAME" "${KIND[@]}"
fi
[ -z "$OPT_DELETE" ] || trap delete_slice EXIT
run git -C "$HERE/.." archive --format=tar.gz --prefix=distillspec_jax/ -o "$ARCHIVE" HEAD
tpu_vm scp "$ARCHIVE" "$OPT_NAME:distillspec_jax.tar.gz" --worker=all
[ -z "$OPT_SETUP" ] || on_all_workers "$OPT_SETUP"
# The images come with Python 3.10.
on_all_workers "command -v python3.11 || sudo apt-get install -y python3.11 python3.11-venv"
on_all_workers "tar xzf distillspec_jax.tar.gz"
on_all_workers "cd distillspec_jax && DISTILLSPEC_EXTRAS=tpu bash launch/run.sh $(quoted "${DOOR[@]}")"
