"""What the specs share: checks, derived sizes, packed sequences."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nsa_neuron.spec import Bound, Return, ScalarArg, Size, TensorArg, differ

SCALE = ScalarArg("scale", "float", optional=True)
CU_SEQLENS = (
    TensorArg("cu_seqlens_q", "N1", "i32", optional=True),
    TensorArg("cu_seqlens_k", "N1", "i32", optional=True),
)
BLOCK = ScalarArg("block", symbol="l", minimum=1)
STRIDE = ScalarArg("stride", symbol="d", minimum=1)
SELECT_BLOCK = ScalarArg("select_block", symbol="m", minimum=1)
SELECTION = (
    SELECT_BLOCK,
    ScalarArg("num_selected", symbol="n", minimum=1),
    ScalarArg("num_initial", symbol="n_init", minimum=0),
    ScalarArg("num_local", symbol="n_local", minimum=1),
)
WINDOW = ScalarArg("window", symbol="w", minimum=1)
KV_LEN = ScalarArg("kv_len", symbol="T", minimum=1)
USUAL_TOKENS, USUAL_IDS = 1024, 64  # scalars up to these are never changed, see `clamp`
O_LSE = (Return("o", "B S Hq Dv"), Return("lse", "B S Hq", "stat"))


def constants(args: Sequence[TensorArg | ScalarArg]) -> tuple[TensorArg | ScalarArg, ...]:
    """The arguments of a backward op: as the forward's, but no gradient flows to them."""
    return tuple(
        TensorArg(arg.name, arg.dims, arg.dtype, arg.optional)
        if isinstance(arg, TensorArg)
        else arg
        for arg in args
    )


def compressed_blocks(tokens: Size, block: int, stride: int) -> Size:
    """Nc: complete compression blocks of `tokens` tokens (ints or SymInts)."""
    return torch.sym_max(0, (tokens - block) // stride + 1)


def selection_blocks(tokens: Size, select_block: int) -> Size:
    """Ns: selection blocks that `tokens` tokens touch."""
    return (tokens + select_block - 1) // select_block


def default_scale(scale: float | None, q: Tensor) -> float:
    """The given scale, or Dk ** -0.5."""
    return q.shape[-1] ** -0.5 if scale is None else float(scale)


@dataclass(frozen=True)
class Segment:
    """One sequence: its query rows, its key rows, and where its queries start in it.

    `offset` is the absolute position of its first query: queries are the last of its keys.
    """

    queries: slice
    keys: slice
    offset: int

    @property
    def tokens(self) -> int:
        """T of this sequence."""
        return int(self.keys.stop - self.keys.start)


def segments(
    q_len: int, kv_len: int, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> Iterator[Segment]:
    """The sequences of a call; one that spans everything if it is not packed."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        yield Segment(slice(0, q_len), slice(0, kv_len), kv_len - q_len)
        return
    q_edges, k_edges = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(q_edges) - 1):
        queries, keys = slice(q_edges[i], q_edges[i + 1]), slice(k_edges[i], k_edges[i + 1])
        yield Segment(queries, keys, (keys.stop - keys.start) - (queries.stop - queries.start))


def compressed_slices(segs: list[Segment], block: int, stride: int) -> list[slice]:
    """Where each sequence's compressed blocks lie: back to back, in order."""
    slices, start = [], 0
    for seg in segs:
        count = max(0, (seg.tokens - block) // stride + 1)
        slices.append(slice(start, start + count))
        start += count
    return slices


def clamp(bound: Bound) -> Bound:
    """The same call with very large scalars no larger than its tokens can tell apart.

    A window of more than T tokens is one of T, a selection block of more than T tokens holds them
    all, and more ids than there are blocks are padding. Backends get the smaller numbers, so that
    none of them allocates, or counts in 32 bits, what no call needs. Usual sizes stay, and the rest
    becomes powers of two, because kernels are compiled for each. Sizes must be ints.
    """
    sizes, scalars = dict(bound.sizes), dict(bound.scalars)
    tokens = sizes.get("T") or sizes.get("most_slc", 0) * sizes.get("page_slc", 0)
    if not tokens:
        return bound
    if "m" in sizes:
        step = sizes.get("d", 1)
        enough = _enough(max(tokens, sizes.get("l", 1)), USUAL_TOKENS)
        sizes["m"] = min(sizes["m"], -(-enough // step) * step)
    if "w" in sizes:
        sizes["w"] = min(sizes["w"], _enough(tokens, USUAL_TOKENS))
    given_ids = any("n" in arg.forms[0] for arg in bound.spec.tensors)
    if "n" in sizes and "n_local" in sizes and not given_ids:
        most = max(sizes["n_init"] + sizes["n_local"], selection_blocks(tokens, sizes["m"]))
        sizes["n"] = min(sizes["n"], _enough(most, USUAL_IDS))
    for arg in bound.spec.scalars:
        if arg.symbol in ("m", "w", "n"):
            scalars[arg.name] = sizes[arg.symbol]
    return bound if scalars == bound.scalars else replace(bound, sizes=sizes, scalars=scalars)


def _enough(needed: int, usual: int) -> int:
    """The power of two from `needed` on, at least `usual`."""
    return max(usual, 1 << (needed - 1).bit_length())


def check_heads(bound: Bound) -> None:
    """Hq must be a multiple of Hkv."""
    if bound["Hq"] % bound["Hkv"] != 0:
        found = f"with {bound['Hq']} heads"
        raise bound.spec.refuse("q", found, f"a multiple of the {bound['Hkv']} kv heads")


def check_tokens(bound: Bound) -> None:
    """Queries are the last S of the T tokens, so T >= S; packed input has B == 1."""
    spec, sizes = bound.spec, bound.sizes
    if sizes["T"] < sizes["S"]:
        keys = (arg.name for arg in spec.tensors if "T" in arg.forms[0])
        name = "kv_len" if "kv_len" in bound.scalars else next(keys)
        found = f"{sizes['T']} tokens long"
        raise spec.refuse(name, found, f"at least as long as the {sizes['S']} queries")
    check_packed(bound, ("cu_seqlens_q", "cu_seqlens_k"))


def check_packed(bound: Bound, names: tuple[str, ...]) -> None:
    """Packed calls give every offset tensor, with B == 1."""
    given = [name for name in names if name in bound.shapes]
    if not given:
        return
    missing = next((name for name in names if name not in bound.shapes), None)
    if missing:
        raise bound.spec.refuse(missing, "None", f"given together with {given[0]}")
    if bound["N1"] < 2:
        found = f"of length {bound['N1']}"
        raise bound.spec.refuse(given[0], found, "of length N + 1 for N >= 1 sequences")
    if bound["B"] != 1:
        raise bound.spec.refuse(given[0], f"given with batch {bound['B']}", "used with batch 1")


def check_geometry(bound: Bound) -> None:
    """d | l, d | m, l <= m; forced blocks fit into n."""
    spec, sizes = bound.spec, bound.sizes
    l, d = sizes["l"], sizes["d"]
    if l % d:
        raise spec.refuse("stride", d, f"a divisor of block = {l}")
    if "m" not in sizes:
        return
    if sizes["m"] % d:
        raise spec.refuse("select_block", sizes["m"], f"a multiple of stride = {d}")
    if l > sizes["m"]:
        raise spec.refuse("block", l, f"at most select_block = {sizes['m']}")
    forced = sizes["n_init"] + sizes["n_local"]
    if sizes["n"] < forced:
        expected = f"at least num_initial + num_local = {forced}"
        raise spec.refuse("num_selected", sizes["n"], expected)


def check_compressed(bound: Bound) -> None:
    """k_cmp has the blocks of kv_len tokens (packed: checked by value, see `check_cmp_rows`)."""
    check_geometry(bound)
    blocks = compressed_blocks(bound["T"], bound["l"], bound["d"])
    if "cu_seqlens_q" not in bound.shapes and differ(bound["Nc"], blocks):
        found = f"of {bound['Nc']} compressed blocks"
        expected = (
            f"of {blocks}, those of {bound['T']} tokens (block {bound['l']}, stride {bound['d']})"
        )
        raise bound.spec.refuse("k_cmp", found, expected)


def check_offsets(bound: Bound, values: Mapping[str, Any]) -> None:
    """cu_seqlens start at 0, grow, end at the token count, and T_i >= S_i."""
    spec = bound.spec
    edges = {}
    for name, symbol in (("cu_seqlens_q", "S"), ("cu_seqlens_k", "T")):
        if values.get(name) is None:
            continue
        row = edges[name] = values[name].tolist()
        if row[0] != 0:
            raise spec.refuse(name, f"starting with {row[0]}", "starting with 0")
        if any(b <= a for a, b in itertools.pairwise(row)):
            raise spec.refuse(name, row, "strictly increasing (no empty sequence)")
        if row[-1] != bound[symbol]:
            raise spec.refuse(
                name, f"ending with {row[-1]}", f"ending with {symbol} = {bound[symbol]}"
            )
    if len(edges) == 2:
        q, k = edges.values()
        for i in range(len(q) - 1):
            if k[i + 1] - k[i] < q[i + 1] - q[i]:
                found = f"giving sequence {i} {k[i + 1] - k[i]} keys"
                expected = f"at least as many as its {q[i + 1] - q[i]} queries"
                raise spec.refuse("cu_seqlens_k", found, expected)


def check_cmp_rows(bound: Bound, values: Mapping[str, Any]) -> None:
    """Packed compressed tensors hold every sequence's blocks."""
    check_offsets(bound, values)
    if values.get("cu_seqlens_k") is None:
        return
    edges = values["cu_seqlens_k"].tolist()
    l, d = bound["l"], bound["d"]
    need = sum(max(0, (b - a - l) // d + 1) for a, b in itertools.pairwise(edges))
    if bound["Nc"] < need:
        found = f"of {bound['Nc']} compressed blocks"
        raise bound.spec.refuse("k_cmp", found, f"of at least the {need} of the packed sequences")


def no_value_check(bound: Bound, values: Mapping[str, Any]) -> None:
    """For ops whose arguments hold no indices."""


def no_derived_sizes(bound: Bound) -> None:
    """For ops whose sizes all come from their tensors."""


def visible_pairs(bound: Bound, per_row: int) -> int:
    """Counts (query, key) pairs where a query at t sees min(per_row, t + 1) keys.

    Assumes one sequence per batch row; exact for unpacked calls.
    """
    s, t = int(bound["S"]), int(bound["T"])

    def of_the_first(queries: int) -> int:
        growing = min(queries, per_row)
        return growing * (growing + 1) // 2 + (queries - growing) * per_row

    return (of_the_first(t) - of_the_first(t - s)) * int(bound["B"])


def attention_flops(bound: Bound, pairs: int) -> int:
    """QK and PV matmuls of every query head over `pairs` (query, key) pairs."""
    return 2 * pairs * int(bound["Hq"]) * (int(bound["Dk"]) + int(bound["Dv"]))


def tensor_bytes(bound: Bound) -> int:
    """Every given tensor once and every result once."""
    size = bound.dtype.itemsize
    ids = {arg.name: 4 for arg in bound.spec.tensors if arg.dtype == "i32"}
    read = sum(_count(shape) * ids.get(name, size) for name, shape in bound.shapes.items())
    return read + sum(_count(shape) * dtype.itemsize for _, shape, dtype in bound.returns())


def _count(shape: tuple[Size, ...]) -> int:
    total = 1
    for size in shape:
        total *= int(size)
    return total
