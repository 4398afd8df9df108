# Source this: what the scripts that start jobs elsewhere share.
#
#   HERE=launch
#   read_options "name zone" "accelerator=v5litepod-64" "spot" "$@"   # required, with a default, switches
#   require_door
#   run gcloud ...                                                    # or only print it, with --dry_run
#
# Sets OPT_NAME and so on for the options, DRY_RUN, and DOOR: what stands behind the options, a door and its arguments.

die() {
  echo "error: $*" >&2
  exit 2
}

_set() { # option value
  printf -v "OPT_$(tr '[:lower:]' '[:upper:]' <<<"$1")" '%s' "$2"
}

read_options() { # "required ..." "name=default ..." "switch ..." then the script's own arguments
  local required="$1" defaults="$2" switches="$3" word option variable
  shift 3
  for word in $defaults; do _set "${word%%=*}" "${word#*=}"; done
  for word in $required $switches; do _set "$word" ""; done
  DRY_RUN=""
  while [ $# -gt 0 ]; do
    option="${1#--}"
    option="${option%%=*}"
    case "$1" in
      --dry_run) DRY_RUN=1 ;;
      --) shift; break ;;
      --*=*)
        [[ " $required $defaults" == *" $option"[\ =]* || " $required" == *" $option" ]] || _unknown "$1" "$@"
        _set "$option" "${1#*=}"
        ;;
      --*)
        [[ " $switches " == *" $option "* ]] || _unknown "$1"
        _set "$option" 1
        ;;
      *) break ;;
    esac
    shift
  done
  for word in $required; do
    variable="OPT_$(tr '[:lower:]' '[:upper:]' <<<"$word")"
    [ -n "${!variable}" ] || die "--$word=... is missing; there are $(_listed)"
  done
  DOOR=("$@")
}

_listed() { # the options of the call that is being read
  local word text=""
  for word in $required $defaults; do text+="--${word%%=*}=..., "; done
  for word in $switches; do text+="--$word, "; done
  echo "$text--dry_run"
}

_unknown() {
  die "there is no option $1; there are $(_listed); what is to be started comes after them"
}

require_door() { # before anything costs money: a door whose processes find each other, and arguments that arrive
  [ ${#DOOR[@]} -gt 0 ] || die "say what to start behind the options, such as: train --gin_file=runs/distill.gin ..."
  case "${DOOR[0]}" in
    train | evaluate) ;;
    *) die "'${DOOR[0]}' does not run on several hosts, only train and evaluate do: start it on one machine, with" \
      "bash launch/run.sh ${DOOR[0]} ..." ;;
  esac
  # What %q writes as $'...' not every shell reads, and a line break would end XPK's YAML.
  [[ "$(quoted "${DOOR[@]}")" != *"\$'"* ]] ||
    die "an argument holds a line break, or a character that the locale does not know (LANG=${LANG:-}): it cannot be" \
      "handed on"
}

run() {
  if [ -n "$DRY_RUN" ]; then
    quoted "$@"
  else
    command -v "$1" >/dev/null || die "$1 is not installed"
    "$@"
  fi
}

quoted() { # words -> one line that a shell reads as these words
  local text
  text="$(printf '%q ' "$@")"
  echo "${text% }"
}
