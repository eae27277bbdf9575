"""What people fill in is refused by its name: types first, then ranges; before any work."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from tiny import model

from nsa_neuron.distributed.parallelism import Parallelism
from nsa_neuron.distributed.training import How
from nsa_neuron.errors import InvalidArgument, InvalidType
from nsa_neuron.fields import SEEDS
from nsa_neuron.nn import ByteLanguageModel, NsaConfig, capture
from nsa_neuron.nn.generation import Sampling, generate
from nsa_neuron.planted import plant
from nsa_neuron.show import look
from nsa_neuron.training import MultiQueryRecall, Text, TrainConfig, evaluate, train
from nsa_neuron.training.corpus import corpus_of
from nsa_neuron.training.loop import generator_of
from nsa_neuron.training.presets import kinds_of, task_of

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


# ---- arguments of functions

TOKENS = torch.zeros(1, 9, dtype=torch.int64)
NO_INTS = (None, "3", 1.5, True, [1], math.nan)


def net():
    return model(("nsa", "window"), torch.float32)


def captured(net, query):
    with capture(net, [query]):
        net(TOKENS)


def stepped(net, *counts):
    with net.new_cache(2, 20).step(*counts):
        pass


def resized(net, **changes):
    cache = net.new_cache(2, 20, paged=True)
    cache.resize(**{"order": [0, 1], "capacity": 20, **changes})


TEXT = Text(corpus_of(text=[bytes(range(256)) * 4] * 3))
# By the argument's name: what takes it, values that it must refuse beside NO_INTS, and those of
# NO_INTS that it takes.
INTS = [
    ("count", lambda net, x: generate(net, [b"ab"], x), (0, -1), ()),
    ("chunk", lambda net, x: generate(net, [b"ab"], 1, chunk=x), (0, -1), ()),
    ("batch", lambda net, x: net.new_cache(x, 20), (0,), ()),
    ("capacity", lambda net, x: net.new_cache(1, x), (0,), ()),
    ("batch", lambda net, x: net.new_cache(x, 20, paged=True), (0,), ()),
    ("capacity", lambda net, x: net.new_cache(1, x, paged=True), (0,), ()),
    ("pages", lambda net, x: net.new_cache(1, 20, paged=True, pages=x), (0,), (None,)),
    ("slack", lambda net, x: net.new_cache(1, 20, paged=True, slack=x), (-1,), (None,)),
    ("longest_step", lambda n, x: n.new_cache(1, 20, paged=True, longest_step=x), (0,), (None,)),
    ("tokens", stepped, (0, -1), ()),
    ("source", lambda net, x: net.new_cache(2, 20).fork(x, 0), (-1, 2), ()),
    ("target", lambda net, x: net.new_cache(2, 20).fork(0, x), (-1, 2), ()),
    ("order", lambda net, x: resized(net, order=[0, x]), (-1, 2), ()),
    ("capacity", lambda net, x: resized(net, capacity=x), (0, 2**20 + 1), ()),
    ("longest_step", lambda net, x: resized(net, longest_step=x), (0,), (None,)),
    ("queries", captured, (-1,), ()),
    ("queries", lambda net, x: look(net, b"abc", [x]), (-4, 3), ()),
    ("facts", lambda net, x: plant(net, bytes(99), facts=x), (0, -1), ()),
    ("seed", lambda net, x: plant(net, bytes(99), seed=x), (2**63, -(2**63) - 1), ()),
    ("last", lambda net, x: net(TOKENS, last=x), (0, -1), (None,)),
    ("until", lambda net, x: train(*RUN_OF, until=x), (-1,), (None,)),
    ("batch", lambda net, x: evaluate(net, TEXT, x, 8), (0, -1), ()),
    ("length", lambda net, x: evaluate(net, TEXT, 1, x), (1, -1), ()),
    ("seed", lambda net, x: evaluate(net, TEXT, 1, 8, x), (2**63, -(2**63) - 1), ()),
    ("layers", lambda net, x: kinds_of("nsa", x), (0, -1), ()),
]
RUN_OF = (CONFIG, ("window",), TEXT, TrainConfig(steps=1), "nowhere")


@pytest.mark.parametrize(("name", "call", "outside", "taken"), INTS)
def test_an_argument_that_is_no_int_within_its_limits_is_named(name, call, outside, taken):
    made = net()
    for wrong, error in (
        *((value, InvalidType) for value in NO_INTS if value not in taken),
        *((value, InvalidArgument) for value in (*outside, 2**70)),
    ):
        with pytest.raises(error) as caught:
            call(made, wrong)
        assert caught.value.argument == name and str(caught.value.found).startswith(repr(wrong))


OTHERS = [
    ("prompts", lambda net: generate(net, None, 1)),
    ("sampling", lambda net: generate(net, [b"a"], 1, sampling=0.5)),
    ("cache", lambda net: generate(net, [b"a"], 1, cache=3)),
    ("mask", lambda net: net(TOKENS, mask=[[True] * 9])),
    ("cu_seqlens", lambda net: net(TOKENS, cu_seqlens=[0, 9])),
    ("text", lambda net: look(net, "abc", [0])),
    ("queries", lambda net: look(net, b"abc", 0)),
    ("document", lambda net: plant(net, "abc")),
    ("document", lambda net: plant(net, 300)),
    ("layers", lambda net: ByteLanguageModel(CONFIG, None)),
    ("layers", lambda net: ByteLanguageModel(CONFIG, True)),
    ("config", lambda net: ByteLanguageModel(CONFIG.to_dict(), 1)),
    ("values", lambda net: NsaConfig.from_dict(None)),
    ("how", lambda net: train(*RUN_OF[:3], {"steps": 1}, "nowhere")),
    ("attention", lambda net: kinds_of(("nsa",), 1)),
]


@pytest.mark.parametrize(("name", "call"), OTHERS)
def test_an_argument_of_another_type_is_named(name, call):
    with pytest.raises(InvalidType) as caught:
        call(net())
    assert caught.value.argument == name


EMPTY = [
    ("queries", lambda net: look(net, b"abc", [])),
    ("document", lambda net: plant(net, b"")),
    ("order", lambda net: resized(net, order=[])),
    ("layers", lambda net: ByteLanguageModel(CONFIG, -1)),
    ("layers", lambda net: ByteLanguageModel(CONFIG, [])),
    ("task", lambda net: task_of("txet")),
]


@pytest.mark.parametrize(("name", "call"), EMPTY)
def test_an_empty_or_unknown_value_is_named(name, call):
    with pytest.raises(InvalidArgument) as caught:
        call(net())
    assert caught.value.argument == name
    for empty in ([], 0, None):
        with pytest.raises(InvalidArgument, match="'queries'"), capture(net(), empty):
            pass
