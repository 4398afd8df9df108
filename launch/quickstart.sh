#!/usr/bin/env bash
# Make the environment when there is none and do the main job:  bash launch/quickstart.sh [--output_dir DIR]
# Ends with DIR/summary.json and DIR/report.html.
set -euo pipefail
# shellcheck disable=SC2034  # make_environment.sh reads it
EXTRAS=""
source "$(dirname "${BASH_SOURCE[0]}")/make_environment.sh"
exec "$PYTHON" -m distillspec_jax.quickstart "$@"
