"""Two passes in one: the what-if prices the pair as the kernel is priced that is written so."""

from __future__ import annotations

import pytest
from profile_helpers import nisa, nl, profile_of, psum, sbuf

from nsa_neuron.simulator.profiler.rules_passes import adjacent_passes
from nsa_neuron.simulator.profiler.what_if import Baseline

VECTOR, SCALAR = nisa.engine.vector, nisa.engine.scalar


class Tiles:
    """fp32 inputs x, y and bank (in PSUM), a 16-bit one; tiles between and at the end; a column."""

    def __init__(self):
        self.x, self.y, self.bank = sbuf((128, 512)), sbuf((128, 512)), psum((128, 512))
        self.half, self.made, self.out = (sbuf((128, 512), nl.bfloat16) for _ in range(3))
        self.column = sbuf((128, 1))
        for tile in (self.x, self.y, self.bank, self.half):
            nisa.memset(tile, 0.0, engine=VECTOR)


def scaled(t):
    nisa.tensor_scalar(t.made, t.x, nl.multiply, 2.0)


def halved(t, to):
    nisa.tensor_scalar(to, t.half, nl.multiply, 0.5)


def summed(t):
    nisa.tensor_reduce(t.column, nl.add, t.made, axis=1)


# What a message says; the two passes that it is about, and the one that it tells to write.
PAIRS = {
    "nisa.activation_reduce(..., reduce_op=nl.add)": (
        lambda t: (nisa.activation(t.made, nl.exp, t.x), summed(t)),
        lambda t: nisa.activation_reduce(t.made, nl.exp, t.x, nl.add, t.column),
    ),
    "nisa.activation_reduce(op=nl.square": (
        lambda t: (nisa.tensor_tensor(t.made, t.x, t.x, nl.multiply), summed(t)),
        lambda t: nisa.activation_reduce(t.made, nl.square, t.x, nl.add, t.column),
    ),
    "nisa.tensor_scalar_reduce": (
        lambda t: (halved(t, t.made), summed(t)),
        lambda t: nisa.tensor_scalar_reduce(t.made, t.half, nl.multiply, 0.5, nl.add, t.column),
    ),
    "write the result where the copy takes it": (
        lambda t: (halved(t, t.y), nisa.tensor_copy(t.out, t.y, engine=VECTOR)),
        lambda t: halved(t, t.out),
    ),
    "read what is copied instead of the copy": (
        lambda t: (nisa.tensor_copy(t.made, t.bank, engine=SCALAR),
                   nisa.tensor_scalar(t.out, t.made, nl.maximum, 1.0)),
        lambda t: nisa.tensor_scalar(t.out, t.bank, nl.maximum, 1.0),
    ),
    "one nisa.tensor_scalar with op0 and op1": (
        lambda t: (scaled(t), nisa.tensor_scalar(t.out, t.made, nl.add, 1.0)),
        lambda t: nisa.tensor_scalar(t.out, t.x, nl.multiply, 2.0, op1=nl.add, operand1=1.0),
    ),
    "one nisa.scalar_tensor_tensor": (
        lambda t: (scaled(t), nisa.tensor_tensor(t.out, t.made, t.y, nl.add)),
        lambda t: nisa.scalar_tensor_tensor(t.out, t.x, nl.multiply, 2.0, nl.add, t.y),
    ),
    "nisa.activation computes op(data * scale + bias)": (
        lambda t: (scaled(t), nisa.activation(t.out, nl.exp, t.made)),
        lambda t: nisa.activation(t.out, nl.exp, t.x, scale=2.0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("words", PAIRS)
def test_a_pair_in_one_costs_what_the_one_costs(words):
    """On its engine, with its operands; two pairs of a line, each of which is rewritten."""
    two, one = (
        profile_of(lambda passes=passes: [passes(Tiles()) for _ in range(2)] and None)
        for passes in PAIRS[words]
    )
    base = Baseline(two.timeline)
    (found,) = adjacent_passes(base)
    assert words in found.message and len(found.indices) == 2
    again, t = base._again(found.change), one.timeline
    left = [k for k, c in enumerate(again.costs) if c.interval]
    assert [(again.costs[k].interval, again.costs[k].latency) for k in left] == [
        (c.interval, c.latency) for c in t.costs
    ]
    assert [again.lane[k] for k in left] == t.lane.tolist()
    assert again.total == pytest.approx(t.total, rel=0.03)  # what is gone waits for its operand
