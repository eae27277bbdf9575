"""Ops that talk to other ranks, as torch.library ops: torch.compile does not look into them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

NAMESPACE = "nsa_distributed"
_library = Library(NAMESPACE, "DEF")


def define(
    name: str,
    tensors: Sequence[str],
    optional: Sequence[str],
    scalars: Mapping[str, str],
    saved: Sequence[str],
    differentiable: int,
    run: tuple[Callable[..., Any], Callable[..., Any]],
    run_backward: Callable[..., Any],
) -> None:
    """Defines `nsa_distributed::<name>` and `<name>_backward`, and how the one gives the other.

    Args:
        name: of the op; its first result is the one that gradients come for.
        tensors, optional: arguments: tensors, and tensors or None.
        scalars: further arguments: their schema types by name.
        saved: names of the results that the backward op takes behind the arguments.
        differentiable: how many of the first arguments have gradients.
        run: the op, and its fake.
        run_backward: gradients of the first arguments; empty for absent ones.
    """
    given = ", ".join(
        [f"Tensor {x}" for x in tensors]
        + [f"Tensor? {x}" for x in optional]
        + [f"{kind} {x}" for x, kind in scalars.items()]
    )
    kept = ", ".join(f"Tensor {x}" for x in saved)
    outputs = ["Tensor"] * (1 + sum(x != "o" for x in saved))
    grads = ", ".join(["Tensor"] * differentiable)
    tags = (torch.Tag.pt2_compliant_tag,)
    _library.define(f"{name}({given}) -> ({', '.join(outputs)})", tags=tags)
    _library.define(f"{name}_backward(Tensor grad_o, {given}, {kept}) -> ({grads})", tags=tags)

    def fake_backward(grad_o: Tensor, *args: Any) -> tuple[Tensor, ...]:
        first = args[:differentiable]
        return tuple(grad_o.new_empty(0 if x is None else x.shape) for x in first)

    for op, body, fake in (
        (name, *run),
        (f"{name}_backward", run_backward, fake_backward),
    ):
        _library.impl(op, body, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{op}", fake, lib=_library)
    setup, differentiate = _autograd(
        f"{name}_backward", len(tensors) + len(optional), differentiable, "o" in saved
    )
    torch.library.register_autograd(
        f"{NAMESPACE}::{name}", differentiate, setup_context=setup, lib=_library
    )


def _autograd(
    backward: str, tensors: int, differentiable: int, keep_output: bool
) -> tuple[Callable[..., None], Callable[..., tuple[Any, ...]]]:
    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:tensors], *output[0 if keep_output else 1 :])
        ctx.rest, ctx.shape = inputs[tensors:], output[0].shape

    def differentiate(ctx: Any, grad_o: Tensor | None, *others: Any) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # once: activation checkpointing hands it out once
        given, kept = saved[:tensors], saved[tensors:]
        if grad_o is None:
            grad_o = given[0].new_zeros(ctx.shape)
        op = getattr(getattr(torch.ops, NAMESPACE), backward).default
        grads = op(grad_o, *given, *ctx.rest, *kept)
        pairs = zip(given[:differentiable], grads, strict=True)
        named = (None if x is None else grad for x, grad in pairs)
        return (*named, *(None,) * (tensors - differentiable + len(ctx.rest)))

    return setup, differentiate
