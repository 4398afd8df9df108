# Source this: find or make the Python environment and install the package into it.
#
#   EXTRAS="test"                        # extras of setup.py, or "" for none
#   source launch/make_environment.sh    # no arguments: a sourced file would take the caller's own for its own
#
# Sets PYTHON (the interpreter to use) and ROOT (the repository). Uses the active virtual environment if there is
# one, else .venv in the repository. Installs only when setup.py or the wanted extras have changed. An NVIDIA GPU
# adds the extra `cuda`. With DRY_RUN=1 it prints the commands that make and fill the environment and does nothing.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

_fail() {
  echo "error: $*" >&2
  exit 1
}

_print() { # a command, as a shell would read it
  local text
  text="$(printf '%q ' "$@")"
  echo "${text% }"
}

_version_fits() { # Python 3.11, 3.12 or 3.13: what jax and TensorFlow both have wheels for
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' >/dev/null 2>&1
}

_find_python() {
  local name
  for name in python3.11 python3.12 python3.13 python3 python; do
    if command -v "$name" >/dev/null && _version_fits "$name"; then
      command -v "$name"
      return
    fi
  done
  return 1
}

_use_environment() {
  local active="${VIRTUAL_ENV:-}"
  if [ -z "$active" ] && [ -n "${CONDA_PREFIX:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" != base ]; then
    active="$CONDA_PREFIX"
  fi
  if [ -n "$active" ] && [ -x "$active/bin/python" ]; then
    PYTHON="$active/bin/python"
    _version_fits "$PYTHON" || _fail "the active environment $active has $("$PYTHON" --version 2>&1);" \
      "Python 3.11, 3.12 or 3.13 is needed: deactivate it and call again"
    return
  fi
  PYTHON="$ROOT/.venv/bin/python"
  if [ -x "$PYTHON" ] && _version_fits "$PYTHON" && "$PYTHON" -m pip --version >/dev/null 2>&1; then
    return
  fi
  local base
  base="$(_find_python)" || _fail "no Python 3.11, 3.12 or 3.13 found on PATH: install one (for instance" \
    "apt-get install python3.11 python3.11-venv) and call again"
  if [ -n "${DRY_RUN:-}" ]; then
    _print rm -rf "$ROOT/.venv"
    _print "$base" -m venv "$ROOT/.venv"
    NEW_ENVIRONMENT=1
    return
  fi
  echo "Making $ROOT/.venv with $("$base" --version 2>&1)"
  rm -rf "$ROOT/.venv"
  if ! "$base" -m venv "$ROOT/.venv" >"$ROOT/.venv.log" 2>&1; then
    tail -n 5 "$ROOT/.venv.log" >&2
    rm -rf "$ROOT/.venv" "$ROOT/.venv.log"
    _fail "$base cannot make virtual environments: install its venv package (Debian, Ubuntu: python3-venv)"
  fi
  rm -f "$ROOT/.venv.log"
}

_wanted_extras() {
  local extras=("$@")
  if [[ " $* " != *" cuda "* ]] && command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
    extras+=(cuda)
  fi
  echo "${extras[*]}"
}

_show_progress() { # pip's chatter -> a line now and then
  local line found=0
  while IFS= read -r line; do
    case "$line" in
      Collecting*) found=$((found + 1)); [ $((found % 25)) -ne 0 ] || echo "  $found packages found" ;;
      "Installing collected packages"*) echo "  $found packages; unpacking them takes a minute or two" ;;
    esac
  done
}

_installed() { # extra ...
  local extra
  for extra in base "$@"; do
    grep -qxs "$hash $extra" "$stamp_file" || return
  done
}

_install_when_needed() {
  local stamp_file="" hash="" list pip
  list="$(IFS=,; echo "$*")"
  pip=("$PYTHON" -m pip install --disable-pip-version-check --progress-bar off -e "$ROOT${list:+[$list]}")
  if [ -n "${NEW_ENVIRONMENT:-}" ]; then # of a dry run
    _print "${pip[@]}"
    return
  fi
  stamp_file="$("$PYTHON" -c 'import sys; print(sys.prefix)')/.distillspec_installed"
  hash="$("$PYTHON" - "$ROOT" <<'PY'
import hashlib, pathlib, sys
print(hashlib.sha256((pathlib.Path(sys.argv[1], "setup.py").read_bytes()) + sys.argv[1].encode()).hexdigest()[:16])
PY
  )"
  if _installed "$@"; then return; fi
  if [ -n "${DRY_RUN:-}" ]; then
    _print "${pip[@]}"
    return
  fi
  echo "Installing distillspec_jax${list:+ with $list} into $(dirname "$(dirname "$PYTHON")") (a few GB; once)"
  local log
  log="$(mktemp)"
  if ! "${pip[@]}" 2>&1 | tee "$log" | _show_progress; then
    tail -n 15 "$log" >&2
    _fail "pip could not install the package; the whole log is $log"
  fi
  rm -f "$log"
  { grep -s "^$hash " "$stamp_file" || true; printf "$hash %s\n" base "$@"; } | sort -u >"$stamp_file.new"
  mv "$stamp_file.new" "$stamp_file"
  echo "Installed."
}

set -o pipefail
_use_environment
# shellcheck disable=SC2046,SC2086,SC2153  # extras are words, of whoever sources this
_install_when_needed $(_wanted_extras $EXTRAS)
export PYTHON
