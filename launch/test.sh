#!/usr/bin/env bash
# Make the environment when there is none and run the tests:  bash launch/test.sh [pytest arguments]
# Files run side by side, two or more at a time (up to four: each may take 3 GB); -n 0 runs them one after another.
# They go in their own order, in which small files end the run (xdist would put the few long tests last).
# Without arguments: all but those marked slow (bash launch/test.sh -m slow), those marked as_users in a second run, in
# which programs are compiled as users' are (tests/conftest.py).
set -euo pipefail
# shellcheck disable=SC2034  # make_environment.sh reads it
EXTRAS="test"
source "$(dirname "${BASH_SOURCE[0]}")/make_environment.sh"
cd "$ROOT"
# A worker that dies ends the run: the others would wait for its files for ever.
RUN=("$PYTHON" -m pytest -n auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder --max-worker-restart=0)
[[ $# -gt 0 ]] && exec "${RUN[@]}" "$@"
"${RUN[@]}" -m "not slow and not as_users"
DISTILLSPEC_TEST_AS_USERS=1 exec "${RUN[@]}" --dist=worksteal -m "as_users and not slow"
