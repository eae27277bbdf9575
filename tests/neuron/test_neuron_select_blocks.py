"""`select_blocks` kernel beyond the shared cases: geometry, pieces, ties, two cores, bits."""

from __future__ import annotations

from typing import Any

import judged
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from interpreted import examples

from nsa_neuron import simulator
from nsa_neuron.backends.neuron import plans, run
from nsa_neuron.backends.neuron.launch import select_blocks as launch
from nsa_neuron.cases import cumulative, exact_normal
from nsa_neuron.ops import get
from nsa_neuron.ops.compressed_attention import compressed_attention
from nsa_neuron.simulator import ShapeDtype
from nsa_neuron.simulator.cost import trips

pytestmark = pytest.mark.sim

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def problem(
    lengths: list[tuple[int, int]],
    heads: tuple[int, int] = (2, 1),
    geometry: tuple[int, int, int] = (8, 4, 16),
    forced: tuple[int, int] = (1, 2),
    *,
    dim: int = 8,
    n: int = 6,
    batch: int = 1,
    packed: bool = False,
    sharp: float = 1.0,
) -> dict[str, Any]:
    """Arguments of `select_blocks` with the float64 lse; several lengths only if packed."""
    queries, tokens = (sum(pair[i] for pair in lengths) for i in (0, 1))
    block, stride, select_block = geometry
    gen = torch.Generator().manual_seed(queries + tokens)
    rows = max(0, (tokens - block) // stride + 1)
    values: dict[str, Any] = {
        "q": exact_normal(gen, batch, queries, heads[0], dim, scale=sharp),
        "k_cmp": exact_normal(gen, batch, rows, heads[1], dim),
    }
    where: dict[str, Any] = {"kv_len": tokens, "block": block, "stride": stride}
    if packed:
        where["cu_seqlens_q"] = cumulative([s for s, _ in lengths])
        where["cu_seqlens_k"] = cumulative([t for _, t in lengths])
    exact = {name: x.double() for name, x in values.items()}
    _, lse = compressed_attention(v_cmp=exact["k_cmp"], **exact, **where)
    return {
        **values, **where, "lse": lse, "select_block": select_block, "num_selected": n,
        "num_initial": forced[0], "num_local": forced[1],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("tokens", "geometry", "n"),
    [
        (700, (4, 4, 4), 11),  # one key per block; several pieces; n is no multiple of 8
        (2300, (8, 4, 16), 40),  # two pieces of 128 blocks
        (560, (2, 1, 200), 4),  # 200 keys per block: two tiles of keys each
        (420, (12, 4, 12), 150),  # n above the number of blocks; 3 keys per block, 126 per tile
    ],
)
def test_geometry(tokens, geometry, n):
    judged.judge("select_blocks", problem([(150, tokens)], geometry=geometry, n=n), torch.bfloat16)


@pytest.mark.parametrize("heads", [(5, 1), (17, 1), (40, 1), (12, 4)])
def test_groups(heads):
    """Groups cut into parts of heads, and queries that fill no matmul."""
    judged.judge("select_blocks", problem([(70, 90)], heads), torch.float16)


@pytest.mark.parametrize("sharp", [30.0, 300.0])
def test_large_logits(sharp):
    """Logits of hundreds: p of invisible keys overflows, p of visible ones is 0 or 1."""
    judged.judge("select_blocks", problem([(100, 160)], sharp=sharp, dim=64), torch.float32)


def test_lowest_id_on_ties():
    """Every block has the same importance, so the forced ones and the lowest are chosen."""
    values = problem([(150, 300)], (1, 1), (4, 4, 4), n=7)
    values["q"] = torch.zeros_like(values["q"])
    values["lse"] = torch.log(torch.arange(150, 300).add(1).div(4, rounding_mode="floor"))
    values["lse"] = values["lse"].view(1, 150, 1)
    (ids,) = judged.call("select_blocks", judged.complete("select_blocks", values, torch.float32))
    own = torch.arange(150, 300) // 4
    wanted = torch.stack([*(torch.full_like(own, i) for i in range(5)), own - 1, own], 1)
    assert torch.equal(ids[0, :, 0], wanted.int())


def test_lowest_id_on_ties_between_pieces():
    """A list that is full keeps its lower ids against equal scores of a later piece."""
    values = problem([(1, 2400)], (1, 1), (4, 4, 4), n=9)
    values["q"] = torch.zeros_like(values["q"])
    values["lse"] = torch.full_like(values["lse"], 6.0)
    (ids,) = judged.call("select_blocks", judged.complete("select_blocks", values, torch.bfloat16))
    assert ids.flatten().tolist() == [*range(7), 598, 599]


@pytest.mark.parametrize("scale", [0.0, -0.7, 1e-30, 1e-42])
def test_any_scale(scale):
    values = problem([(40, 90)])
    exact = {name: values[name].double() for name in ("q", "k_cmp")}
    where = {name: values[name] for name in ("kv_len", "block", "stride")}
    _, lse = compressed_attention(v_cmp=exact["k_cmp"], **exact, **where, scale=scale)
    judged.judge("select_blocks", {**values, "lse": lse, "scale": scale}, torch.float32)


def with_plan(values: dict[str, Any], dtype: torch.dtype, **constants: int) -> None:
    """Asserts that other constants of the plan give the same ids, on one core and on two."""
    given_ = judged.complete("select_blocks", values, dtype)
    given_["scale"] = 0.3
    plan = {"forward": {**plans.load("select_blocks")["forward"], **constants}}
    wanted = launch.forward(run.simulated("select_blocks"), plans.load("select_blocks"), **given_)
    for lnc in (1, 2):
        got = launch.forward(run.simulated("select_blocks", lnc), plan, **given_)
        assert torch.equal(wanted, got), f"lnc {lnc}"


def test_small_tiles_give_the_same_ids():
    """One tile of keys per piece and few queries per tile."""
    values = problem([(150, 900)], (4, 1))
    with_plan(values, torch.bfloat16, largest_piece=1, query_bytes=256)


@pytest.mark.parametrize("heads", [(2, 1), (4, 2)])
@pytest.mark.parametrize("queries", [90, 128, 300, 600])
def test_hardware_loops_give_the_same_ids(heads, queries):
    """Whole and shared tiles in the loop, and what is left behind it."""
    values = problem([(queries, queries + 800)], heads, (4, 4, 4))
    with_plan(values, torch.float32, unrolled_key_tiles=0, looped_piece=1)


def test_hardware_loops_over_packed_sequences():
    values = problem([(90, 100), (5, 5), (200, 400)], (2, 1), (4, 2, 8), packed=True)
    with_plan(values, torch.bfloat16, unrolled_key_tiles=0, looped_piece=2)


def test_the_looped_program_does_not_grow_with_the_sequence():
    """At 64K and 1M tokens, every loop body once: what the program holds, within SBUF and PSUM."""
    sizes = []

    def start(kernel, tensors, constants):
        shapes = [ShapeDtype(tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in tensors]
        simulated = simulator.simulate(kernel, data=False, unknown=trips.constant(1))
        simulated(*shapes, **constants)
        sizes.append(len(simulated.run.instructions))
        return torch.empty(0)

    constants = {**plans.load("select_blocks")["forward"], "unrolled_key_tiles": 0}
    kernels = run.Kernels(run.package().load("select_blocks"), start, 1)
    for tokens in (2**16, 2**20):
        launch.forward(
            kernels, {"forward": constants}, torch.zeros(1, 300, 16, 192).bfloat16(),
            torch.zeros(1, tokens // 16 - 1, 1, 192).bfloat16(), torch.zeros(1, 300, 16),
            kv_len=tokens, block=32, stride=16, select_block=64, num_selected=16, num_initial=1,
            num_local=2, scale=0.07,
        )  # fmt: skip
    assert len(sizes) == 2 and max(sizes) < 2500


def test_what_does_not_fit_is_refused_by_rule():
    assert judged.refused("select_blocks", problem([(1, 16)], (513, 1))) == "group"


@st.composite
def problems(draw: Any) -> dict[str, Any]:
    stride = draw(st.integers(1, 6))
    overlap = draw(st.integers(1, 4))
    geometry = (stride * overlap, stride, stride * draw(st.integers(overlap, 8)))
    forced = (draw(st.integers(0, 2)), draw(st.integers(1, 3)))
    packed = draw(st.booleans())
    count = draw(st.integers(1, 3)) if packed else 1
    pairs = []
    for _ in range(count):
        queries = draw(st.integers(1, 80))
        pairs.append((queries, queries + draw(st.sampled_from([0, 0, 1, 50]))))
    kv_heads = draw(st.integers(1, 2))
    return problem(
        pairs,
        (kv_heads * draw(st.integers(1, 6)), kv_heads),
        geometry,
        forced,
        n=sum(forced) + draw(st.integers(0, 20)),
        batch=1 if packed else draw(st.integers(1, 2)),
        packed=packed,
        sharp=draw(st.sampled_from([0.25, 1.0, 8.0])),
    )


@given(values=problems(), dtype=st.sampled_from(sorted(DTYPES)))
@examples(25)
def test_any_shape(values, dtype):
    judged.judge("select_blocks", values, DTYPES[dtype])


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_a_scale_of_any_sign(scale):
    spec = get("select_blocks")
    case = next(case for case in spec.cases if case.name == "batch2_kv2")
    judged.judge(
        "select_blocks", {**spec.arguments(case, torch.float32), "scale": scale}, torch.float32
    )
