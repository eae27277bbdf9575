"""What people fill in is refused by the field's name: types first, then ranges."""

from __future__ import annotations

import dataclasses
import math

import pytest

from nsa_neuron.distributed.parallelism import Parallelism
from nsa_neuron.distributed.training import How
from nsa_neuron.errors import InvalidArgument, InvalidType
from nsa_neuron.fields import SEEDS
from nsa_neuron.nn import NsaConfig
from nsa_neuron.nn.generation import Sampling
from nsa_neuron.training import MultiQueryRecall, TrainConfig
from nsa_neuron.training.loop import generator_of

CONFIG = NsaConfig(dim=16, heads=4, kv_heads=2, dk=8, dv=6)
FILLED = [How(), TrainConfig(), Parallelism(), Sampling(), MultiQueryRecall(), CONFIG]
# Of each annotation a value that belongs there, and some that do not.
RIGHT = {"float": 1, "bool": True}
WRONG = {
    "int": (True, 1.0, "1", None),
    "float": (True, "1", None, 1j),
    "str": (b"auto", None, 1),
    "bool": (1, 0, "yes", None),
}
NAMED = [
    pytest.param(values, f.name, f.type, id=f"{type(values).__name__}.{f.name}")
    for values in FILLED
    for f in dataclasses.fields(values)
    if f.type in WRONG
]


@pytest.mark.parametrize(("values", "name", "kind"), NAMED)
def test_a_field_of_another_type_is_named(values, name, kind):
    for wrong in WRONG[kind]:
        with pytest.raises(InvalidType) as caught:
            dataclasses.replace(values, **{name: wrong})
        error = caught.value
        assert (error.op, error.argument) == (type(values).__name__, name)
        assert error.expected == f"of type {kind}"
        assert error.found == f"{wrong!r} ({type(wrong).__name__})"
    if kind in RIGHT:
        assert getattr(dataclasses.replace(values, **{name: RIGHT[kind]}), name) == RIGHT[kind]


COUNTS, RATES, PIECES = (0, -1), (0.0, -1e-3, math.inf, math.nan), (1, 0, -5)
NOT_SEEDS = (2**63, -(2**63) - 1)
RUN = {
    "steps": COUNTS, "batch": COUNTS, "length": PIECES, "save_every": COUNTS, "rate": RATES,
    "clip": RATES, "seed": NOT_SEEDS,
}  # fmt: skip
BAD = [
    (How(), RUN),
    (How(), {
        "microbatches": COUNTS, "fetch": ("", "all"), "schedule": ("", "1F1B"),
        "dtype": ("half", "int64", "nn", "torch.bfloat16", "float8_e5m2"),
    }),
    (TrainConfig(), RUN),
    (TrainConfig(), {
        "warm_up": COUNTS, "muon": RATES[1:], "decay": RATES[1:],
        "growth": (
            ((0.5, 96), (0.2, 200)), ((0.5, 0),), ((-0.1, 96),), ((0.5, 96.0),), (("a", 96),),
            ((0.5,),), 0.5, ((None, 96), (0.5, 96)),
        ),
    }),
    (Parallelism(), dict.fromkeys(("pp", "dp", "cp", "tp"), COUNTS)),
    (MultiQueryRecall(), {"rounds": COUNTS, "near": (-1,)}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "name", "wrong"),
    [
        pytest.param(values, name, wrong, id=f"{type(values).__name__}.{name}")
        for values, fields in BAD
        for name, wrong in fields.items()
    ],
)
def test_a_value_that_no_run_could_use_is_named(values, name, wrong):
    for value in wrong:
        with pytest.raises(InvalidArgument) as caught:
            dataclasses.replace(values, **{name: value})
        assert (caught.value.op, caught.value.argument) == (type(values).__name__, name)
        assert caught.value.found == repr(value)


@pytest.mark.parametrize(
    "made",
    [
        How(steps=1, batch=1, length=2, save_every=1, microbatches=1, seed=-(2**63)),
        How(dtype="float64", fetch="blocks", schedule="zbv", seed=2**63 - 1),
        TrainConfig(steps=1, batch=1, length=2, warm_up=1, save_every=1, muon=0, decay=0),
        TrainConfig(growth=((0, 1), (0, 2))), TrainConfig(growth=()),
        MultiQueryRecall(rounds=1, near=0),
    ],
    ids=repr,
)  # fmt: skip
def test_values_at_the_limit_are_taken(made):
    assert dataclasses.replace(made) == made


def test_every_seed_gives_batches():
    """Numbers that a seed and a step make do not always fit a generator: they wrap around."""
    for seed in (SEEDS[0], SEEDS[-1], 2**45, -1):
        assert generator_of(seed, 7).initial_seed() == (seed * 1_000_003 + 7) % 2**64
    assert generator_of(3, 7).initial_seed() == 3_000_016
