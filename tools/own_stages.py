"""Our own kernels as a table for the peers' harness (`tools/peers`, `--own own_stages:STAGES`).

Every stage goes through the public ops, so what is timed is what a model calls: routing, kernels
and autograd. Tensors on a GPU run on `cuda:hw`; on a CPU the same kernels run interpreted
(`cuda:sim`), which shows that the table is right and nothing about speed. Decode has no op; it goes
through its launcher, against paged caches, with the workspace allocated once per batch shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import nsa_neuron
from nsa_neuron.backends.cuda import devices, kernel_package, plans
from nsa_neuron.backends.cuda.launch import decode as launch
from nsa_neuron.registry import use_backend

RAW_PAGE = 128
"""Tokens of a page of raw keys; a multiple of the selection block, and what the peers use."""
COMPRESSED_PAGE = 128
"""Compressed blocks of a page."""


def mode_of(x: Tensor) -> str:
    """Where kernels on this tensor run: `hw` or `sim`."""
    return "hw" if x.is_cuda else "sim"


def on_kernels(x: Tensor) -> Any:
    """The context in which public ops run on our Triton kernels, and on nothing else."""
    return use_backend("cuda", mode_of(x))


def dense(q: Tensor, k: Tensor, v: Tensor, geom: Any) -> Tensor:
    """Causal attention, o [B, S, Hq, Dv]."""
    with on_kernels(q):
        return nsa_neuron.attention(q, k, v)[0]


def window(q: Tensor, k: Tensor, v: Tensor, geom: Any) -> Tensor:
    """Sliding window, o [B, S, Hq, Dv]."""
    with on_kernels(q):
        return nsa_neuron.sliding_window_attention(q, k, v, window=geom.w)[0]


def slc(q: Tensor, k: Tensor, v: Tensor, block_ids: Tensor, geom: Any) -> Tensor:
    """Selected attention, o [B, S, Hq, Dv]; block_ids [B, S, Hkv, n] int32."""
    with on_kernels(q):
        return nsa_neuron.selected_attention(q, k, v, block_ids, select_block=geom.m)[0]


def cmp(q: Tensor, k_cmp: Tensor, v_cmp: Tensor, geom: Any) -> tuple[Tensor, Tensor]:
    """Compressed attention, o and lse; the queries are all tokens of the sequence."""
    with on_kernels(q):
        return nsa_neuron.compressed_attention(
            q, k_cmp, v_cmp, kv_len=q.shape[1], block=geom.l, stride=geom.d
        )


def select(q: Tensor, k_cmp: Tensor, lse: Tensor, geom: Any) -> Tensor:
    """Block ids [B, S, Hkv, n] from compressed keys and the lse of compressed attention."""
    with on_kernels(q):
        return nsa_neuron.select_blocks(
            q, k_cmp, lse, kv_len=q.shape[1], block=geom.l, stride=geom.d, **_selection(geom)
        )


def cmp_select(q: Tensor, k_cmp: Tensor, v_cmp: Tensor, geom: Any) -> tuple[Tensor, Tensor]:
    """Compressed attention and selection: o and block ids."""
    o, lse = cmp(q, k_cmp, v_cmp, geom)
    return o, select(q, k_cmp, lse, geom)


def nsa(q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor, geom: Any) -> Tensor:
    """All of NSA from raw keys: mean compression, three branches, gated sum."""
    with on_kernels(q):
        k_cmp, v_cmp = (nsa_neuron.compress(x, block=geom.l, stride=geom.d) for x in (k, v))
        return nsa_neuron.nsa_attention(
            q, k_cmp, v_cmp, k, v, k, v, gate_logits.sigmoid(), block=geom.l, stride=geom.d,
            window=geom.w, **_selection(geom),
        )  # fmt: skip


def _selection(geom: Any) -> dict[str, Any]:
    return {
        "select_block": geom.m, "num_selected": geom.n, "num_initial": geom.init,
        "num_local": geom.local,
    }  # fmt: skip


@dataclass(frozen=True)
class DecodeState:
    """What a server keeps between steps: paged caches, kernels, plan and workspace."""

    kernels: Any
    plan: Any
    caches: launch.PagedCaches
    geometry: launch.Geometry
    workspace: launch.Workspace


def decode_setup(problem: Any, device: str = "") -> DecodeState:
    """Pages a harness's decode problem in shuffled order, and allocates the workspace.

    Args:
        problem: q [B, Hq, Dk], and k, v, k_cmp, v_cmp [B, T or Nc, Hkv, D]; `geom`, `scale`.
        device: whose tile plans; default: those of the mode.
    """
    geom, q = problem.geom, problem.q[:, None]
    mode = mode_of(q)
    tokens = torch.full((len(q),), problem.k.shape[1], dtype=torch.int32, device=q.device)
    k, v, table = paged(problem.k, problem.v, RAW_PAGE)
    k_cmp, v_cmp, cmp_table = paged(problem.k_cmp, problem.v_cmp, COMPRESSED_PAGE)
    caches = launch.PagedCaches(
        seqlens=tokens, k_cmp=k_cmp, v_cmp=v_cmp, cmp_table=cmp_table,
        k_slc=k, v_slc=v, slc_table=table, k_win=k, v_win=v, win_table=table,
    )  # fmt: skip
    geometry = launch.Geometry(
        block=geom.l, stride=geom.d, select_block=geom.m, num_selected=geom.n,
        num_initial=geom.init, num_local=geom.local, window=geom.w, scale=problem.scale,
    )  # fmt: skip
    group = q.shape[2] // k.shape[2]
    dtype = str(q.dtype).removeprefix("torch.")
    if not device:
        device = devices.gpu().plans if mode == "hw" else "interpret"
    plan = plans.find(device, "decode", dk=q.shape[3], dv=v.shape[3], dtype=dtype, group=group)
    workspace = launch.Workspace.allocate(plan, q, caches, geometry)
    return DecodeState(kernel_package(mode).load("decode"), plan, caches, geometry, workspace)


def paged(k: Tensor, v: Tensor, page: int) -> tuple[Tensor, Tensor, Tensor]:
    """k, v [B, T, Hkv, D] as pools [P, page, Hkv, D] in shuffled order, and table [B, pages]."""
    batch, tokens = k.shape[:2]
    pages = -(-tokens // page)
    order = torch.randperm(batch * pages, device=k.device)
    pools = []
    for x in (k, v):
        rest = pages * page - tokens
        padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, rest)) if rest else x
        pool = torch.empty(batch * pages, page, *x.shape[2:], dtype=x.dtype, device=x.device)
        pool[order] = padded.reshape(-1, page, *x.shape[2:])
        pools.append(pool)
    return pools[0], pools[1], order.view(batch, pages).int().contiguous()


def decode(q: Tensor, state: DecodeState, gate_logits: Tensor, geom: Any) -> Tensor:
    """The newest token of each sequence, o [B, 1, Hq, Dv]."""
    return launch.step(
        state.kernels, state.plan, q, gate_logits.sigmoid(), state.caches, state.geometry,
        state.workspace,
    )  # fmt: skip


STAGES = {
    "name": "nsa-neuron",
    "dense": dense,
    "window": window,
    "slc": slc,
    "cmp": cmp,
    "select": select,
    "cmp_select": cmp_select,
    "nsa": nsa,
    "decode_setup": decode_setup,
    "decode": decode,
}
