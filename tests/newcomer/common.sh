# What the newcomers' scripts share. Each starts from an empty environment in an empty folder:
#
#   NAME.sh PYTHON WHEEL ROOT
#
# PYTHON makes the environment, WHEEL is nsa-neuron's, ROOT this repository, whose documents and
# examples are read. With NEWCOMER=full all is as a person does it: pip is installed, and torch, from
# where pip looks. Without it PYTHON's own pip installs, nothing is compiled that is not imported, and
# torch and what it needs are seen where PYTHON has them, which saves a minute and more.
set -euo pipefail
PYTHON=$1 WHEEL=$2 ROOT=$3
HERE=$(mktemp -d)
trap 'rm -rf "$HERE"' EXIT
cd "$HERE"
unset PYTHONPATH NSA_BACKEND
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { echo "== $*"; }

environment() {
  if [ "${NEWCOMER:-}" = full ] || ! "$PYTHON" -m pip --version >/dev/null 2>&1; then
    "$PYTHON" -m venv env
  else
    "$PYTHON" -m venv --without-pip env
    export PIP_PYTHON=$HERE/env/bin/python PIP_NO_COMPILE=0 # 0: as told by pip's documentation
    pip() { "$PYTHON" -m pip "$@"; }
  fi
  PATH=$HERE/env/bin:$PATH
  [ "$(command -v python)" = "$HERE/env/bin/python" ] || fail "the environment is not the first on the path"
}

fail() {
  echo "FAILED: $*" >&2
  exit 1
}

# expect STATUS TEXT COMMAND...: the command ends with that status and says that text.
expect() {
  local status=$1 text=$2 found=0
  shift 2
  say "$*"
  "$@" >said 2>&1 || found=$?
  [ "$found" = "$status" ] || { cat said; fail "status $found, not $status: $*"; }
  grep -qF -- "$text" said || { cat said; fail "does not say '$text': $*"; }
}

# A traceback is nothing that a person should see.
no_traceback() { ! grep -q Traceback said || { cat said; fail "a traceback"; }; }

torch() {
  if [ "${NEWCOMER:-}" = full ]; then
    pip install --quiet --constraint "$ROOT/constraints.txt" torch
  else
    "$PYTHON" -c 'import pathlib; from importlib.util import find_spec
print(pathlib.Path(find_spec("torch").origin).parents[1])' \
      >"$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth"
  fi
}
