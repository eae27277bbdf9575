"""`decode`: paging changes nothing, lengths may grow, what is not visible is not read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from decode_cases import a_case, check_golden
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import nsa_neuron as nsa
from nsa_neuron.errors import InvalidArgument, UnsupportedTransform
from nsa_neuron.ops import get
from nsa_neuron.ops.common import compressed_blocks
from nsa_neuron.registry import use_backend

if TYPE_CHECKING:
    from nsa_neuron.cases import Case

SPEC = get("decode")
GEOMETRY = ("block", "stride", "select_block", "num_selected", "num_initial", "num_local")


def one_sequence(values: dict[str, Any], b: int) -> dict[str, Tensor]:
    """The caches of sequence b without pages, row by row; zeros where the window sees nothing."""
    tokens = int(values["seqlens"][b])
    blocks = int(compressed_blocks(tokens, values["block"], values["stride"]))
    out = {}
    for name, rows in (("cmp", blocks), ("slc", tokens), ("win", tokens)):
        table = values[f"{name}_table"][b]
        for side in "kv":
            pool = values[f"{side}_{name}"]
            out[f"{side}_{name}"] = torch.zeros(1, rows, *pool.shape[2:], dtype=pool.dtype)
            for i in range(rows):
                page = int(table[i // pool.shape[1]])
                if page >= 0:
                    row = pool[page, i % pool.shape[1]]
                    out[f"{side}_{name}"][0, i] = row.nan_to_num()
    return out


@settings(max_examples=60)
@given(a_case())
def test_the_same_as_nsa_attention_on_each_whole_sequence(case: Case) -> None:
    """By the reference too, which no CPU tensor gets unasked."""
    values = SPEC.arguments(case, torch.float64)
    o = nsa.decode(**values)
    assert o.shape == (*values["q"].shape[:3], case.size("Dv"))
    with use_backend("reference"):
        torch.testing.assert_close(nsa.decode(**values), o, rtol=0, atol=1e-13)
    for b, tokens in enumerate(case.options["tokens"]):
        dead = max(0, case.size("S") - tokens)
        assert not o[b, :dead].any()
        if tokens:
            want = nsa.nsa_attention(
                values["q"][b : b + 1, dead:], **one_sequence(values, b),
                gates=values["gates"][b : b + 1, dead:],
                **{name: values[name] for name in (*GEOMETRY, "window", "scale")},
            )  # fmt: skip
            torch.testing.assert_close(o[b : b + 1, dead:], want, rtol=0, atol=1e-13)


@settings(max_examples=100)
@given(a_case(), st.data())
def test_broken_lengths_and_tables_give_a_typed_error_or_a_result(case: Case, data: Any) -> None:
    values = SPEC.arguments(case, torch.float32)
    index_names = [arg.name for arg in SPEC.tensors if arg.dtype == "i32"]
    name = data.draw(st.sampled_from(index_names))
    flat = values[name].flatten()
    flat[data.draw(st.integers(0, len(flat) - 1))] = data.draw(
        st.sampled_from([-(2**31), -1, 0, 1, 5, 100, 2**31 - 1])
    )
    try:
        o = nsa.decode(**{**values, name: flat.view(values[name].shape)})
    except InvalidArgument as error:
        assert error.argument in index_names
    else:  # another page holds the poison of rows that nothing reads
        assert o.dtype == torch.float32


def smoke(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    case = next(case for case in SPEC.cases if case.name == name)
    return SPEC.arguments(case, dtype)


def test_golden_through_the_op() -> None:
    check_golden()


def test_it_has_no_gradient_and_says_so() -> None:
    values = smoke("two_sequences")
    plain = nsa.decode(**values)
    values["q"].requires_grad_()
    o = nsa.decode(**values)
    assert o.equal(plain)
    with pytest.raises(UnsupportedTransform, match="for inference"):
        o.sum().backward()


def test_one_compiled_step_serves_growing_sequences() -> None:
    values = smoke("two_sequences")
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    step = torch.compile(nsa.decode, fullgraph=True, backend=backend)
    for lengths in ([40, 23], [40, 1], [8, 22]):
        values["seqlens"] = torch.tensor(lengths, dtype=torch.int32)
        values["window"] = 64
        whole = {**values, "win_table": values["slc_table"]}
        whole |= {"k_win": values["k_slc"], "v_win": values["v_slc"]}
        assert step(**whole).equal(nsa.decode(**whole))
    assert len(graphs) == 1


def test_vmap_over_queries_shares_the_caches() -> None:
    values = smoke("two_sequences", torch.float64)
    q = values.pop("q")
    several = torch.stack([q, q * 0.5, -q])
    mapped = torch.vmap(lambda x: nsa.decode(x, **values))(several)
    assert mapped.equal(torch.stack([nsa.decode(x, **values) for x in several]))
    with pytest.raises(UnsupportedTransform, match="k_cmp"):
        torch.vmap(lambda k: nsa.decode(q, **{**values, "k_cmp": k}))(
            torch.stack([values["k_cmp"]] * 2)
        )


def test_cost_counts_full_tables() -> None:
    """B=2, S=1, Hq=4, Hkv=2, 32/32: 4 pages of 32 tokens; 31 blocks, 4 * 16 selected, window 20."""
    values = smoke("two_sequences")
    tokens = values["slc_table"].shape[1] * 32
    blocks, raw = (tokens - 8) // 4 + 1, 4 * 16 + 20
    cost = SPEC.cost(SPEC.bind({**SPEC.defaults, **values}))
    assert cost.flops == 2 * 2 * (blocks + raw) * 4 * 64
    assert cost.bytes == 2 * (blocks + raw) * 2 * 64 * 4 + 2 * 4 * (64 + 3) * 4
