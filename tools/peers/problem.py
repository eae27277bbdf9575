"""Inputs that every implementation shares, and the float32 reference of every stage.

One sequence, without a batch axis: q [S, Hq, Dk], k [T, Hkv, Dk], v [T, Hkv, Dv], k_cmp [Nc, Hkv,
Dk], v_cmp [Nc, Hkv, Dv], gates [S, Hq, 3] (logits; compressed, selected, window), ids [S, Hkv, n]
int32 block ids, ascending, right-padded with -1. The queries are the last S of the T tokens, and
query head h reads kv head h // G, G = Hq / Hkv. `rows` [R] are absolute query positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GRADS = {  # differentiable inputs of each stage, in the order in which they are passed
    "dense": ("q", "k", "v"),
    "nsa": ("q", "k", "v", "gates"),
    "slc": ("q", "k", "v"),
    "cmp": ("q", "k_cmp", "v_cmp"),
    "window": ("q", "k", "v"),
}
ROW_INPUTS = ("q", "gates", "ids")
CHUNK_ELEMENTS = 2**28  # logits that the reference holds at once
LONG = 2**18  # tokens above which the reference computes only the checked rows
UNION_GROUPS = 2**13  # groups of neighbours whose blocks are counted
HIDDEN = -1e30  # logit of an invisible key; finite, so that a row without keys has no NaN


@dataclass(frozen=True)
class Geometry:
    """NSA's block structure, in tokens and blocks."""

    l: int = 32  # compression block
    d: int = 16  # compression stride
    m: int = 64  # selection block
    n: int = 16  # selected blocks, the forced ones included
    w: int = 512  # window, the query's own token included
    init: int = 1  # forced blocks at the start of the sequence
    local: int = 2  # forced blocks that end with the query's own

    def num_cmp(self, tokens: int) -> int:
        return max(0, (tokens - self.l) // self.d + 1)

    def num_slc(self, tokens: int) -> int:
        return -(-tokens // self.m)


class Heads(NamedTuple):
    """Query heads / kv heads / query-key dim / value dim, as in `64/4/192/128`."""

    q: int
    kv: int
    dk: int
    dv: int

    @classmethod
    def parse(cls, text: str) -> Heads:
        return cls(*map(int, text.split("/")))

    def __str__(self) -> str:
        return "/".join(map(str, self))


@dataclass
class Problem:
    """One sequence; `rows` are the query positions at which results are checked."""

    geom: Geometry
    q: Tensor
    k: Tensor
    v: Tensor
    k_cmp: Tensor
    v_cmp: Tensor
    gates: Tensor
    rows: Tensor
    ids: Tensor | None = None
    lse: Tensor | None = None  # of the compressed scores, natural log, [S, Hq] float32
    unions: dict[int, float] = field(default_factory=dict)

    @property
    def scale(self) -> float:
        return float(self.q.shape[-1] ** -0.5)

    @property
    def blocks(self) -> int:
        return self.geom.num_slc(len(self.k))

    @property
    def chosen(self) -> Tensor:
        """`ids`, which every problem has but a decode step's."""
        assert self.ids is not None
        return self.ids

    def recompressed(self, **change: int) -> Problem:
        """The same problem with another compression geometry (and no lse for it)."""
        geom = replace(self.geom, **change)
        k_cmp, v_cmp = (pool(x.float(), geom).to(x.dtype) for x in (self.k, self.v))
        return replace(self, geom=geom, k_cmp=k_cmp, v_cmp=v_cmp, lse=None)


# ------------------------------------------------------------------------------------- reference


def pool(x: Tensor, geom: Geometry) -> Tensor:
    """Mean compression [T, H, D] -> [Nc, H, D]; incomplete blocks do not exist."""
    return x.unfold(0, geom.l, geom.d).mean(-1)


def count_blocks(ids: Tensor, blocks: int) -> Tensor:
    """How often each block occurs in ids [R, Hkv, n]: [R, Hkv, blocks] int32, bad ids ignored."""
    safe = ids.long().masked_fill((ids < 0) | (ids >= blocks), blocks)
    count = torch.zeros(*ids.shape[:2], blocks + 1, dtype=torch.int32, device=ids.device)
    return count.scatter_add_(2, safe, torch.ones_like(safe, dtype=count.dtype))[..., :blocks]


def visible(stage: str, x: dict[str, Tensor], rows: Tensor, geom: Geometry) -> Tensor:
    """Which keys each row sees, [R, 1 or Hkv, T] bool."""
    keys = len(x["k_cmp" if stage == "cmp" else "k"])
    key, own = torch.arange(keys, device=rows.device), rows[:, None, None]
    if stage == "cmp":
        return key * geom.d + geom.l - 1 <= own  # complete blocks
    seen = key <= own
    if stage == "window":
        seen = seen & (key > own - geom.w)
    if stage == "slc":
        chosen = count_blocks(x["ids"], geom.num_slc(keys)) > 0
        seen = seen & chosen.repeat_interleave(geom.m, -1)[..., :keys]
    return seen


def probabilities(q: Tensor, k: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over visible keys [R, Hkv, G, T] and natural-log lse [R, Hq] (-inf without keys)."""
    logits = torch.einsum("rhgd,thd->rhgt", q.unflatten(1, (k.shape[1], -1)), k)
    seen = seen[:, :, None]
    logits = (logits * q.shape[-1] ** -0.5).masked_fill(~seen, HIDDEN)
    lse = logits.logsumexp(-1).masked_fill(~seen.any(-1), -math.inf)
    return logits.softmax(-1) * seen, lse.flatten(1)


def importance(
    q: Tensor, k_cmp: Tensor, rows: Tensor, blocks: int, geom: Geometry
) -> tuple[Tensor, Tensor]:
    """Importance of every selection block [R, Hkv, blocks], and lse [R, Hq].

    Probabilities are summed over the heads of a group and over compressed blocks i, weighted by
    |tokens(i) ∩ tokens(j)| / d.
    """
    p, lse = probabilities(q, k_cmp, visible("cmp", {"k_cmp": k_cmp}, rows, geom))
    i = torch.arange(len(k_cmp), device=q.device)[:, None] * geom.d
    j = torch.arange(blocks, device=q.device) * geom.m
    shared = torch.minimum(i + geom.l, j + geom.m) - torch.maximum(i, j)
    return p.sum(2) @ (shared.clamp(min=0).float() / geom.d), lse


def forced_and_future(rows: Tensor, blocks: int, geom: Geometry) -> tuple[Tensor, Tensor]:
    """Blocks that must be selected and blocks that must not, [R, 1, blocks] bool each."""
    block, own = torch.arange(blocks, device=rows.device), (rows // geom.m)[:, None, None]
    return ((block < geom.init) | (block > own - geom.local)) & (block <= own), block > own


def select(scores: Tensor, rows: Tensor, geom: Geometry) -> Tensor:
    """Top-n of scores [R, Hkv, blocks] as ids [R, Hkv, n]; the lowest id wins ties."""
    blocks = scores.shape[-1]
    forced, future = forced_and_future(rows, blocks, geom)
    ranked = scores.masked_fill(forced, math.inf).masked_fill(future, -math.inf)
    best, ids = (t[..., : geom.n] for t in ranked.sort(dim=-1, descending=True, stable=True))
    ids = ids.masked_fill(best == -math.inf, blocks).sort(-1).values
    ids = F.pad(ids, (0, geom.n - ids.shape[-1]), value=blocks)
    return ids.masked_fill(ids == blocks, -1).int()


def select_all(q: Tensor, k_cmp: Tensor, geom: Geometry) -> tuple[Tensor, Tensor]:
    """Selection of every query of a sequence: ids [S, Hkv, n] and lse [S, Hq]."""
    k_cmp, parts = k_cmp.float(), []
    for rows in torch.arange(len(q), device=q.device).split(chunk_rows(q.shape[1], len(k_cmp))):
        reach = max(1, geom.num_cmp(int(rows[-1]) + 1))  # no later block is visible to this chunk
        blocks = geom.num_slc(len(q))
        scores, lse = importance(q[rows].float(), k_cmp[:reach], rows, blocks, geom)
        parts.append((select(scores, rows, geom), lse))
    ids, statistics = zip(*parts, strict=True)
    return torch.cat(ids), torch.cat(statistics)


def output(stage: str, x: dict[str, Tensor], rows: Tensor, geom: Geometry) -> Tensor:
    """o [R, Hq, Dv] of a stage; row inputs hold the R rows only, the others are whole."""
    if stage == "nsa":
        x = x | {"k_cmp": pool(x["k"], geom), "v_cmp": pool(x["v"], geom)}
        with torch.no_grad():
            blocks = geom.num_slc(len(x["k"]))
            x["ids"] = select(importance(x["q"], x["k_cmp"], rows, blocks, geom)[0], rows, geom)
        branches = [output(branch, x, rows, geom) for branch in ("cmp", "slc", "window")]
        return (torch.stack(branches, -1) * x["gates"].sigmoid()[:, :, None]).sum(-1)
    k, v = ("k_cmp", "v_cmp") if stage == "cmp" else ("k", "v")
    p, _ = probabilities(x["q"], x[k], visible(stage, x, rows, geom))
    return torch.einsum("rhgt,thd->rhgd", p, x[v]).flatten(1, 2)


def chunk_rows(heads: int, keys: int) -> int:
    return max(1, CHUNK_ELEMENTS // (heads * max(keys, 1)))


def expected(
    stage: str, p: Problem, grad_out: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Reference output [R, Hq, Dv] at p.rows, and gradients for grad_out [R, Hq, Dv] there.

    Gradients of row inputs are given at those rows only; the others are complete when the real
    grad_out is zero at every other row.
    """
    x = {}
    for name in GRADS[stage] + (("ids",) if stage == "slc" else ()):
        tensor = getattr(p, name)
        x[name] = tensor[p.rows - (len(p.k) - len(p.q))] if name in ROW_INPUTS else tensor
        if tensor.is_floating_point():
            x[name] = x[name].float().requires_grad_(grad_out is not None)
    out, grads = [], [torch.zeros_like(x[name]) for name in GRADS[stage]]
    every = torch.arange(len(p.rows), device=p.rows.device)
    for part in every.split(chunk_rows(p.q.shape[1], len(p.k))):
        chunk = x | {name: x[name][part] for name in x if name in ROW_INPUTS}
        o = output(stage, chunk, p.rows[part], p.geom)
        out.append(o.detach())
        if grad_out is not None:
            step = torch.autograd.grad(o, [x[name] for name in GRADS[stage]], grad_out[part])
            grads = [total + new for total, new in zip(grads, step, strict=True)]
    return torch.cat(out), dict(zip(GRADS[stage], grads, strict=True))


# ------------------------------------------------------------------------------------ generators


def correlate(q: Tensor, k: Tensor, rho: float, gen: torch.Generator) -> None:
    """Gives standard normal q and k topics, in place.

    The sequence becomes documents of 256 to 768 tokens, each about one of 16 topics; a topic is a
    standard normal vector per kv head, and x becomes sqrt(rho) * topic + sqrt(1 - rho) * x, so
    elements keep unit variance. Before the softmax a query scores the documents of its topic
    higher by rho * sqrt(Dk), hence neighbouring queries agree on most blocks.
    """
    device, seq = gen.device, len(q)
    ends = torch.randint(256, 768, (seq,), generator=gen, device=device).cumsum(0)
    document = torch.searchsorted(ends, torch.arange(seq, device=device), right=True)
    topic = torch.randint(16, (seq,), generator=gen, device=device)[document]
    vectors = torch.randn(16, *k.shape[1:], generator=gen, device=device)
    for x in (q, k):
        for h in range(x.shape[1]):
            shared = vectors[topic, h * k.shape[1] // x.shape[1]]
            x[:, h].mul_((1 - rho) ** 0.5).add_(shared, alpha=rho**0.5)


def neighbour_union(ids: Tensor, width: int, blocks: int) -> float:
    """Mean number of distinct blocks that `width` adjacent queries select.

    Only groups whose queries all have n blocks count; `nan` when there is none.
    """
    groups = ids[: len(ids) // width * width].unflatten(0, (-1, width)).transpose(1, 2).flatten(2)
    groups = groups[:: -(-len(groups) // UNION_GROUPS) or 1]
    distinct = (count_blocks(groups, blocks) > 0).sum(-1)
    return distinct[(groups >= 0).all(-1)].float().mean().item()


def sample_rows(seq: int, geom: Geometry, count: int, gen: torch.Generator) -> Tensor:
    """Sorted positions: the edges of the geometry, the ends, random ones up to `count`."""
    edges = {0, seq - 1}
    for edge in (geom.l - 1, geom.m, 2 * geom.m, geom.w, geom.n * geom.m):
        edges |= {edge - 1, edge}
    kept = torch.tensor([e for e in edges if e < seq], device=gen.device)
    drawn = torch.randperm(seq, generator=gen, device=gen.device)[: max(0, count - len(kept))]
    rows: Tensor = torch.cat([kept, drawn]).unique()
    return rows


def random_ids(seq: int, kv_heads: int, geom: Geometry, gen: torch.Generator) -> Tensor:
    """Legal block ids [S, Hkv, n] that depend on no score: the forced ones and random others."""
    own = (torch.arange(seq, device=gen.device) // geom.m)[:, None, None].expand(-1, kv_heads, 1)
    free = geom.n - geom.init - geom.local
    drawn = torch.rand(seq, kv_heads, free, generator=gen, device=gen.device)
    drawn = (drawn * (own + 1)).long()
    first = torch.arange(geom.init, device=gen.device).expand(seq, kv_heads, -1)
    last = own - torch.arange(geom.local, device=gen.device)
    never = geom.num_slc(seq)  # sorts behind every block
    ids = torch.cat([first, last, drawn], -1)
    ids = ids.masked_fill((ids < 0) | (ids > own), never).sort(-1).values
    repeated = F.pad(ids[..., 1:] == ids[..., :-1], (1, 0))
    ids = ids.masked_fill(repeated, never).sort(-1).values
    return ids.masked_fill(ids == never, -1).int()


def make_problem(
    heads: Heads, geom: Geometry, seq: int, rho: float, count: int, dtype: torch.dtype, device: str
) -> Problem:
    """A training or prefill problem; rho = 0 makes q and k independent standard normals.

    The block ids are the reference's selection, so they are valid and causal; about `count` rows
    are checked. Above `LONG` tokens selecting for every row by the reference would take minutes:
    the ids are then random legal ones, and there is no lse.
    """
    gen = torch.Generator(device).manual_seed(seq)
    sizes = ((heads.q, heads.dk), (heads.kv, heads.dk), (heads.kv, heads.dv), (heads.q, 3))
    tensors = [torch.randn(seq, *size, generator=gen, device=device) for size in sizes]
    if rho > 0:
        correlate(tensors[0], tensors[1], rho, gen)
    q, k, v, gates = (t.to(dtype) for t in tensors)
    k_cmp, v_cmp = (pool(x.float(), geom).to(dtype) for x in (k, v))
    ids, lse = (
        (random_ids(seq, heads.kv, geom, gen), None) if seq > LONG else select_all(q, k_cmp, geom)
    )
    unions = {width: neighbour_union(ids, width, geom.num_slc(seq)) for width in (4, 8)}
    rows = sample_rows(seq, geom, count, gen)
    return Problem(geom, q, k, v, k_cmp, v_cmp, gates, rows, ids, lse, unions)


# ---------------------------------------------------------------------------------------- decode


@dataclass
class Decode:
    """The newest token of B sequences with complete caches: q [B, Hq, Dk], gates [B, Hq, 3], and
    k, v, k_cmp, v_cmp as in a `Problem` behind a batch axis."""

    geom: Geometry
    q: Tensor
    k: Tensor
    v: Tensor
    k_cmp: Tensor
    v_cmp: Tensor
    gates: Tensor

    @property
    def scale(self) -> float:
        return float(self.q.shape[-1] ** -0.5)

    def sequence(self, b: int) -> Problem:
        """One of the sequences as a problem with a single query."""
        rows = torch.tensor([self.k.shape[1] - 1], device=self.q.device)
        k, v, k_cmp, v_cmp = (t[b] for t in (self.k, self.v, self.k_cmp, self.v_cmp))
        return Problem(self.geom, self.q[b, None], k, v, k_cmp, v_cmp, self.gates[b, None], rows)

    def recompressed(self, **change: int) -> Decode:
        return replace(self, geom=replace(self.geom, **change))  # raw caches only


AnyProblem = Problem | Decode


def make_decode(
    heads: Heads, geom: Geometry, batch: int, tokens: int, dtype: torch.dtype, device: str
) -> Decode:
    """Normal inputs, but for as many blocks as are free to select: these lie towards the query, far
    ahead of the rest, so that the selection does not hang on near-ties."""
    gen = torch.Generator(device).manual_seed(tokens)
    sizes = ((heads.q, heads.dk), (tokens, heads.kv, heads.dk), (tokens, heads.kv, heads.dv))
    q, k, v, gates = (
        torch.randn(batch, *size, generator=gen, device=device, dtype=dtype)
        for size in (*sizes, (heads.q, 3))
    )
    towards = q.unflatten(1, (heads.kv, -1)).mean(2, keepdim=True).transpose(1, 2)
    free, blocks = geom.n - geom.init - geom.local, geom.num_slc(tokens)
    for block in range(geom.init, blocks - geom.local, max(1, blocks // max(1, free)))[:free]:
        k[:, block * geom.m : (block + 1) * geom.m] += 4 * towards
    k_cmp, v_cmp = (torch.stack([pool(s.float(), geom).to(dtype) for s in x]) for x in (k, v))
    return Decode(geom, q, k, v, k_cmp, v_cmp, gates)


class PagedCache(NamedTuple):
    """Raw and compressed keys and values in one pool of pages, in shuffled order."""

    k_pages: Tensor  # [P, page, Hkv, Dk]
    v_pages: Tensor  # [P, page, Hkv, Dv]
    raw_table: Tensor  # page ids of each sequence, [B, pages] int32
    cmp_table: Tensor  # the same for compressed keys and values
    newest_slot: Tensor  # page id * page + offset of the last compressed block, [B] int32


def paged(c: Decode, page: int = 128) -> PagedCache:
    newest, tokens = c.k_cmp.shape[1] - 1, c.k.shape[1]
    raw, cmp = -(-tokens // page), newest // page + 1
    order = torch.randperm(len(c.q) * (raw + cmp), device=c.q.device).view(-1, raw + cmp)
    raw_table, cmp_table = order.split([raw, cmp], 1)

    def pages(full: Tensor, compressed: Tensor) -> Tensor:
        out = full.new_zeros(order.numel(), page, *full.shape[2:])
        for table, source in ((raw_table, full), (cmp_table, compressed)):
            rest = table.shape[1] * page - source.shape[1]
            for ids, sequence in zip(table, source, strict=True):
                out[ids] = F.pad(sequence, (0, 0, 0, 0, 0, rest)).unflatten(0, (-1, page))
        return out

    slot = cmp_table[:, newest // page] * page + newest % page
    tables = (t.int().contiguous() for t in (raw_table, cmp_table, slot))
    return PagedCache(pages(c.k, c.k_cmp), pages(c.v, c.v_cmp), *tables)
