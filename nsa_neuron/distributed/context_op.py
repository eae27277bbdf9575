"""`torch.ops.nsa_distributed.context_attention`: opaque to torch.compile, with its own backward.

Groups are named, because a schema has no process groups; an empty name is a group of one.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from nsa_neuron.distributed.context import FETCHES, Call, backward, forward
from nsa_neuron.distributed.exchange import agreed
from nsa_neuron.distributed.opaque import define
from nsa_neuron.errors import InvalidArgument
from nsa_neuron.ops import get
from nsa_neuron.torch_private import process_group

TENSORS = ("q", "k_raw", "v_raw", "k_slc", "v_slc", "k_win", "v_win", "gates")
PHI = ("w1", "b1", "w2", "b2", "pe")
WEIGHTS = tuple(f"{side}_{name}" for side in "kv" for name in PHI)
SCALARS = {
    "method": "str", "block": "int", "stride": "int", "select_block": "int",
    "num_selected": "int", "num_initial": "int", "num_local": "int", "window": "int",
    "scale": "float?",
}  # fmt: skip
SPREAD = {"rope_base": "float", "context": "str", "heads": "str", "fetch": "str"}
SAVED = ("ids", "o_cmp", "lse_cmp", "o_slc", "lse_slc", "o_win", "lse_win")
NAMES = (*TENSORS, *WEIGHTS, "cu_seqlens", *SCALARS, *SPREAD)
OP = "context_attention"


def context_attention(*args: Any) -> Tensor:
    """NSA of this rank's tokens; every rank of both groups calls it with the same arguments.

    Args:
        args: in the order of `NAMES`: tensors of the own tokens `[B, C, ...]` as `nsa_attention`
            takes them (`k_raw`, `v_raw` are what phi compresses); phi's weights, or None;
            `cu_seqlens`, offsets of packed sequences over the tokens of all ranks, `[N + 1]` int32,
            or None; the scalars of `compress` and `nsa_attention`; the base of the rotary encoding
            that compressed keys get, 0 for none; the names of the groups that share the tokens and
            that share a kv head; and how selected keys are fetched: `gather`, `blocks`, or `auto`,
            the one that moves less.

    Returns:
        o `[B, C, Hq, Dv]`.

    Raises:
        RanksDiffer: ranks gave different arguments.
        RankFailure: a rank is gone.
        InvalidArgument: an argument breaks the contract.
    """
    o: Tensor = torch.ops.nsa_distributed.context_attention.default(*args)[0]
    return o


def _call(args: tuple[Any, ...]) -> Call:
    given = dict(zip(NAMES, args, strict=True))
    edges = given["cu_seqlens"]
    return Call(
        **{name: given[name] for name in TENSORS},
        phi_k=tuple(given[f"k_{name}"] for name in PHI),
        phi_v=tuple(given[f"v_{name}"] for name in PHI),
        edges=None if edges is None else edges.tolist(),
        scalars={name: given[name] for name in SCALARS},
        rope_base=given["rope_base"],
        context=process_group(given["context"]),
        heads=process_group(given["heads"]),
        fetch=given["fetch"],
    )


def _forward(*args: Any) -> tuple[Tensor, ...]:
    given = dict(zip(NAMES, args, strict=True))
    with agreed([process_group(given[name]) for name in ("context", "heads")], given["q"]) as say:
        say(_describe(given))
    return forward(_call(args))


def _backward(grad_o: Tensor, *args: Any) -> tuple[Tensor, ...]:
    call = _call(args[: -len(SAVED)])
    return backward(call, grad_o, args[-len(SAVED) :])


def _describe(given: dict[str, Any]) -> str:
    """The call in one line, checked.

    Raises:
        InvalidArgument, InvalidType: an argument breaks the contract.
    """
    sizes = {name: given[name] for name in SCALARS if name not in ("method", "scale")}
    values = {**given, **sizes, "cu_seqlens_q": None, "cu_seqlens_k": None}
    lines = []
    for name, renamed in (
        ("sliding_window_attention", {"k": "k_win", "v": "v_win"}),
        ("compress", {"x": "k_raw", **{n: f"k_{n}" for n in PHI}}),
        ("compress", {"x": "v_raw", **{n: f"v_{n}" for n in PHI}}),
    ):
        spec = get(name)
        bound = spec.bind({n: values[renamed.get(n, n)] for n in spec.names})
        lines.append(bound.describe())
    for name in ("k_raw", "v_raw", "k_slc", "v_slc", "k_win", "v_win"):
        like = given["k_win" if name[0] == "k" else "v_win"]
        if given[name].shape != like.shape:
            raise InvalidArgument(
                OP, name, f"of shape {list(given[name].shape)}", f"of shape {list(like.shape)}"
            )
    if given["k_win"].shape[1] != given["q"].shape[1]:
        expected = f"as long as q, {given['q'].shape[1]} tokens"
        raise InvalidArgument(OP, "k_win", f"{given['k_win'].shape[1]} tokens long", expected)
    if given["fetch"] not in FETCHES:
        raise InvalidArgument(OP, "fetch", repr(given["fetch"]), f"one of {', '.join(FETCHES)}")
    _check_edges(given)
    lines.append(", ".join(f"{name}={given[name]}" for name in (*SCALARS, "rope_base", "fetch")))
    if given["cu_seqlens"] is not None:
        lines.append(f"cu_seqlens={given['cu_seqlens'].tolist()}")
    return f"{OP}: " + "; ".join(lines)


def _check_edges(given: dict[str, Any]) -> None:
    edges = given["cu_seqlens"]
    if edges is None:
        return
    group = process_group(given["context"])
    total = given["q"].shape[1] * (1 if group is None else group.size())
    row = edges.tolist()
    if given["q"].shape[0] != 1:
        found = f"given with batch {given['q'].shape[0]}"
        raise InvalidArgument(OP, "cu_seqlens", found, "used with batch 1")
    grows = all(a < b for a, b in itertools.pairwise(row))
    if len(row) < 2 or row[0] != 0 or row[-1] != total or not grows:
        expected = f"strictly increasing from 0 to the {total} tokens of all ranks"
        raise InvalidArgument(OP, "cu_seqlens", row, expected)


def _fake(*args: Any) -> tuple[Tensor, ...]:
    given = dict(zip(NAMES, args, strict=True))
    q, v = given["q"], given["v_slc"]
    b, s, hq, _ = q.shape
    stat = torch.float64 if q.dtype == torch.float64 else torch.float32
    ids = q.new_empty(b, s, v.shape[2], given["num_selected"], dtype=torch.int32)
    o = [q.new_empty(b, s, hq, v.shape[3]) for _ in range(4)]
    lse = [q.new_empty(b, s, hq, dtype=stat) for _ in range(3)]
    return o[0], ids, o[1], lse[0], o[2], lse[1], o[3], lse[2]


define(
    OP,
    tensors=TENSORS,
    optional=(*WEIGHTS, "cu_seqlens"),
    scalars={**SCALARS, **SPREAD},
    saved=SAVED,
    differentiable=len(TENSORS) + len(WEIGHTS),
    run=(_forward, _fake),
    run_backward=_backward,
)
