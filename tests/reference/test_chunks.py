"""The reference cuts long calls into chunks: what it gives does not depend on where it cuts.

The chunks are made as small as the code allows, so that every call has several and its last is not
full.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from nsa_neuron.ops import get, selected_attention, softmax

if TYPE_CHECKING:
    from nsa_neuron.cases import Case
    from nsa_neuron.spec import OpSpec

LEAST = 16  # queries of the smallest chunk over contiguous keys
OPS = (
    "attention", "sliding_window_attention", "compressed_attention", "selected_attention",
    "select_blocks", "attention_backward", "sliding_window_attention_backward",
    "compressed_attention_backward", "selected_attention_backward",
)  # fmt: skip


def case_of(spec: OpSpec, kind: str) -> Case:
    """37 queries of 61 tokens, or packed sequences with more queries than a chunk has."""
    case = next(c for c in spec.cases if c.name == "batch2_kv2")
    if kind == "tail":
        return replace(case, sizes={**case.sizes, "S": 37, "T": 61})
    sizes = {**case.sizes, "B": 1}
    return replace(case, sizes=sizes, lengths=((3, 21), (37, 37), (20, 50)), name=kind)


def results(spec: OpSpec, values: dict[str, Any]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        out = spec.reference(**values)
    return out if isinstance(out, tuple) else (out,)


def noted(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, rows: Any) -> list[slice]:
    """Notes the query rows of every chunk that a generator makes."""
    made: list[slice] = []
    generator = getattr(module, name)

    def noting(*given: Any) -> Any:
        for chunk in generator(*given):
            made.append(rows(chunk))
            yield chunk

    monkeypatch.setattr(module, name, noting)
    return made


@pytest.mark.parametrize("kind", ["tail", "packed"])
@pytest.mark.parametrize("op", OPS)
def test_small_chunks_give_the_same(monkeypatch, op: str, kind: str) -> None:
    spec = get(op)
    values = spec.arguments(case_of(spec, kind), torch.float64)
    wanted = results(spec, values)
    selected = op.startswith("selected_attention")
    if selected:
        made = noted(monkeypatch, selected_attention, "_row_tiles", lambda chunk: chunk[0])
        monkeypatch.setattr(selected_attention, "GATHER_ELEMENTS", 1)
    else:
        made = noted(monkeypatch, softmax, "tiles", lambda tile: tile.rows)
        monkeypatch.setattr(softmax, "CHUNK_ELEMENTS", 1)
    got = results(spec, values)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    queries = values["q"].shape[1]
    assert sum(rows.stop - rows.start for rows in made) == queries
    assert max(rows.stop - rows.start for rows in made) == (1 if selected else LEAST)


def test_a_chunk_grows_with_what_may_be_held(monkeypatch) -> None:
    """Logits of a chunk are at most CHUNK_ELEMENTS where a chunk can be that small."""
    monkeypatch.setattr(softmax, "CHUNK_ELEMENTS", 2 * 100 * 40)
    sequences = [(slice(0, 100), slice(0, 100), 0)]
    cut = [t.rows for t in softmax.tiles(sequences, softmax.Causal(), 2, torch.device("cpu"))]
    assert cut == [slice(0, 40), slice(40, 80), slice(80, 100)]
