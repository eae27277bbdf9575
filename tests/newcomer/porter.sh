#!/usr/bin/env bash
# Somebody who ports a model: do targets agree, and if not, where?
source "$(dirname "$0")/common.sh" "$@"
environment
torch
pip install --quiet "$WHEEL[torch]"
cp "$ROOT"/examples/porting/*.py .

expect 0 "agrees" nsa agree model.py::make --targets cpu:torch,reference --decode 2 --html agree.html
grep -q "every target agrees" agree.html || fail "the page says something else"
expect 1 "layers.1: call 6, nsa_attention_forward (its part sliding_window_attention) is wrong" \
  nsa agree wrong_window.py::make --targets acme --decode 0
no_traceback
expect 2 "cannot run here" nsa agree model.py::make --targets trn2
no_traceback
say "a porter is at home"
