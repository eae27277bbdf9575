"""One adapter per implementation.

A method named after a stage takes a `Problem` (a `Decode` in decode stages) and returns the call
that is timed: a function of the stage's differentiable inputs (`GRADS`), else of nothing. What a
caller could do once (index conversion, paging) happens before; what a training or decode step would
repeat happens inside the call, and so do views into an implementation's own layout.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from tools.peers.problem import GRADS, AnyProblem, Decode, Problem, paged

if TYPE_CHECKING:
    from pathlib import Path

STAGES = (*GRADS, "select", "cmp_select", "dense_decode", "decode")
Call = Callable[..., Tensor]

PADDED, FUSED = "v zero-padded where Dk != Dv", "includes the compressed attention"
BLOCKS, WINDOW = "l = d = m, a quarter of the compressed keys", "window by torch's flash kernel"
CUBED = "scores cubed in fp16"
NOTES = {  # what sets an implementation's row apart from the others', by name and stage
    "sdpa-flash": {"dense": PADDED, "dense_decode": PADDED},
    "flash-window": {"window": PADDED},
    "fla": {"cmp": BLOCKS, "select": BLOCKS, "nsa": f"{BLOCKS}; {WINDOW}"}
    | {"decode": f"{BLOCKS}; compresses the whole cache at each step; window by SDPA"},
    "sfnsa": {"select": CUBED, "nsa": f"{CUBED}; {WINDOW}"}
    | {"decode": "pages of 128; appends the newest compressed block"},
    "xunhao": {"slc": PADDED, "cmp": PADDED, "cmp_select": FUSED, "nsa": f"{PADDED}; {WINDOW}"}
    | {"decode": f"{PADDED}; contiguous cache, window kept apart"},
    "fsa": {"slc": PADDED},
    "lucidrains": {"slc": "fp16 inside; the query's own block by its causal part"},
}


def heads_first(t: Tensor) -> Tensor:
    """[S, H, D] <-> [1, H, S, D], a view."""
    return t.transpose(1, 2)[0] if t.dim() == 4 else t[None].transpose(1, 2)


def equal_dims(call: Call) -> Call:
    """`call` for implementations that need Dk = Dv: v zero-padded to Dk, the output cut back."""

    def padded(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        dv = v.shape[-1]
        if dv == q.shape[-1]:
            return call(q, k, v, *rest)
        return call(q, k, F.pad(v, (0, q.shape[-1] - dv)), *rest)[..., :dv]

    return padded


def ids_to_hsn(ids: Tensor, filler: int = -1) -> Tensor:
    """[S, Hkv, n] padded with -1 -> contiguous [Hkv, S, n] padded with `filler`."""
    return ids.masked_fill(ids < 0, filler).transpose(0, 1).contiguous()


class Peer:
    """An implementation; its stages are the methods named after them."""

    name = ""

    def stages(self) -> dict[str, Callable[..., Call]]:
        return {stage: getattr(self, stage) for stage in STAGES if hasattr(self, stage)}

    def view(self, p: AnyProblem) -> AnyProblem:
        """The problem as this implementation understands it."""
        return p

    def load(self, folder: Path, module: str) -> types.ModuleType:
        """A module of somebody else's repository, which is not installed."""
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
        return importlib.import_module(module)


# ------------------------------------------------------------------- dense attention and windows


@equal_dims
def window(q: Tensor, k: Tensor, v: Tensor, w: int) -> Tensor:
    """Causal window of w tokens by torch's flash kernel; by a masked product on a CPU."""
    seq = len(q)
    if not q.is_cuda:
        i = torch.arange(seq)
        mask = (i <= i[:, None]) & (i > i[:, None] - w)
        q, k, v = map(heads_first, (q, k, v))
        return heads_first(F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True))
    from torch.nn.attention.varlen import varlen_attn

    cu = torch.arange(2, dtype=torch.int32, device=q.device) * seq
    o: Tensor = varlen_attn(q, k, v, cu, cu, seq, seq, window_size=(w - 1, 0))  # type: ignore[assignment]  # lse only if asked for
    return o


class FlashWindow(Peer):
    """torch's flash kernel with a window."""

    name = "flash-window"

    def window(self, p: Problem) -> Call:
        return lambda q, k, v: window(q, k, v, p.geom.w)


class Sdpa(Peer):
    """torch scaled_dot_product_attention with one backend."""

    def __init__(self, name: str, backend: SDPBackend) -> None:
        self.name, self.backend = f"sdpa-{name}", backend

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        with sdpa_kernel(self.backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    def dense(self, p: Problem) -> Call:
        def call(*x: Tensor) -> Tensor:
            q, k, v = map(heads_first, x)
            return heads_first(self._attend(q, k, v, causal=True))

        return equal_dims(call) if self.backend is SDPBackend.FLASH_ATTENTION else call

    def dense_decode(self, c: Decode) -> Call:
        k, v, dv = c.k.transpose(1, 2), c.v.transpose(1, 2), c.v.shape[-1]
        if self.backend is SDPBackend.FLASH_ATTENTION:
            v = F.pad(v, (0, k.shape[-1] - dv))
        return lambda: self._attend(c.q[:, :, None], k, v, causal=False)[:, :, 0, :dv]


def causal_blocks(
    tokens: int, window: int, mask_mod: Callable[..., Tensor], device: torch.device
) -> BlockMask:
    """FlexAttention's block mask of a causal window of `window` tokens.

    `create_block_mask` evaluates the mask at every pair of tokens, 4 GB per intermediate at 64K
    tokens and 17 GB at 128K; which blocks of 128 are empty or full follows from their edges.
    """
    size = 128
    first = torch.arange(0, tokens, size, device=device)
    last = first + size - 1
    q_first, q_last, k_first, k_last = first[:, None], last[:, None], first, last
    some = (k_first <= q_last) & (k_last > q_first - window)
    full = some & (k_last <= q_first) & (k_first > q_last - window)
    full &= (q_last < tokens) & (k_last < tokens)  # FlexAttention masks what the end cuts off
    lists = []
    for blocks in (some & ~full, full):
        order = blocks.int().argsort(dim=1, descending=True, stable=True)
        lists.append((blocks.sum(1).int()[None, None], order.int()[None, None]))
    (count, ids), (full_count, full_ids) = lists
    return BlockMask.from_kv_blocks(
        count, ids, full_count, full_ids, size, mask_mod, (tokens, tokens)
    )


class Flex(Peer):
    """torch FlexAttention, compiled on a GPU."""

    name = "flex"

    def __init__(self, device: str) -> None:
        torch._dynamo.config.recompile_limit = 256  # one specialisation per shape and mask
        torch._functorch.config.donated_buffer = False  # backward is timed on a retained graph
        compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
        self.attend = flex_attention if device == "cpu" else compiled

    def _masked(self, p: Problem, mask_mod: Callable[..., Tensor], window: int) -> Call:
        mask = causal_blocks(len(p.q), window, mask_mod, p.q.device)

        def call(*x: Tensor) -> Tensor:
            q, k, v = map(heads_first, x)
            return heads_first(self.attend(q, k, v, block_mask=mask, enable_gqa=True))

        return call

    def dense(self, p: Problem) -> Call:
        return self._masked(p, lambda b, h, i, j: i >= j, len(p.k))

    def window(self, p: Problem) -> Call:
        w = p.geom.w
        return self._masked(p, lambda b, h, i, j: (i >= j) & (i - w < j), w)

    def dense_decode(self, c: Decode) -> Call:
        k, v = c.k.transpose(1, 2), c.v.transpose(1, 2)
        return lambda: self.attend(c.q[:, :, None], k, v, enable_gqa=True)[:, :, 0]


# ---------------------------------------------------------------------------- NSA implementations


def cumulative(p: Problem, tokens: int) -> Tensor:
    """Cumulative lengths of one packed sequence."""
    return torch.tensor([0, tokens], dtype=torch.int32, device=p.q.device)


def gated(gates: Tensor, o_cmp: Tensor, o_slc: Tensor, o_win: Tensor) -> Tensor:
    """Gated sum of the branches [S, H, D], in plain torch."""
    g_cmp, g_slc, g_win = gates.sigmoid()[..., None].unbind(-2)
    return g_cmp * o_cmp + g_slc * o_slc + g_win * o_win


class Fla(Peer):
    """fla-org/flash-linear-attention, `fla.ops.nsa`: compression blocks equal selection blocks."""

    name = "fla"

    def __init__(self, folder: Path) -> None:
        self.ops = self.load(folder, "fla.ops.nsa.parallel")

    def view(self, p: AnyProblem) -> AnyProblem:
        return p.recompressed(l=p.geom.m, d=p.geom.m)

    def _cmp(self, p: Problem, *x: Tensor) -> tuple[Tensor, Tensor]:
        q, k_cmp, v_cmp = (t[None] for t in x)
        made: tuple[Tensor, Tensor] = self.ops.parallel_nsa_compression(
            q, k_cmp, v_cmp, len(p.k), p.geom.m, p.scale
        )
        return made

    def cmp(self, p: Problem) -> Call:
        return lambda *x: self._cmp(p, *x)[0][0]

    def select(self, p: Problem) -> Call:
        lse = self._cmp(p, p.q, p.k_cmp, p.v_cmp)[1]
        fixed = (p.q[None], p.k_cmp[None], len(p.k), lse, p.geom.n, p.geom.m, p.scale)
        return lambda: self.ops.parallel_nsa_topk(*fixed)[0]

    def slc(self, p: Problem) -> Call:
        attend, fixed = self.ops.ParallelNSAFunction.apply, (p.geom.n, p.geom.m, p.scale, None)
        return lambda q, k, v: attend(q[None], k[None], v[None], p.chosen[None], *fixed)[0]

    def _nsa(self, p: AnyProblem, *x: Tensor, **lengths: object) -> Tensor:
        q, k, v, gates = (t[None] for t in x)
        g_cmp, g_slc, _ = gates.sigmoid().unbind(-1)
        fixed = {"block_counts": p.geom.n, "block_size": p.geom.m, "scale": p.scale}
        o: Tensor = self.ops.parallel_nsa(q, k, v, g_cmp, g_slc, **fixed, **lengths)[0]
        return o

    def nsa(self, p: Problem) -> Call:
        def call(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
            o, o_win = self._nsa(p, q, k, v, gates), window(q, k, v, p.geom.w)
            return torch.addcmul(o, o_win, gates[..., 2:].sigmoid())

        return call

    def decode(self, c: Decode) -> Call:
        steps = torch.arange(len(c.q) + 1, dtype=torch.int32, device=c.q.device)
        cu_seqlens = (steps, steps * c.k.shape[1])
        k, v = c.k.flatten(0, 1), c.v.flatten(0, 1)
        k_win, v_win = (t[:, -c.geom.w :].transpose(1, 2) for t in (c.k, c.v))

        def call() -> Tensor:
            o = self._nsa(c, c.q, k, v, c.gates, cu_seqlens=cu_seqlens)
            o_win = F.scaled_dot_product_attention(c.q[:, :, None], k_win, v_win, enable_gqa=True)
            return torch.addcmul(o, o_win[:, :, 0], c.gates[..., 2:].sigmoid())

        return call


class Sfnsa(Peer):
    """mdy666/Scalable-Flash-Native-Sparse-Attention, `flash_nsa`."""

    name = "sfnsa"

    def __init__(self, folder: Path) -> None:
        provide_pkg_resources()
        self.attend_cmp = self.load(folder, "flash_nsa.ops.compress_attn").compress_attn
        self.pool = self.load(folder, "flash_nsa.ops.compress_kv").mean_pooling
        self.topk = self.load(folder, "flash_nsa.ops.topk").slc_topk_indices
        self.attend_slc = self.load(folder, "flash_nsa.ops.select_attn").select_attn
        self.combine = self.load(folder, "flash_nsa.ops.combine").fused_sigmoid_combine
        self.decode_step = self.load(folder, "flash_nsa.inference").nsa_decode
        self.helper = self.load(folder, "flash_nsa.utils").NSAHelper

    def view(self, p: AnyProblem) -> AnyProblem:
        """Sets the class attributes in which the library keeps geometry and lengths."""
        g = p.geom
        self.helper.set_hyperparameters(g.l, g.d, g.m, g.w - 1, g.n, g.init, g.local)
        self.helper.x_cu_seqlens = None  # drop lengths derived from another geometry
        if isinstance(p, Problem):
            self.helper.init_cu_seqlens(cumulative(p, len(p.k)))
        return p

    def cmp(self, p: Problem) -> Call:
        return lambda *x: self.attend_cmp(*x, p.scale)[0]

    def _select(self, p: Problem, q: Tensor, k_cmp: Tensor, lse: Tensor) -> Tensor:
        options = {"maybe_efficient_version": True, "scale_slc_p": True}
        ids: Tensor = self.topk(q, k_cmp, lse, p.scale, **options)[0]
        return ids

    def select(self, p: Problem) -> Call:
        lse = self.attend_cmp(p.q, p.k_cmp, p.v_cmp, p.scale)[1]
        return lambda: self._select(p, p.q, p.k_cmp, lse).transpose(0, 1)

    def slc(self, p: Problem) -> Call:
        ids = ids_to_hsn(p.chosen, filler=p.blocks)
        return lambda *x: self.attend_slc(*x, ids, p.scale)

    def nsa(self, p: Problem) -> Call:
        def call(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
            k_cmp, v_cmp = self.pool(k), self.pool(v)
            o_cmp, lse = self.attend_cmp(q, k_cmp, v_cmp, p.scale)
            o_slc = self.attend_slc(q, k, v, self._select(p, q, k_cmp, lse), p.scale)
            o: Tensor = self.combine(o_cmp, o_slc, window(q, k, v, p.geom.w).contiguous(), gates)
            return o

        return call

    def decode(self, c: Decode) -> Call:
        g, tokens, cache = c.geom, c.k.shape[1], paged(c)
        lengths = torch.full((len(c.q),), tokens, dtype=torch.int32, device=c.q.device)
        tables = (lengths, cache.raw_table, cache.newest_slot, cache.cmp_table)
        fixed = {"kernel_size": g.l, "stride": g.d, "block_size": g.m, "top_n": g.n}
        fixed |= {"num_init_blocks": g.init, "num_local_blocks": g.local, "window_size": g.w - 1}
        fixed |= {"fixed_y_maxlen": g.num_cmp(tokens), "fixed_num_slc_blocks": g.num_slc(tokens)}
        inputs = (c.q, cache.k_pages, cache.v_pages, c.gates, *tables)
        return lambda: self.decode_step(*inputs, **fixed, sm_scale=c.scale)


def provide_pkg_resources() -> None:
    """flash_nsa wants `pkg_resources.parse_version`, which recent setuptools lacks."""
    try:
        importlib.import_module("pkg_resources")
    except ModuleNotFoundError:
        stand_in = types.ModuleType("pkg_resources")
        parse = importlib.import_module("packaging.version").parse
        vars(stand_in)["parse_version"] = parse
        sys.modules["pkg_resources"] = stand_in


class Xunhao(Peer):
    """XunhaoLai/native-sparse-attention-triton, `native_sparse_attention.ops`; needs Dk = Dv."""

    name = "xunhao"

    def __init__(self, folder: Path) -> None:
        self.ops = self.load(folder, "native_sparse_attention.ops")

    def _cmp(self, p: Problem, topn: int) -> Callable[..., tuple[Tensor, Tensor]]:
        g, tokens, n_cmp = p.geom, len(p.k), len(p.k_cmp)
        lengths = (cumulative(p, tokens), cumulative(p, n_cmp), tokens, n_cmp)
        fixed = (g.l, g.d, g.m, topn, *lengths, p.scale, g.init, g.local)
        return lambda *x: self.ops.compressed_attention(*x, *fixed)

    def cmp(self, p: Problem) -> Call:
        attend = self._cmp(p, topn=0)
        return equal_dims(lambda *x: attend(*x)[0])

    def cmp_select(self, p: Problem) -> Call:
        attend = self._cmp(p, p.geom.n)
        v_cmp = F.pad(p.v_cmp, (0, p.q.shape[-1] - p.v_cmp.shape[-1]))
        return lambda: attend(p.q, p.k_cmp, v_cmp)[1].transpose(0, 1)

    def slc(self, p: Problem) -> Call:
        return self._slc(p, self.ops.topk_sparse_attention)

    def _slc(self, p: Problem, attend: Call) -> Call:
        fixed = ids_to_hsn(p.chosen), p.geom.m, cumulative(p, len(p.k)), p.scale
        return equal_dims(lambda *x: attend(*x, *fixed))

    def nsa(self, p: Problem) -> Call:
        g, cu, compressed = p.geom, cumulative(p, len(p.k)), self._cmp(p, p.geom.n)

        def call(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
            k_cmp, v_cmp = (self.ops.avgpool_compress(t, None, cu, g.l, g.d)[0] for t in (k, v))
            o_cmp, ids = compressed(q, k_cmp, v_cmp)
            o_slc = self.ops.topk_sparse_attention(q, k, v, ids, g.m, cu, p.scale)
            return gated(gates, o_cmp, o_slc, window(q, k, v, g.w))

        return equal_dims(call)

    def decode(self, c: Decode) -> Call:
        g, ops, dv = c.geom, self.ops, c.v.shape[-1]
        v, v_cmp = (F.pad(t, (0, c.k.shape[-1] - dv)) for t in (c.v, c.v_cmp))
        recent = [t[:, -g.w :].contiguous() for t in (c.k, v)]
        whole, compressed, newest = (
            torch.full((len(c.q),), t.shape[1], dtype=torch.int32, device=c.q.device)
            for t in (c.k, c.k_cmp, recent[0])
        )
        fixed = (whole, compressed, g.l, g.d, g.m, g.n, g.init, g.local, c.scale)

        def call() -> Tensor:
            o_cmp, ids = ops.compressed_attention_decode(c.q, c.k_cmp, v_cmp, *fixed)
            o_slc = ops.topk_sparse_attention_decode(c.q, c.k, v, ids, g.m, whole, c.scale)
            o_win = ops.flash_attention_decode(c.q, *recent, newest, c.scale)
            return gated(c.gates, o_cmp, o_slc, o_win)[..., :dv]

        return call


class Fsa(Xunhao):
    """Relaxed-System-Lab/Flash-Sparse-Attention: its selected attention; the rest is xunhao's."""

    name = "fsa"

    def __init__(self, folder: Path) -> None:
        self.ops = self.load(folder, "fsa.ops")

    def stages(self) -> dict[str, Callable[..., Call]]:
        return {"slc": lambda p: self._slc(p, self.ops.FSA_topk_sparse_attention)}


class Lucidrains(Peer):
    """lucidrains/native-sparse-attention-pytorch: its Triton selected attention."""

    name = "lucidrains"

    def __init__(self, folder: Path) -> None:
        package = "native_sparse_attention_pytorch.triton_native_sparse_attention"
        self.attend = self.load(folder, package).native_sparse_attend

    @staticmethod
    def indices(p: Problem) -> tuple[Tensor, Tensor]:
        """Ids and mask [1, Hkv, S, n] without the query's own block."""
        own = (torch.arange(len(p.q), device=p.q.device) // p.geom.m)[:, None, None]
        keep = (p.chosen >= 0) & (p.chosen != own)
        ids = p.chosen.long() * keep
        return heads_first(ids).contiguous(), heads_first(keep).contiguous()

    def slc(self, p: Problem) -> Call:
        fixed = (p.geom.m, *self.indices(p))
        return equal_dims(lambda *x: heads_first(self.attend(*map(heads_first, x), *fixed)))


# ------------------------------------------------------------------------------ the plug-in hook

FIXED = {"slc": ("ids",), "select": ("q", "k_cmp", "lse"), "cmp_select": GRADS["cmp"]}


class Own(Peer):
    """A table {stage: callable} in [B, S, H, D] layouts; README.md lists the signatures."""

    def __init__(self, spec: str) -> None:
        module, _, attribute = spec.partition(":")
        self.table = getattr(importlib.import_module(module), attribute)
        self.name = self.table.get("name", spec)

    def stages(self) -> dict[str, Callable[..., Call]]:
        return {s: lambda p, s=s: self._call(s, p) for s in STAGES if s in self.table}

    def _call(self, stage: str, p: AnyProblem) -> Call:
        function = self.table[stage]
        if isinstance(p, Decode):
            cache = self.table.get(f"{stage}_setup", lambda decode: decode)(p)
            gates = (p.gates[:, None],) if stage == "decode" else ()
            return lambda: function(p.q[:, None], cache, *gates, p.geom)[:, 0]
        if stage == "select" and p.lse is None:  # long problems come without
            lse = self.table["cmp"](p.q[None], p.k_cmp[None], p.v_cmp[None], p.geom)[1]
            p = replace(p, lse=lse[0])
        fixed = [getattr(p, name)[None] for name in FIXED.get(stage, ())]
        wanted = 1 if stage == "cmp_select" else 0  # of (o, lse), or of (o, ids)

        def call(*leaves: Tensor) -> Tensor:
            result = function(*(t[None] for t in leaves), *fixed, p.geom)
            one: Tensor = (result[wanted] if isinstance(result, tuple) else result)[0]
            return one

        return call


PEERS = {peer.name: peer for peer in (Fla, Sfnsa, Xunhao, Fsa, Lucidrains)}
