"""`--dry-run`: everything that needs no GPU, at tiny sizes on a CPU, with assertions.

Independent loops check the selection, torch's own attention checks the reference, round trips check
index conversions and pages, and wrong results must be refused. Then the whole benchmark runs on the
baselines and on a table made of the reference; implementations given by their folders run as well,
which most can under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from tools.peers.adapters import (
    STAGES,
    Flex,
    Lucidrains,
    causal_blocks,
    equal_dims,
    heads_first,
    ids_to_hsn,
)
from tools.peers.measure import compare, compare_selection, decided
from tools.peers.problem import (
    GRADS,
    Decode,
    Geometry,
    Heads,
    Problem,
    expected,
    make_decode,
    make_problem,
    output,
    paged,
    select_all,
    visible,
)

if TYPE_CHECKING:
    import argparse

    from tools.runs import Row

TINY, TOKENS = Geometry(n=4, w=80), 384
FLOAT32_CPU = (torch.float32, "cpu")


def shrink_further(args: argparse.Namespace) -> None:
    """As small as interpreted kernels want it; peers that need 16 heads per group cannot run."""
    shrink(args)
    args.heads, args.geom = [Heads(2, 1, 24, 16)], Geometry(n=4, w=40)
    args.lengths, args.decode_batch, args.decode_tokens = [264], 2, 264
    args.checked = 12


def shrink(args: argparse.Namespace) -> None:
    """Tiny sizes; fp16, because interpreted Triton multiplies bf16 wrongly."""
    args.device, args.dtype, args.geom = "cpu", torch.float16, TINY
    args.heads = [Heads(32, 2, 48, 32)]
    args.lengths, args.decode_batch, args.decode_tokens = [TOKENS], 3, TOKENS
    args.checked, args.prewarm = 24, 0


def check_everything(args: argparse.Namespace) -> None:
    for heads, tokens, rho in (
        (Heads(8, 2, 24, 16), TOKENS, 0.0),
        (Heads(6, 2, 16, 16), 1030, args.rho),
        (Heads(2, 2, 8, 8), 40, 0.0),
    ):
        p = make_problem(heads, TINY, tokens, rho, 24, *FLOAT32_CPU)
        check_inputs(p)
        check_selection(p)
        check_reference(p)
        check_indices(p)
    p = make_problem(Heads(8, 2, 24, 16), TINY, TOKENS, 0.0, 24, *FLOAT32_CPU)
    check_flex(p)
    check_refusals(p)
    check_pages(make_decode(Heads(8, 2, 24, 16), TINY, 3, TOKENS, *FLOAT32_CPU))
    check_overlap(args.rho)
    print("dry run: generators, selection, reference, indices, pages and refusals hold")


def check_inputs(p: Problem) -> None:
    assert all(x.isfinite().all() for x in (p.q, p.k, p.v, p.k_cmp, p.v_cmp, p.gates))
    assert len(p.q) < 100 or max(abs(p.q.std() - 1), abs(p.k.std() - 1)) < 0.1
    assert len(p.k_cmp) == p.geom.num_cmp(len(p.k))
    last = len(p.k_cmp) - 1
    block = p.k[last * p.geom.d : last * p.geom.d + p.geom.l]
    torch.testing.assert_close(p.k_cmp[last], block.mean(0))
    assert {0, len(p.q) - 1} <= set(p.rows.tolist()) and p.rows.equal(p.rows.unique())


def check_selection(p: Problem) -> None:
    """Block ids against the rules written as loops over tokens."""
    g, group = p.geom, p.q.shape[1] // p.k.shape[1]
    for t in p.rows.tolist():
        own, seen = t // g.m, [i for i in range(len(p.k_cmp)) if i * g.d + g.l - 1 <= t]
        forced = {j for j in (*range(g.init), *range(own - g.local + 1, own + 1)) if 0 <= j <= own}
        for h in range(p.k.shape[1]):
            score = [0.0] * (own + 1)
            for q in p.q[t, h * group : (h + 1) * group]:
                probs = (p.k_cmp[seen, h] @ q * p.scale).softmax(0).tolist()
                for i, prob in zip(seen, probs, strict=True):
                    for token in range(i * g.d, i * g.d + g.l):
                        score[token // g.m] += prob / g.d
            free = sorted(set(range(own + 1)) - forced, key=lambda j: (-score[j], j))
            wanted = sorted(forced | set(free[: g.n - len(forced)]))
            assert p.chosen[t, h].tolist() == wanted + [-1] * (g.n - len(wanted)), (t, h, wanted)


def check_reference(p: Problem) -> None:
    """Outputs and gradients against torch's attention with explicit masks, all rows at once."""
    rows, x = torch.arange(len(p.q)), {"k": p.k, "k_cmp": p.k_cmp, "ids": p.chosen}
    for stage, names in GRADS.items():
        if stage == "nsa":
            continue
        leaves = [getattr(p, name).clone().requires_grad_() for name in names]
        mask = visible(stage, x, rows, p.geom).transpose(0, 1)
        mask = mask.repeat_interleave(p.q.shape[1] // len(mask), 0)
        dead = ~mask[0].any(-1)
        mask = mask | dead[None, :, None]  # torch has no rows without keys
        q, k, v = map(heads_first, leaves)
        whole = heads_first(F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True))
        whole = whole.masked_fill(dead[:, None, None], 0)
        grad_out = torch.zeros_like(whole)
        grad_out[p.rows] = torch.randn_like(grad_out[p.rows])
        out, grads = expected(stage, p, grad_out[p.rows])
        torch.testing.assert_close(out, whole[p.rows].detach(), rtol=1e-4, atol=1e-5)
        step = torch.autograd.grad(whole, leaves, grad_out)
        for name, wanted in zip(names, step, strict=True):
            wanted = wanted[p.rows] if name == "q" else wanted
            torch.testing.assert_close(grads[name], wanted, rtol=1e-4, atol=1e-5)
        assert dead.sum() == (p.geom.l - 1 if stage == "cmp" else 0)
    assert p.lse is not None
    assert p.lse[: p.geom.l - 1].eq(-math.inf).all() and p.lse[p.geom.l - 1 :].isfinite().all()


def check_indices(p: Problem) -> None:
    """Every index convention covers the same tokens, and views and padding come back."""
    rows, tokens = torch.arange(len(p.q)), {"k": p.k, "ids": p.chosen}
    for filler in (-1, p.blocks):
        packed = ids_to_hsn(p.chosen, filler)
        back = packed.masked_fill(packed == filler, -1).transpose(0, 1)
        assert packed.is_contiguous() and back.equal(p.chosen)
    ids, keep = map(heads_first, Lucidrains.indices(p))
    own = (rows // p.geom.m)[:, None, None]
    assert not (keep & (ids == own)).any() and ids.min() >= 0
    with_own = torch.cat([ids.masked_fill(~keep, -1), own.expand(-1, ids.shape[1], -1)], -1)
    covered = (visible("slc", tokens | {"ids": i}, rows, p.geom) for i in (with_own, p.chosen))
    assert next(covered).equal(next(covered))
    assert heads_first(heads_first(p.v)).equal(p.v)
    assert equal_dims(lambda q, k, v: v)(p.q, p.k, p.v).equal(p.v)


@torch.no_grad()
def check_flex(p: Problem) -> None:
    """FlexAttention's masks; its backward does not run on a CPU."""
    for stage, call in (("dense", Flex("cpu").dense(p)), ("window", Flex("cpu").window(p))):
        out = call(p.q, p.k, p.v)[p.rows]
        torch.testing.assert_close(out, expected(stage, p)[0], rtol=1e-4, atol=1e-5)
    for tokens in (128, 129, 1030):
        for window in (1, 80, 127, 128, 129, 512, tokens):
            check_block_mask(tokens, window)


def check_block_mask(tokens: int, window: int) -> None:
    """The blocks that edges say are empty, full or mixed, against every pair of tokens."""

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i - window < j)

    quick = causal_blocks(tokens, window, seen, torch.device("cpu"))
    slow = create_block_mask(seen, None, None, tokens, tokens, "cpu")
    assert quick.seq_lengths == slow.seq_lengths
    for name in ("kv", "full_kv", "q", "full_q"):
        counts, lists = (
            [getattr(mask, f"{name}_{what}")[0, 0].tolist() for mask in (quick, slow)]
            for what in ("num_blocks", "indices")
        )
        pairs = zip(*counts, *lists, strict=True)
        assert all(n == m and set(x[:n]) == set(y[:m]) for n, m, x, y in pairs), (tokens, window)


def check_refusals(p: Problem) -> None:
    """The checks must be able to fail."""
    out, _ = expected("slc", p)
    assert compare(out, out)["rel_l2"] == 0 and compare(out.roll(1, 0), out)["rel_l2"] > 0.1
    assert compare(out.index_fill(0, torch.tensor([1]), math.nan), out)["nonfinite"] > 0
    assert compare_selection(p.chosen, p) == {"mass": 1.0, "same": 1.0, "illegal": 0}
    for slot, change in ((-1, p.blocks - 1), (0, -1), (1, 0)):  # future, forced missing, repeated
        wrong = p.chosen.clone()
        wrong[..., slot] = change
        assert compare_selection(wrong, p)["illegal"] > 0
    clear = decided(p)
    assert clear[p.rows < p.geom.n * p.geom.m].all() and not clear.all()
    worse = p.chosen.clone()
    worse[..., 1] = -1
    assert compare_selection(worse, p)["mass"] < 0.9


def check_pages(c: Decode) -> None:
    cache = paged(c)
    for pages, *sources in ((cache.k_pages, c.k, c.k_cmp), (cache.v_pages, c.v, c.v_cmp)):
        for table, source in zip((cache.raw_table, cache.cmp_table), sources, strict=True):
            assert pages[table.long()].flatten(1, 2)[:, : source.shape[1]].equal(source)
    assert cache.k_pages.flatten(0, 1)[cache.newest_slot.long()].equal(c.k_cmp[:, -1])
    assert all(decided(c.sequence(b)).all() for b in range(len(c.q)))
    used = torch.cat([cache.raw_table, cache.cmp_table], 1).flatten()
    assert used.unique().numel() == used.numel() == len(cache.k_pages)


def check_overlap(rho: float) -> None:
    """Topics make neighbouring queries agree; without them they hardly do."""
    unions = [
        make_problem(Heads(16, 1, 64, 64), Geometry(), 4096, r, 1, *FLOAT32_CPU).unions
        for r in (0.0, rho)
    ]
    print("dry run: distinct blocks of 4 and 8 neighbours, random and correlated:", *unions)
    assert all(Geometry().n <= unions[1][width] < 0.8 * unions[0][width] for width in (4, 8))


def check_rows(rows: list[Row], complete: bool) -> None:
    """Baselines and the reference's own table must be right in every row they have."""
    known = [r for r in rows if r["peer"] in ("sdpa-math", "flash-window", "reference")]
    wrong = [row for row in known if row["status"] != "ok"]
    assert not wrong, wrong
    seen = {row["stage"] for row in known if row["peer"] == "reference"}
    assert seen == set(STAGES) or not complete
    print(f"dry run: {sum(row['status'] == 'ok' for row in rows)} of {len(rows)} rows right")


# ------------------------------------------------------------- the reference as an `--own` table


def whole(stage: str, geom: Geometry, **x: Tensor) -> Tensor:
    """A reference stage on all rows, [1, S, H, D] and differentiable."""
    single = {name: t[0] if name == "ids" else t[0].float() for name, t in x.items()}
    rows = torch.arange(len(single["q"]))
    return output(stage, single, rows, geom)[None].to(x["q"].dtype)


def newest(stage: str, c: Decode) -> Tensor:
    """A reference stage on the newest token of every sequence, [B, 1, H, D]."""
    return torch.stack([expected(stage, c.sequence(b))[0] for b in range(len(c.q))]).to(c.q.dtype)


REFERENCE = {
    "name": "reference",
    "dense": lambda q, k, v, geom: whole("dense", geom, q=q, k=k, v=v),
    "window": lambda q, k, v, geom: whole("window", geom, q=q, k=k, v=v),
    "slc": lambda q, k, v, ids, geom: whole("slc", geom, q=q, k=k, v=v, ids=ids),
    "cmp": lambda q, k_cmp, v_cmp, geom: whole("cmp", geom, q=q, k_cmp=k_cmp, v_cmp=v_cmp),
    "nsa": lambda q, k, v, gates, geom: whole("nsa", geom, q=q, k=k, v=v, gates=gates),
    "select": lambda q, k_cmp, lse, geom: select_all(q[0], k_cmp[0], geom)[0][None],
    "cmp_select": lambda q, k, v, geom: (None, select_all(q[0], k[0], geom)[0][None]),
    "dense_decode": lambda q, cache, geom: newest("dense", cache),
    "decode": lambda q, cache, gates, geom: newest("nsa", cache),
}
