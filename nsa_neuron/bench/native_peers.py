"""`cpu:native` beside what else runs sparse attention on a CPU: compiled FlexAttention, and
lucidrains' native-sparse-attention-pytorch where that can be imported.

FlexAttention takes NSA's masks for a window and for chosen blocks; the mask, which in a model would
be made anew at each call, is made before the clock starts. lucidrains' module is timed whole, with
a narrow input, so that its projections cost little; its compression is a mean, like ours. It is
nobody's dependency here: `pip install native-sparse-attention-pytorch`, or `PYTHONPATH`.
"""

from __future__ import annotations

import importlib
import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import nsa_neuron
from nsa_neuron.bench import native
from nsa_neuron.bench.native import FORWARD, SDPA, Problem
from nsa_neuron.bench.record import Absent, Record
from nsa_neuron.registry import use_backend
from nsa_neuron.terminal import progress, table

BENCH = "native peers"
MODE = "cpu:native"
FLEX, LUCIDRAINS = "FlexAttention", "lucidrains"
MODULE = "native_sparse_attention_pytorch"
DENSE, NEAR, SELECTED, WHOLE = "causal", "window", "selected", "nsa"
WINDOW, BLOCK, SELECTED_BLOCKS = 512, 64, 16
MODULE_LIMIT = 4096
"""Tokens up to which lucidrains' module is tried: it gathers every query's keys, 2.3 GB at 4K."""
MODULE_WIDTH = 64
AGREE = 2e-3
"""Largest difference of a peer's result from ours that still counts as the same attention."""

Step = Callable[[], Tensor]


def measure(
    tokens: Sequence[int], heads: tuple[int, int], dim: int, dtype: str
) -> list[Record | Absent]:
    """Times every attention by everyone who has it, forward, without gradients.

    Args:
        tokens: lengths.
        heads: Hq, Hkv.
        dim: Dk = Dv.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`.
    """
    records: list[Record | Absent] = []
    with progress("peers", len(tokens)) as advance, torch.inference_mode():
        for length in tokens:
            advance(f"{length} tokens")
            problem = Problem(length, heads, dim, getattr(torch, dtype), FORWARD)
            values = problem.tensors()
            for what, steps in attentions(problem, values).items():
                records += _timed(problem, what, steps)
    return records


def attentions(problem: Problem, values: Sequence[Tensor]) -> dict[str, dict[str, Step | str]]:
    """By attention and by who has it: a call, or why there is none. Ours first."""
    q, k, v = values[:3]
    queries, keys, channels = (x.transpose(1, 2) for x in (q, k, v))
    ids = _chosen(q, k, v)
    chosen = _chosen_map(ids, problem)

    def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j <= i

    def near(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (j > i - WINDOW)

    group = problem.heads[0] // problem.heads[1]

    def selected(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & chosen[h // group, i, j // BLOCK]

    compiled = torch.compile(flex_attention, dynamic=False)

    def flex(mask: Any, heads: int | None = None) -> Step:
        size = problem.tokens
        blocks = create_block_mask(mask, None, heads, size, size, device="cpu")

        def step() -> Tensor:
            found: Tensor = compiled(queries, keys, channels, block_mask=blocks, enable_gqa=True)
            return found.transpose(1, 2)

        return step

    def ours(op: Callable[..., Any], *more: Tensor, **scalars: int) -> Step:
        def step() -> Tensor:
            with use_backend(MODE):
                o: Tensor = op(q, k, v, *more, **scalars)[0]
                return o

        return step

    return {
        DENSE: {
            SDPA: lambda: native.sdpa(problem, values).transpose(1, 2),
            MODE: ours(nsa_neuron.attention),
            FLEX: flex(causal),
        },
        NEAR: {
            MODE: ours(nsa_neuron.sliding_window_attention, window=WINDOW),
            FLEX: flex(near),
        },
        SELECTED: {
            MODE: ours(nsa_neuron.selected_attention, ids, select_block=BLOCK),
            FLEX: flex(selected, problem.heads[0]),
        },
        WHOLE: {
            MODE: lambda: native.nsa_on(MODE)(problem, values),
            LUCIDRAINS: lucidrains(problem),
        },
    }


def _chosen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Ids that NSA chooses for these queries, `[1, S, Hkv, n]`."""
    with use_backend(MODE):
        k_cmp, v_cmp = nsa_neuron.compress(k), nsa_neuron.compress(v)
        _, lse = nsa_neuron.compressed_attention(q, k_cmp, v_cmp, kv_len=k.shape[1])
        return nsa_neuron.select_blocks(q, k_cmp, lse, kv_len=k.shape[1])


def _chosen_map(ids: Tensor, problem: Problem) -> Tensor:
    """`[Hkv, S, blocks]` bool: whether a query chose a block."""
    blocks = -(-problem.tokens // BLOCK)
    places = ids[0].transpose(0, 1).long()
    found = torch.zeros(*places.shape[:2], blocks + 1, dtype=torch.bool)
    return found.scatter_(2, places.masked_fill(places < 0, blocks), True)[
        ..., :blocks
    ].contiguous()


def lucidrains(problem: Problem) -> Step | str:
    """A call of lucidrains' module of the same heads and blocks, or why there is none."""
    if problem.tokens > MODULE_LIMIT:
        return f"not tried above {MODULE_LIMIT} tokens: it copies every query's keys"
    try:
        module: Any = importlib.import_module(MODULE)
    except ImportError as error:
        return f"cannot be imported: {error}"

    class Mean(nn.Module):
        def forward(self, blocks: Tensor) -> Tensor:
            return blocks.mean(-2)

    attention = module.SparseAttention(
        dim=MODULE_WIDTH, dim_head=problem.dim, heads=problem.heads[0], kv_heads=problem.heads[1],
        sliding_window_size=WINDOW, compress_block_size=32, compress_block_sliding_stride=16,
        selection_block_size=BLOCK, num_selected_blocks=SELECTED_BLOCKS, causal=True,
        compress_mlp=Mean(),
    ).to(problem.dtype)  # fmt: skip
    x = torch.randn(1, problem.tokens, MODULE_WIDTH, dtype=problem.dtype)

    def step() -> Tensor:
        o: Tensor = attention(x)
        return o

    return step


def _timed(problem: Problem, what: str, steps: dict[str, Step | str]) -> list[Record | Absent]:
    """Checks that those who compute the same agree with ours, then times them in alternation."""
    facts = {**problem.facts(), "attention": what}
    absent: list[Record | Absent] = []
    runs: dict[str, list[tuple[float, float]]] = {}
    mine = steps[MODE]
    assert not isinstance(mine, str)
    expected = mine()
    for name, step in steps.items():
        why = step if isinstance(step, str) else _wrong(name, step, expected)
        if why:
            absent.append(Absent(BENCH, name, why, facts))
        else:
            runs[name] = []
    for _ in range(max(1, min(5, 16384 // problem.tokens))):
        for name in runs:
            step = steps[name]
            assert not isinstance(step, str)
            runs[name].append(native.seconds(step))
    load = round(os.getloadavg()[0], 2)
    return absent + [
        Record.of(
            BENCH, name, "ms", [1e3 * wall for wall, _ in taken], **facts,
            cpu_ms=round(1e3 * statistics.median(cpu for _, cpu in taken), 3), load=load,
        )
        for name, taken in runs.items()
    ]  # fmt: skip


def _wrong(name: str, step: Step, expected: Tensor) -> str:
    """Why a peer's step cannot be timed; empty if it can. It is compiled here."""
    try:
        found = step()
    except Exception as error:  # whatever a peer throws is a row of the table
        return f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    if name == LUCIDRAINS:  # it has projections of its own
        return "" if found.isfinite().all() else "its result is not finite"
    worst = (found.float() - expected.float()).abs().max().item()
    return "" if worst <= AGREE else f"differs from ours by {worst:.2g}"


def to_text(records: Sequence[Record | Absent]) -> str:
    """The table of this benchmark's records."""
    rows = []
    times = {
        (r.facts["tokens"], r.facts["attention"], r.name): r
        for r in records
        if isinstance(r, Record)
    }
    for record in records:
        key = (record.facts["tokens"], record.facts["attention"])
        ours = times.get((*key, MODE))
        if isinstance(record, Absent):
            cells = [f"none: {record.reason}", "-"]
        else:
            assert ours is not None
            cells = [str(record), f"{record.median / ours.median:.2f}"]
        rows.append([str(key[0]), key[1], record.name, *cells])
    title = "forward, no gradients: median (20th to 80th percentile)"
    return table(title, ["tokens", "attention", "who", "ms", f"over {MODE}"], rows)
