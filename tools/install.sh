#!/usr/bin/env bash
# make install: a virtual environment with this project, and a CPU build of torch.
#
# PyPI's torch for Linux brings about 3 GB of CUDA libraries, so a CPU build is looked for first:
# where pip is set up to look, then in PyTorch's own index. Where neither has one, what follows is
# said before it is done.
set -euo pipefail
python=$1 venv=$2 extras=$3 index=$4
cd "$(dirname "$0")/.."
log=$(mktemp)
trap 'rm -f "$log"' EXIT

say() { echo "install: $*" >&2; }

pip() { # quiet; on failure what pip said
  "$venv/bin/python" -m pip --disable-pip-version-check install --quiet "$@" >"$log" 2>&1
}

must() { "$@" || { cat "$log" >&2; exit 1; }; }

"$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 15))' || {
  say "$python is $("$python" --version 2>&1); Python 3.10 to 3.14 is needed: make PYTHON=python3.12 ..."
  exit 1
}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
must pip --upgrade pip

if [ ",$extras," != ",," ]; then
  torch=$(sed -n 's/^torch==//p' constraints.txt)
  if "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    : # what is installed stays
  elif pip --constraint constraints.txt "torch==$torch+cpu"; then
    : # a CPU build where pip looks
  elif [ -n "$index" ] && pip --retries 1 --timeout 20 --index-url "$index" "torch==$torch"; then
    : # a CPU build from PyTorch
  else
    [ -z "$index" ] || say "no torch $torch to be had from $index"
    say "taking torch $torch from pip's own index: on Linux that is about 3 GB, CUDA included"
    must pip --constraint constraints.txt "torch==$torch"
  fi
fi
must pip --constraint constraints.txt --editable ".${extras:+[$extras]}"
say "$venv: $("$venv/bin/python" --version), $("$venv/bin/python" - <<'END'
from importlib.metadata import PackageNotFoundError, version
found = []
for name in ("torch", "triton", "numpy", "ml_dtypes"):
    try:
        found.append(f"{name} {version(name)}")
    except PackageNotFoundError:
        pass
print(", ".join(found))
END
)"
