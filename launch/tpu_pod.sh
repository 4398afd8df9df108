#!/usr/bin/env bash
# Start a door (train or evaluate) on all workers of a Cloud TPU slice:
#
#   bash launch/tpu_pod.sh --name=pod --zone=us-west4-a [--accelerator=v5litepod-64] [--version=...] [--project=...] \
#     [--create [--spot]] [--delete] [--setup="..."] [--dry_run] train --gin_file=runs/distill_xxl.gin ...
#   bash launch/tpu_pod.sh --name=pod --zone=us-west4-a --follow|--stop [--delete]
#
# --create makes the slice first, with the software --version that belongs to --accelerator; --delete deletes it at the
# end, whatever became of the job, and also when this script is interrupted. The checkout's committed files go to the
# workers. Paths in the arguments must be seen by every worker: --setup is a command that each runs first, such as
# mounting a file store. The job goes on when the connection breaks: --follow shows it again, --stop has it save and
# end. --dry_run prints the exact commands and does nothing.
set -euo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$HERE/options.sh"
read_options "name zone" "accelerator=v5litepod-64 version= project= setup=" "create spot delete follow stop" "$@"
[ -n "$OPT_FOLLOW$OPT_STOP" ] || require_door
[ -z "$OPT_FOLLOW$OPT_STOP" ] || [ -z "$OPT_CREATE${DOOR[*]:-}" ] ||
  die "--follow and --stop are of a job that was started before: they take no --create and nothing to start"
[ -z "$OPT_SPOT" ] || [ -n "$OPT_CREATE" ] || die "--spot says how a slice is made: it needs --create"
if [ -z "$OPT_VERSION" ]; then # cloud.google.com/tpu/docs/runtimes
  case "$OPT_ACCELERATOR" in
    v2-* | v3-* | v4-*) OPT_VERSION=tpu-ubuntu2204-base ;;
    v5p-*) OPT_VERSION=v2-alpha-tpuv5 ;;
    v5litepod-*) OPT_VERSION=v2-alpha-tpuv5-lite ;;
    v6e-*) OPT_VERSION=v2-alpha-tpuv6e ;;
    *) die "no software is known for --accelerator=$OPT_ACCELERATOR (v2-, v3-, v4-, v5p-, v5litepod-, v6e-): name it" \
      "with --version=..." ;;
  esac
fi

WHERE=("--zone=$OPT_ZONE")
[ -z "$OPT_PROJECT" ] || WHERE+=("--project=$OPT_PROJECT")
ARCHIVE="${TMPDIR:-/tmp}/distillspec_jax_$OPT_NAME.tar.gz"

tpu_vm() { run gcloud compute tpus tpu-vm "$@" "${WHERE[@]}"; }
on_all_workers() { tpu_vm ssh "$OPT_NAME" --worker=all --command="$1"; }

delete_slice() {
  local attempt
  for attempt in 1 2 3; do # one that is being made cannot be deleted at once
    if tpu_vm delete "$OPT_NAME" --quiet; then return; fi
    if ! tpu_vm describe "$OPT_NAME" >/dev/null 2>&1; then
      echo "No slice $OPT_NAME is seen. To be sure: gcloud compute tpus tpu-vm list ${WHERE[*]}" >&2
      return
    fi
    [ "$attempt" -eq 3 ] || sleep 30
  done
  echo "error: $OPT_NAME was NOT deleted and may cost money: gcloud compute tpus tpu-vm delete $OPT_NAME" \
    "${WHERE[*]}" >&2
  exit 1
}

follow() { # and again, where the connection broke; a job that has failed has its last lines shown again
  local lines code
  for lines in 100 10 10; do
    code=0
    on_all_workers "bash distillspec_jax/launch/on_worker.sh follow $lines" || code=$?
    [ "$code" -ne 0 ] || return 0
    sleep 5
  done
  return "$code"
}

[ -n "$DRY_RUN" ] || command -v gcloud >/dev/null || die "gcloud is not installed"
if [ -n "$OPT_CREATE" ] && [ -n "$DRY_RUN" ]; then
  tpu_vm describe "$OPT_NAME"
elif [ -n "$OPT_CREATE" ] && tpu_vm describe "$OPT_NAME" >/dev/null 2>&1; then
  die "$OPT_NAME is there already: leave out --create to use it; one that was pre-empted has to be deleted first:" \
    "gcloud compute tpus tpu-vm delete $OPT_NAME ${WHERE[*]}"
fi
[ -z "$OPT_DELETE" ] || trap delete_slice EXIT # before anything is made that costs money
if [ -n "$OPT_CREATE" ]; then
  KIND=("--accelerator-type=$OPT_ACCELERATOR" "--version=$OPT_VERSION")
  [ -z "$OPT_SPOT" ] || KIND+=(--spot)
  tpu_vm create "$OPT_NAME" "${KIND[@]}"
fi
if [ -n "$OPT_FOLLOW$OPT_STOP" ]; then
  [ -z "$OPT_STOP" ] || on_all_workers "bash distillspec_jax/launch/on_worker.sh stop"
  follow
  exit
fi
run git -C "$HERE/.." archive --format=tar.gz --prefix=distillspec_jax/ -o "$ARCHIVE" HEAD
tpu_vm scp "$ARCHIVE" "$OPT_NAME:distillspec_jax.new.tar.gz" --worker=all
[ -z "$OPT_SETUP" ] || on_all_workers "$OPT_SETUP"
# The images come with Python 3.10.
INSTALL="sudo apt-get update && sudo apt-get -o DPkg::Lock::Timeout=300 install -y python3.11 python3.11-venv"
on_all_workers "python3.11 -c 'import ensurepip' 2>/dev/null || { $INSTALL; }"
# The files of the last call go, its environment and results stay.
CLEAR="[ ! -e distillspec_jax.tar.gz ] || tar tzf distillspec_jax.tar.gz | grep -v '/\$' | xargs -d '\\n' rm -f --"
UNPACK="tar xzf distillspec_jax.new.tar.gz && mv distillspec_jax.new.tar.gz distillspec_jax.tar.gz"
on_all_workers "{ $CLEAR; } && $UNPACK"
on_all_workers "DISTILLSPEC_EXTRAS=tpu bash distillspec_jax/launch/on_worker.sh start $(quoted "${DOOR[@]}")"
follow
