#!/usr/bin/env bash
# One machine (CPU, GPU or one TPU host), starting from nothing but Python 3.11 or newer.
#
#   bash launch/local.sh quickstart [...]     the main job in miniature
#   bash launch/local.sh test [--slow] [...]  lint and tests; with --slow the slow tests only
#   bash launch/local.sh WORD [...]           any other word is a command of `blip3o` (--help lists them), run where you are
#
# Makes .venv in the repository once, and again only when setup.py or the choice below changes; needs no network otherwise.
# BLIP3O_EXTRAS (default "test") names the extras to install, e.g. BLIP3O_EXTRAS=cuda,test on a GPU machine.
# PYTHON names the interpreter to start from.
set -euo pipefail
here="$PWD"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '%s\n' "launch/local.sh: $*" >&2; }

find_python() {
  local candidate candidates=(python3.11 python3.12 python3.13 python3)
  [[ -z "${PYTHON:-}" ]] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    # Run it: a version manager leaves stubs on the PATH for versions that are not enabled, and Debian splits venv off.
    if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  say "needs Python 3.11 or newer with its venv module; tried: ${candidates[*]}." \
    "Install one (Debian, Ubuntu: apt install python3.11-venv) or set PYTHON=/path/to/python."
  exit 2
}

# What the environment was made for: it may not be moved, and follows setup.py.
wanted() { printf '%s %s\n' "$PWD" "${BLIP3O_EXTRAS:-test}" && cat setup.py; }
ready() { [[ -x .venv/bin/python && -f .venv/made_for ]] && cmp -s .venv/made_for <(wanted); }

make_environment() {
  local python
  python="$(find_python)"
  if ! [[ -w . ]]; then
    say "cannot write to $PWD, where .venv is to be; clone the repository to a place of your own"
    exit 2
  fi
  if [[ -e .venv && ! -f .venv/made_for && ! -e .venv.lock ]]; then # or it would be emptied
    say "$PWD/.venv is not of this script; move it away and run the same again"
    exit 2
  fi
  exec 9>.venv.lock
  # The lock belongs to the open file, not to the process that takes it: this shell holds it until it closes 9.
  "$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
  if ! ready; then
    say "installing into .venv with $python (about a minute, once)"
    # Another place or a broken interpreter: start over. Otherwise only add what changed.
    if ! [[ -x .venv/bin/python && "$(head -n 1 .venv/made_for 2>/dev/null)" == "$PWD "* ]]; then
      "$python" -m venv --clear .venv
    fi
    # --no-compile: of the 14,000 modules that this brings most are never imported; the others are compiled when they are.
    local install=(.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile)
    if ! "${install[@]}" "setuptools>=70.1" ||
      ! "${install[@]}" --no-build-isolation -e ".[${BLIP3O_EXTRAS:-test}]"; then
      say "the installation failed (see above); nothing was run. Mend the cause, mostly the network, and run the same again."
      exit 2
    fi
    wanted >.venv/made_for.tmp && mv .venv/made_for.tmp .venv/made_for
  fi
  exec 9>&-
}

ready || make_environment
python="$PWD/.venv/bin/python"

case "${1:-}" in
"") exec "$python" -m blip3o_jax --help ;;
test)
  shift
  if [[ " $* " == *" --slow "* ]]; then
    status=0
    "$python" -m pytest -n 2 "$@" || status=$?
    if [[ $status == 5 ]]; then # pytest's word for "nothing was collected"
      say "there are no slow tests here"
      exit 0
    fi
    exit "$status"
  fi
  "$python" -m ruff check .
  exec "$python" -m pytest -n 2 "$@"
  ;;
*) cd "$here" && exec "$python" -m blip3o_jax "$@" ;;
esac
