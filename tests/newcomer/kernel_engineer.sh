#!/usr/bin/env bash
# A kernel engineer, without torch: simulate, profile and lint a kernel; the rest says what it needs.
source "$(dirname "$0")/common.sh" "$@"
environment
pip install --quiet "$WHEEL"
! pip list 2>/dev/null | grep -iE '^(torch|triton|rich) ' || fail "more than the simulator needs is installed"

expect 0 "simulate" nsa
cp "$ROOT/examples/first_kernel/block_mean.py" my_kernel.py
expect 0 "float32 [256, 128]" nsa simulate my_kernel.py::halves --arg x=randn:8192x128
expect 0 "MODELLED" nsa profile my_kernel.py::halves --arg x=randn:8192x128
expect 0 "0 errors" nsa lint my_kernel.py
cp "$ROOT/examples/first_kernel/first_try.py" .
expect 1 "at most 128 partitions" nsa simulate first_try.py::one_tile --arg x=randn:8192x128
no_traceback

for command in ops backends conform agree explain demo compile-check; do
  expect 2 "needs torch, which is not installed: pip install 'nsa-neuron[torch]'" nsa "$command"
  [ "$(wc -l <said)" = 1 ] || { cat said; fail "more than one line"; }
done
expect 1 "nsa_neuron.attention needs torch" python -c "import nsa_neuron; nsa_neuron.attention"
expect 0 "2.0" python -c "
import numpy as np
import nsa_neuron.simulator as simulator
simulator.activate()
from my_kernel import halves
print(simulator.simulate(halves)(np.full((64, 8), 2, np.float32)).max())"
say "a kernel engineer is at home"
