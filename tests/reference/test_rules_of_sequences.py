"""Rules 11 to 15 of the contract, packing, and T > S."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from naive_nsa import attend, causal, chosen, complete, importance, select, windowed
from torch import Tensor

import nsa_neuron as nsa
from nsa_neuron.errors import InvalidArgument

L, D, M, N, W = 4, 2, 8, 4, 6
GEOMETRY = {"block": L, "stride": D}
WHOLE = {**GEOMETRY, "select_block": M, "num_selected": N, "window": W}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def raw(seed: int, s: int, t: int, hq: int = 4, hkv: int = 2) -> dict[str, Tensor]:
    """Everything a model would hand over, `[1, tokens, ...]`, k1/v1 not yet compressed."""
    values = {"q": normal(seed, 1, s, hq, 3)}
    for i, name in enumerate(("k1", "v1", "k2", "v2", "k3", "v3")):
        values[name] = normal(seed + i + 1, 1, t, hkv, 3 if name[0] == "k" else 2)
    gen = torch.Generator().manual_seed(seed)
    values["gates"] = torch.rand(1, s, hq, 3, generator=gen, dtype=torch.float64)
    return values


def run(x: dict[str, Tensor], **packed: Tensor) -> tuple[Tensor, ...]:
    """compress, then `nsa_attention_forward`: o, ids, and each branch's o and lse."""
    cu = {"cu_seqlens_k": packed["cu_seqlens_k"]} if packed else {}
    k_cmp, v_cmp = (nsa.compress(x[name], **cu, **GEOMETRY) for name in ("k1", "v1"))
    rest = [x[name] for name in ("k2", "v2", "k3", "v3", "gates")]
    results: tuple[Tensor, ...] = torch.ops.nsa.nsa_attention_forward(
        x["q"], k_cmp, v_cmp, *rest, **packed, **WHOLE
    )
    return results


def part(x: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    """Queries start..stop-1 with the keys they may need, 0..stop-1."""
    return {
        name: value[:, start:stop] if name in ("q", "gates") else value[:, :stop]
        for name, value in x.items()
    }


def test_rule_11_ops_add_no_position_encoding() -> None:
    """Exchanging two visible tokens, key and value alike, changes nothing."""
    q, k, v = normal(1, 1, 1, 2, 3), normal(2, 1, 20, 1, 3), normal(3, 1, 20, 1, 2)
    order = torch.arange(20)
    order[[16, 18]] = order[[18, 16]]
    calls: list[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = [
        lambda k, v: nsa.attention(q, k, v),
        lambda k, v: nsa.sliding_window_attention(q, k, v, window=6),
        lambda k, v: nsa.compressed_attention(q, k, v, kv_len=42, **GEOMETRY),
    ]
    for call in calls:
        plain, swapped = call(k, v), call(k[:, order], v[:, order])
        torch.testing.assert_close(plain, swapped, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 3, 8, 17])
def test_rule_12_chunked_prefill_is_whole_prefill(chunk: int) -> None:
    """chunk = 1 is token-by-token decode; ids are equal exactly."""
    total = 53
    x = raw(20, total, total)
    whole = run(x)
    pieces = [run(part(x, start, min(start + chunk, total))) for start in range(0, total, chunk)]
    for index, wanted in enumerate(whole):
        got = torch.cat([piece[index] for piece in pieces], 1)
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("t", [1, L - 1, L, M, M + 1, W, W + 1, 31])
def test_rule_12_decode_of_one_token_at_the_edges(t: int) -> None:
    x = raw(21, t, t)
    whole, last = run(x), run(part(x, t - 1, t))
    for wanted, got in zip(whole, last, strict=True):
        torch.testing.assert_close(got, wanted[:, -1:], rtol=1e-12, atol=1e-12)


def test_queries_are_the_last_of_the_keys() -> None:
    """T > S in every op against the loops."""
    s, t = 5, 27
    q, k, v = normal(1, 1, s, 4, 3), normal(2, 1, t, 2, 3), normal(3, 1, t, 2, 2)
    nc = (t - L) // D + 1
    where = {"kv_len": t, **GEOMETRY}
    o_cmp, lse_cmp = nsa.compressed_attention(q, k[:, :nc], v[:, :nc], **where)
    ids = nsa.select_blocks(q, k[:, :nc], lse_cmp, **where, select_block=M, num_selected=3)
    scores = importance(q[0], k[0, :nc], t, t - s, L, D, M, None)
    assert ids[0].tolist() == select(scores, t - s, M, 3)
    results = {
        "attention": (nsa.attention(q, k, v), causal),
        "window": (nsa.sliding_window_attention(q, k, v, window=W), windowed(W)),
        "selected": (
            nsa.selected_attention(q, k, v, ids, select_block=M), chosen(ids[0], M, t - s)
        ),
        "compressed": ((o_cmp, lse_cmp), complete(L, D, t)),
    }  # fmt: skip
    for name, ((o, lse), visible) in results.items():
        wanted_o, wanted_lse = attend(q[0], k[0], v[0], visible, t - s, None)
        torch.testing.assert_close(o[0], wanted_o, msg=name)
        torch.testing.assert_close(lse[0], wanted_lse, msg=name)


LENGTHS = ((3, 3), (20, 20), (1, 33), (7, 41))  # (S_i, T_i)


def joined(parts: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    x = {name: torch.cat([piece[name] for piece in parts], 1) for name in parts[0]}
    edges = [torch.tensor([0, *column]).cumsum(0).int() for column in zip(*LENGTHS, strict=True)]
    return x, {"cu_seqlens_q": edges[0], "cu_seqlens_k": edges[1]}


def test_packed_sequences_are_separate_calls() -> None:
    parts = [raw(30 + i, s, t) for i, (s, t) in enumerate(LENGTHS)]
    x, packed = joined(parts)
    together = run(x, **packed)
    separate = [run(piece) for piece in parts]
    for index, got in enumerate(together):
        wanted = torch.cat([results[index] for results in separate], 1)
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    full = nsa.attention(x["q"], x["k2"], x["v2"], **packed)
    alone = [nsa.attention(piece["q"], piece["k2"], piece["v2"]) for piece in parts]
    for index in range(2):
        torch.testing.assert_close(full[index], torch.cat([pair[index] for pair in alone], 1))


@pytest.mark.parametrize("changed", range(len(LENGTHS)))
def test_packed_sequences_never_leak(changed: int) -> None:
    """Other numbers (even infinities) in one sequence leave the others' results bit-equal."""
    parts = [raw(30 + i, s, t) for i, (s, t) in enumerate(LENGTHS)]
    x, packed = joined(parts)
    other = [dict(piece) for piece in parts]
    other[changed] = {name: value * 100 + 1 for name, value in parts[changed].items()}
    y, _ = joined(other)

    def everything(values: dict[str, Tensor]) -> list[Tensor]:
        leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
        results = run(leaves, **packed)
        full = nsa.attention(leaves["q"], leaves["k2"], leaves["v2"], **packed)
        loss = results[0].square().sum() + full[0].square().sum()
        loss.backward()
        return [*results, *full, *(leaf.grad for leaf in leaves.values())]  # type: ignore[list-item]

    before, after = everything(x), everything(y)
    q_edges, k_edges = packed["cu_seqlens_q"].tolist(), packed["cu_seqlens_k"].tolist()
    moved = 0
    for a, b in zip(before, after, strict=True):
        edges = q_edges if a.shape[1] == q_edges[-1] else k_edges
        kept = torch.ones(a.shape[1], dtype=torch.bool)
        kept[edges[changed] : edges[changed + 1]] = False
        assert torch.equal(a[:, kept], b[:, kept])
        moved += not torch.equal(a, b)
    assert moved > 5, "the change must show in its own sequence"


def test_rule_13_two_runs_are_bit_equal() -> None:
    def once() -> list[Tensor]:
        x = {name: v.float().requires_grad_() for name, v in raw(40, 60, 60).items()}
        o = run(x)[0]
        o.square().sum().backward()
        return [o, *(leaf.grad for leaf in x.values())]  # type: ignore[list-item]

    for a, b in zip(once(), once(), strict=True):
        assert torch.equal(a, b)


def test_rule_13_the_batch_does_not_matter_for_ids() -> None:
    """Ids of a row do not depend on what else is in the batch."""
    x, y = raw(41, 40, 40), raw(42, 40, 40)
    both = {name: torch.cat([x[name], y[name]]) for name in x}
    assert torch.equal(run(both)[1][:1], run(x)[1])


def test_rule_14_positions_beyond_2_to_the_31_elements() -> None:
    """k and v have 2^32 elements each; overlapping strides keep their storage small."""
    t, dim, w = 2**25, 128, 4
    store = torch.arange(t + dim, dtype=torch.float32).remainder_(251.0).div_(64)
    k = store.as_strided((1, t, 1, dim), (0, 1, 0, 1))
    assert k.numel() == 2**32
    q = normal(1, 1, 2, 1, dim).float()
    o, lse = nsa.sliding_window_attention(q, k, k, window=w)
    tail = k[:, -w - 1 :].contiguous()
    wanted_o, wanted_lse = nsa.sliding_window_attention(q, tail, tail, window=w)
    torch.testing.assert_close([o, lse], [wanted_o, wanted_lse])


def test_rule_14_one_million_tokens_of_context() -> None:
    """A decode step at 1M tokens, at the contract's default geometry."""
    t, dim, hq = 2**20, 4, 2
    gen = torch.Generator().manual_seed(1)
    q = torch.randn(1, 1, hq, dim, generator=gen)
    k, v = (torch.randn(1, t, 1, dim, generator=gen) for _ in range(2))
    k_cmp, v_cmp = nsa.compress(k), nsa.compress(v)
    assert k_cmp.shape[1] == 65535
    _, lse = nsa.compressed_attention(q, k_cmp, v_cmp, kv_len=t)
    ids = nsa.select_blocks(q, k_cmp, lse, kv_len=t)
    assert ids[0, 0, 0, 0] == 0 and ids[0, 0, 0, -2:].tolist() == [t // 64 - 2, t // 64 - 1]
    p = (q[0, 0] @ k_cmp[0, :, 0].T * dim**-0.5).softmax(-1).sum(0).double()
    weigh = (
        torch.nn.functional.pad(p, (1, 1)).unfold(0, 5, 4)
        @ torch.tensor([1, 2, 2, 2, 1.0]).double()
    )
    weigh[[0, -1, -2]] = torch.inf
    assert ids[0, 0, 0].tolist() == weigh.topk(16).indices.sort().values.tolist()
    o, _ = nsa.selected_attention(q, k, v, ids)
    tokens = (ids[0, 0, 0, :, None].long() * 64 + torch.arange(64)).flatten()
    weights = (q[0, 0] @ k[0, tokens, 0].T * dim**-0.5).softmax(-1)
    torch.testing.assert_close(o[0, 0], weights @ v[0, tokens, 0])


def test_rule_15_bad_input_names_the_argument() -> None:
    """One example; `tests/torch_ops/test_bad_input.py` has the table."""
    q, k = normal(1, 1, 4, 3, 8), normal(2, 1, 4, 2, 8)
    with pytest.raises(InvalidArgument, match="a multiple of the 2 kv heads") as caught:
        nsa.attention(q, k, k)
    assert caught.value.argument == "q"


MEMORY = """
import re, torch, nsa_neuron as nsa
# In KiB, of this program alone: ru_maxrss starts with what the process that forks it has.
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak()  # of the libraries: a CUDA build of torch takes 0.45 GB more than a CPU build
torch.set_num_threads(1)
torch.manual_seed(0)
S, T, Hq, D = 1024, 16384, 16, 64
q = torch.randn(1, S, Hq, D)
k, v = torch.randn(1, T, 1, D), torch.randn(1, T, 1, D)
{call}
print(peak() - before)
"""
WHOLE_CALL = """
k_cmp, v_cmp = nsa.compress(k), nsa.compress(v)
o = nsa.nsa_attention(q, k_cmp, v_cmp, k, v, k, v, torch.rand(1, S, Hq, 3))
assert o.isfinite().all()
"""
FULL_CALL = "o, lse = nsa.attention(q, k, v); assert o.isfinite().all()"


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference:eager"], indirect=True)
@pytest.mark.parametrize("call", [WHOLE_CALL, FULL_CALL], ids=["nsa_attention", "attention"])
def test_reference_at_16k_stays_under_4_gb(call: str, backend: str) -> None:
    """T = 16,384, Hq = 16, Hkv = 1: how far a process rises above what it is after the imports.

    By the last 1,024 queries, which take 0.7 GB in chunks and 2.5 GB at once: more chunks add
    nothing but their results, 64 MB a tensor. So far less than 4 GB is asked of them.
    """
    done = subprocess.run(
        [sys.executable, "-c", MEMORY.format(call=call)],
        capture_output=True, text=True, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "NSA_BACKEND": backend},
    )  # fmt: skip
    above = int(done.stdout.split()[-1]) * 1024
    assert 0.1e9 < above < 1.2e9, f"{above / 1e9:.2f} GB"
