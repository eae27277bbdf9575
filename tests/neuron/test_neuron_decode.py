"""The `decode` kernel beyond the shared cases: random caches, ties, two cores, impossible pages."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch
from decode_cases import a_case, check_golden
from hypothesis import given
from hypothesis import strategies as st
from interpreted import examples

import nsa_neuron as nsa
from nsa_neuron.backends.neuron import run
from nsa_neuron.backends.neuron.launch import decode as launch
from nsa_neuron.backends.neuron.launch.decode import caches, single
from nsa_neuron.errors import InvalidArgument, NsaError
from nsa_neuron.ops import get
from nsa_neuron.registry import use_backend

if TYPE_CHECKING:
    from nsa_neuron.cases import Case

pytestmark = pytest.mark.sim
SPEC, F32 = get("decode"), torch.float32
SINGLE = ("one_token", "group3", "group20", "group34_kv2", "l_d_m_equal", "three_to_one",
          "no_initial_one_local", "n_exceeds_blocks", "custom_scale", "paper_heads")  # fmt: skip
ZEROS = torch.zeros(1, 9000, dtype=torch.int32)


def launched(values: dict, lnc: int = 1) -> torch.Tensor:
    scale = values["scale"] or values["q"].shape[-1] ** -0.5
    kernels = run.simulated("decode", lnc)
    return partial(launch.forward, kernels, {})(**{**values, "scale": scale})


def a_named(name: str, dtype: torch.dtype = torch.float32) -> dict:
    case = next(case for case in SPEC.cases if case.name == name)
    return SPEC.arguments(case, dtype)


def in_float64(values: dict) -> dict:
    return {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in values.items()
    }


def close(values: dict, o: torch.Tensor) -> None:
    want = nsa.decode(**in_float64(values))
    bound = 3e-6 * max(1.0, want.abs().max().item())
    torch.testing.assert_close(o.double(), want, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SINGLE)
def test_one_head_of_a_core_is_as_right_as_several(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel with tokens and heads on the partitions, beside the one with heads on them."""
    values, taken = a_named(name, dtype), []
    real = single.Call.run
    monkeypatch.setattr(single.Call, "run", lambda *a, **k: taken.append(1) or real(*a, **k))
    o = launched(values)
    assert taken
    monkeypatch.setattr(single, "HEADS", 0)
    torch.testing.assert_close(o, launched(values), rtol=0.03, atol=0.02 * (o.dtype != F32) + 3e-6)
    if dtype == F32:
        close(values, o)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("forced", [(3, 2), (0, 4), (4, 1)])
def test_all_forced_blocks_are_chosen_and_no_other(
    forced: tuple[int, int], kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as are chosen at all, so that no score matters; by both kernels."""
    case = next(case for case in SPEC.cases if case.name == "custom_scale")
    initial, local = forced
    scalars = {**case.scalars, "num_initial": initial, "num_local": local}
    scalars["num_selected"] = initial + local
    sizes = {**case.sizes, "Hq": 2 * kv_heads, "Hkv": kv_heads}
    options = {"tokens": (150,), "pages": (16, 1, 16)}  # rows of whole blocks
    values = SPEC.arguments(replace(case, sizes=sizes, options=options, scalars=scalars), F32)
    close(values, launched(values))
    monkeypatch.setattr(single, "HEADS", 0)
    close(values, launched(values))


@examples(10)
@given(a_case(), st.sampled_from([16, 64]))
def test_any_case_of_one_head(case: Case, page: int) -> None:
    """Whole blocks in rows of compressed keys, so that the kernel takes most of them."""
    ratio = case.scalars["select_block"] // case.scalars["stride"]
    sizes = {**case.sizes, "B": 1, "S": 1, "Hkv": 1, "Hq": case.sizes["Hq"]}
    options = {"tokens": case.options["tokens"][:1], "pages": (ratio * 4, 1, page)}
    values = SPEC.arguments(replace(case, sizes=sizes, options=options), torch.float32)
    close(values, launched(values))


@pytest.mark.parametrize(("tokens", "block", "tiles"), [(2600, 8, 2), (4300, 12, 3)])
def test_compressed_keys_of_one_head_in_several_tiles(
    tokens: int, block: int, tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks count keys of the row before, which another tile holds, or another partition."""
    case = next(case for case in SPEC.cases if case.name == "custom_scale")
    options = {"tokens": (tokens,), "pages": (4, 2, 8)}
    scalars = {**case.scalars, "block": block, "num_selected": 11}
    values = SPEC.arguments(replace(case, options=options, scalars=scalars), F32)
    taken, real = [], single.Call.run
    monkeypatch.setattr(
        single.Call, "run", lambda call, *a, **k: taken.append(call.tiles) or real(call, *a, **k)
    )
    close(values, launched(values))
    assert taken == [tiles]


@examples(8)
@given(a_case(), st.sampled_from([32, 96, 192]))
def test_keys_that_dma_turns_are_those_that_tensor_engine_turns(case: Case, dk: int) -> None:
    """A key's channels begin at any quarter of the partitions; rows hold one or two kv heads."""
    ratio = case.scalars["select_block"] // case.scalars["stride"]
    sizes = {**case.sizes, "B": 1, "S": 1, "Dk": dk}
    options = {"tokens": case.options["tokens"][:1], "pages": (ratio * 4, 4, 8)}
    scalars = {**case.scalars, "num_selected": 127}  # rows of whole blocks
    case = replace(case, sizes=sizes, options=options, scalars=scalars)
    values = SPEC.arguments(case, torch.bfloat16)
    o = launched(values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(single.Call, "by_dma", False)
        torch.testing.assert_close(o, launched(values), rtol=0.02, atol=0.01)


@pytest.mark.parametrize("dims", [(130, 33), (192, 128)])
def test_one_query_head_with_a_long_key(dims: tuple[int, int]) -> None:
    """Both parts of its logits go on with groups that one matmul into their bank began."""
    case = next(case for case in SPEC.cases if case.name == "group1")
    sizes = {**case.sizes, "Hq": 1, "Hkv": 1, "Dk": dims[0], "Dv": dims[1]}
    values = SPEC.arguments(replace(case, sizes=sizes), torch.float32)
    close(values, launched(values))


@examples(10)
@given(a_case())
def test_any_case(case: Case) -> None:
    values = SPEC.arguments(case, torch.float32)
    close(values, launched(values))


@pytest.mark.parametrize(("block", "select_block"), [(3, 70), (4, 5), (1, 3)])
def test_logits_that_do_not_fit_go_to_memory(
    block: int, select_block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In tiles of 128 blocks, at whose edges selection blocks do not end."""
    case = next(case for case in SPEC.cases if case.name == "stride_one")
    scalars = {**case.scalars, "block": block, "select_block": select_block}
    case = replace(case, scalars=scalars, options={**case.options, "tokens": (300, 131)})
    values = SPEC.arguments(case, torch.float32)
    monkeypatch.setattr(caches, "ROW_BYTES", 1)
    within = launched(values)
    monkeypatch.setattr(launch, "HELD_BYTES", 0)
    o = launched(values)
    close(values, within)
    close(values, o)
    assert not o.equal(within)  # sums are made in another order


@pytest.mark.parametrize("name", ["two_sequences", "several_queries", "odd_pages", "group34_kv2"])
def test_heads_first_caches_give_the_same_bits(name: str) -> None:
    """A page holds one kv head's tokens after another's."""
    values = a_named(name, torch.bfloat16)
    turned = dict(values)
    for branch in ("cmp", "slc", "win"):
        for side in "kv":
            pool = values[f"{side}_{branch}"]
            turned[f"{side}_{branch}"] = pool.transpose(1, 2).contiguous().transpose(1, 2)
    assert launched(turned).equal(launched(values))


def test_heads_first_caches_give_the_same_bits_on_two_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each serves one of the heads, whose rows could be twice as long then."""
    monkeypatch.setattr(single, "HEADS", 0)
    case = next(case for case in SPEC.cases if case.name == "default_geometry")
    options = {**case.options, "tokens": (300,)}
    case = replace(case, sizes={**case.sizes, "B": 1}, options=options)
    values = SPEC.arguments(case, F32)
    for name in ("k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win"):
        values[name] = values[name].transpose(1, 2).contiguous().transpose(1, 2)
    assert launched(values, 2).equal(launched(values))


def test_a_sequence_of_nan_leaves_the_others_alone() -> None:
    values = a_named("two_sequences")
    good = launched(values)
    values["q"][0] = float("nan")
    o = launched(values)
    assert o[1:].equal(good[1:]) and o[0].isnan().all()


def test_golden() -> None:
    with use_backend("neuron", "sim"):
        check_golden()


@pytest.mark.parametrize("name", ["edges", "several_queries", "group34_kv2"])
def test_two_cores_and_two_runs_give_the_same_bits(name: str) -> None:
    values = a_named(name, torch.bfloat16)
    o = launched(values)
    assert o.equal(launched(values)) and o.equal(launched(values, 2))


def test_queries_that_do_not_fit_the_partitions_together() -> None:
    """3 queries of 68 heads: one at a time, each at its own position."""
    values = a_named("group34_kv2")
    heads, kv = 68, slice(0, 1)
    gen = torch.Generator().manual_seed(0)
    values["q"] = torch.randn(1, 3, heads, 32, generator=gen)
    values["gates"] = torch.rand(1, 3, heads, 3, generator=gen)
    for name in ("k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win"):
        values[name] = values[name][:, :, kv].contiguous()
    values["win_table"], values["k_win"] = values["slc_table"], values["k_slc"]
    values["v_win"] = values["v_slc"]
    close(values, launched(values))


@pytest.mark.parametrize("heads", [0, 2])
@pytest.mark.parametrize("chosen", [3, 5, 8, 9])
def test_equal_scores_take_the_lowest_block(
    chosen: int, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries of zeros see every compressed block alike: all blocks but the first and last tie."""
    monkeypatch.setattr(single, "HEADS", heads)
    values = a_named("forced_only")
    values["q"].zero_()
    close({**values, "num_selected": chosen}, launched({**values, "num_selected": chosen}))


def test_a_negative_scale() -> None:
    values = {**a_named("several_queries"), "scale": -0.4}
    close(values, launched(values))


def test_impossible_pages_are_refused_by_name() -> None:
    values = a_named("two_sequences")
    values["slc_table"][1, 0] = values["k_slc"].shape[0]
    with use_backend("neuron", "sim"), pytest.raises(InvalidArgument, match="slc_table"):
        nsa.decode(**values)


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        ("blocks", {"slc_table": ZEROS}),
        ("selected", {"num_selected": 600, "slc_table": ZEROS[:, :900]}),
        ("window", {"window": 9000, "slc_table": ZEROS[:, :900], "win_table": ZEROS}),
    ],
)
def test_what_does_not_fit_is_refused_by_rule(rule: str, change: dict) -> None:
    values = a_named("one_token") | change
    with use_backend("neuron", "sim"), pytest.raises(NsaError, match=f"rule '{rule}'"):
        nsa.decode(**values)


def test_rows_of_many_heads_are_read_token_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    values = a_named("two_sequences", torch.bfloat16)
    o = launched(values)
    monkeypatch.setattr(caches, "ROW_BYTES", 64)
    monkeypatch.setattr(caches, "BLOCK_BYTES", 64)
    assert launched(values).isclose(o, rtol=0.02, atol=0.01).all()
