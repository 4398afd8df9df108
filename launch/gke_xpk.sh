#!/usr/bin/env bash
# Start a door (train or evaluate) as a workload on TPUs of a GKE cluster that XPK made (pip install xpk; xpk cluster
# create ...):
#
#   bash launch/gke_xpk.sh --cluster=tpus --name=distill-xxl --zone=us-west4-a [--project=...] \
#     [--device=v5litepod-64] [--slices=1] [--image=python:3.11] [--storage=NAME,...] [--grace=300] [--restarts=10] \
#     [--dry_run] train ...
#
# --device is one of XPK's TPUs. --storage names what `xpk storage attach` gave the cluster: MODEL_DIR and the data lie
# there. XPK packs the checkout's committed files into an image on top of --image. A run that is told to stop, or loses
# one of its processes, is started again, up to --restarts times, and goes on from its last checkpoint; --grace is how
# many seconds Kubernetes gives it to save. --dry_run prints the exact commands and does nothing.
set -euo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$HERE/options.sh"
read_options "cluster name zone" \
  "project= device=v5litepod-64 slices=1 image=python:3.11 storage= grace=300 restarts=10" "" "$@"
require_door

WHAT=("--cluster=$OPT_CLUSTER" "--workload=$OPT_NAME" "--zone=$OPT_ZONE" "--tpu-type=$OPT_DEVICE")
[ -z "$OPT_PROJECT" ] || WHAT+=("--project=$OPT_PROJECT")
case "$OPT_DEVICE" in
  v[0-9]*-*) ;;
  tpu[0-9]*-*) WHAT+=(--no-use-parallel-containers) ;; # XPK would start two processes a host, each with half its chips
  *) die "--device=$OPT_DEVICE is no TPU, such as v5litepod-64, v4-128 or tpu7x-8, and this script starts nothing on" \
    "GPUs: use launch/slurm.sh, or launch/run.sh on each host with --coordinator=HOST:PORT --num_processes=N" \
    "--process_id=I" ;;
esac
for STORAGE in ${OPT_STORAGE//,/ }; do WHAT+=("--storage=$STORAGE"); done

# Codes after which XPK starts a workload again: 42 and 127-255, and those named here (3: another process was lost).
AGAIN=("--max-restarts=$OPT_RESTARTS" --restart-on-exit-codes=3 "--termination-grace-period-seconds=$OPT_GRACE")
COPY="${TMPDIR:-/tmp}/distillspec_jax_$OPT_NAME" # without .venv and what else lies about
run rm -rf "$COPY"
run git clone --quiet --depth=1 "file://$(cd "$HERE/.." && pwd)" "$COPY"
# exec, as XPK hands SIGTERM to the process that it started and to no child of it.
run xpk workload create "${WHAT[@]}" "--num-slices=$OPT_SLICES" "${AGAIN[@]}" \
  "--base-docker-image=$OPT_IMAGE" "--script-dir=$COPY" \
  --command="exec env DISTILLSPEC_EXTRAS=tpu DISTILLSPEC_EXIT_WHEN_TOLD=42 bash launch/run.sh $(quoted "${DOOR[@]}")"
