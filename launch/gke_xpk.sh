#!/usr/bin/env bash
# Start a door as a workload on a GKE cluster that XPK made (pip install xpk; xpk cluster create ...):
#
#   bash launch/gke_xpk.sh --cluster=tpus --name=distill-xxl --zone=us-west4-a [--project=...] \
#     [--device=v5litepod-64] [--slices=1] [--image=python:3.11] [--restarts=10] [--dry_run] train ...
#
# --device is a kind of XPK's, TPUs or GPUs (h100-80gb-8). XPK packs the checkout's committed files into an image on top
# of --image. A workload that is pre-empted is started again and goes on from its last checkpoint. --dry_run prints the
# exact commands and does nothing.
set -euo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$HERE/options.sh"
read_options "cluster name zone" "project= device=v5litepod-64 slices=1 image=python:3.11 restarts=10" "" "$@"
require_door

WHAT=("--cluster=$OPT_CLUSTER" "--workload=$OPT_NAME" "--zone=$OPT_ZONE" "--device-type=$OPT_DEVICE")
[ -z "$OPT_PROJECT" ] || WHAT+=("--project=$OPT_PROJECT")
EXTRAS="" # of a GPU it is found out there
[[ "$OPT_DEVICE" != v[0-9]* ]] || EXTRAS=tpu
COPY="${TMPDIR:-/tmp}/distillspec_jax_xpk" # without .venv and what else lies about
run rm -rf "$COPY"
run git clone --quiet --depth=1 "file://$(cd "$HERE/.." && pwd)" "$COPY"
run xpk workload create "${WHAT[@]}" "--num-slices=$OPT_SLICES" "--max-restarts=$OPT_RESTARTS" \
  "--base-docker-image=$OPT_IMAGE" "--script-dir=$COPY" \
  --command="DISTILLSPEC_EXTRAS=$EXTRAS bash launch/run.sh $(quoted "${DOOR[@]}")"
