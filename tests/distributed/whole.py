"""Context-parallel NSA against the same call on one rank."""

from __future__ import annotations

import torch
import torch.distributed as dist

from nsa_neuron import functional as nsa
from nsa_neuron.distributed import context_op
from nsa_neuron.nn.rotary import block_positions, rotate

GEOMETRY = {
    "method": "mlp", "block": 8, "stride": 4, "select_block": 16, "num_selected": 4,
    "num_initial": 1, "num_local": 2, "window": 12, "scale": None,
}  # fmt: skip
HEADS = (4, 2, 8, 6)  # Hq, Hkv, Dk, Dv
LEAVES = context_op.TENSORS + context_op.WEIGHTS


def problem(tokens, batch=1, heads=HEADS, dtype=torch.float64, method="mlp", pe=True, block=8):
    """Tensors of a whole call by name, and phi's weights."""
    gen = torch.Generator().manual_seed(tokens)
    hq, hkv, dk, dv = heads

    def normal(*shape):
        return (torch.randn(*shape, generator=gen, dtype=torch.float64)).to(dtype)

    made = {"q": normal(batch, tokens, hq, dk)}
    for branch in ("raw", "slc", "win"):
        made[f"k_{branch}"] = normal(batch, tokens, hkv, dk)
        made[f"v_{branch}"] = normal(batch, tokens, hkv, dv)
    made["gates"] = normal(batch, tokens, hq, 3).sigmoid()
    for side, dim in (("k", dk), ("v", dv)):
        made |= dict.fromkeys(f"{side}_{name}" for name in context_op.PHI)
        if method != "mean":
            made[f"{side}_w1"] = normal(block * dim, dim) * (block * dim) ** -0.5
        if method == "mlp":
            made[f"{side}_b1"], made[f"{side}_b2"] = normal(dim), normal(dim)
            made[f"{side}_w2"] = normal(dim, dim) * dim**-0.5
        if pe:
            made[f"{side}_pe"] = normal(block, dim)
    return made


def on_one_rank(made, scalars, rope_base, edges):
    """o of the whole call."""
    cu = None if edges is None else torch.tensor(edges, dtype=torch.int32)
    some = {name: scalars[name] for name in ("method", "block", "stride")}
    k_cmp, v_cmp = (
        nsa.compress(made[f"{s}_raw"], *(made[f"{s}_{n}"] for n in context_op.PHI), cu, **some)
        for s in "kv"
    )
    sizes = k_cmp.shape[1], scalars["block"], scalars["stride"]
    ends = block_positions(*sizes, cu, torch.device("cpu"))
    rest = {name: value for name, value in scalars.items() if name != "method"}
    return nsa.nsa_attention(
        made["q"], rotate(k_cmp, ends, rope_base), v_cmp, made["k_slc"], made["v_slc"],
        made["k_win"], made["v_win"], made["gates"], cu, cu, **rest,
    )  # fmt: skip


def on_ranks(made, scalars, rope_base, edges, fetch="auto", context=None, heads=""):
    """o of this rank's tokens; `made` holds the whole tensors, and gets their gradients."""
    group = dist.group.WORLD if context is None else context
    rank, world = group.rank(), group.size()
    tokens = made["q"].shape[1] // world
    own = {
        name: x[:, rank * tokens : (rank + 1) * tokens] if name in context_op.TENSORS else x
        for name, x in made.items()
    }
    cu = None if edges is None else torch.tensor(edges, dtype=torch.int32)
    return context_op.context_attention(
        *(own[name] for name in LEAVES), cu, *scalars.values(), rope_base, group.group_name, heads,
        fetch,
    )  # fmt: skip


def weight_of(o):
    """A fixed gradient."""
    return torch.linspace(-1, 1, o.numel(), dtype=torch.float64).sin().view_as(o).to(o.dtype)


def gradients(o, weight, leaves):
    return torch.autograd.grad((o.double() * weight.double()).sum(), leaves, allow_unused=True)
