"""Gradients of the registered ops: each backward pass is an op of its own.

A forward op's gradient calls `torch.ops.nsa.<name>_backward`, so the backward gets its own
lowering. Backward ops and `decode` refuse to be differentiated. The Autograd kernels are our own
autograd functions of one level with a separate `setup_context`, which `torch.func` needs and
`torch.library.register_autograd` (2.13) does not make.

A call that records nothing goes straight to the op's router where the dispatcher would, too: that
saves handing it back to the dispatcher, a quarter of what a call costs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import Library

from nsa_neuron.errors import UnsupportedTransform
from nsa_neuron.ops import get
from nsa_neuron.registry import requested, requesting
from nsa_neuron.torch_private import (
    AFTER_AUTOGRAD,
    DispatchKey,
    DispatchKeySet,
    SingleLevelFunction,
    any_requires_grad,
    below_autograd,
    enable_single_level_autograd_function,
    forward_mode,
    transforming,
)

if TYPE_CHECKING:
    from nsa_neuron.spec import OpSpec

_BACKENDS = (DispatchKey.CPU, DispatchKey.CUDA, DispatchKey.XLA, DispatchKey.PrivateUse1)
_left: dict[int, bool] = {}  # by the bits of a call's keys: see `_only_backend_left`


def register_autograd(
    library: Library, spec: OpSpec, backward: OpSpec | None, router: Callable[..., Any]
) -> None:
    """Registers how an op is differentiated; ops without floating results need nothing.

    Args:
        library: where the op is defined.
        spec: the op.
        backward: the spec of its gradients, None if it has none.
        router: what every backend key of the op calls.
    """
    if spec.name == "nsa_attention":
        library.impl(spec.name, _train_or_infer, "Autograd")
        return
    if backward is not None:
        function = _function(spec, backward)
    elif any(item.dtype == "float" for item in spec.returns):
        function = _refusing_function(spec)
    else:
        return
    library.impl(spec.name, _kernel(spec, function, router), "Autograd", with_keyset=True)


def _kernel(
    spec: OpSpec, function: type[SingleLevelFunction], router: Callable[..., Any]
) -> Callable[..., Any]:
    """The Autograd kernel: records a graph node only where a gradient can be asked for."""
    op = getattr(torch.ops.nsa, spec.name).default
    count = len(spec.tensors)
    # When torch.func calls an Autograd kernel it has chosen the level already, so the node belongs
    # to that level; a `Function` would hand the call back to torch.func, which fails.
    apply = function.apply  # type: ignore[attr-defined]

    def kernel(keys: DispatchKeySet, *args: Any, **scalars: Any) -> Any:
        if forward_mode():
            _refuse_tangents(spec, args)
        if torch.is_grad_enabled() and any_requires_grad(*args):
            inputs = (*args, *(None,) * (count - len(args)), scalars)
            if not transforming():
                return apply(*inputs)
            with enable_single_level_autograd_function():
                return apply(*inputs)
        if _only_backend_left(keys):
            return router(*args, **scalars)
        with below_autograd():
            return op(*args, **scalars)

    return kernel


def _only_backend_left(keys: DispatchKeySet) -> bool:
    """Whether nothing lies between autograd and the router in a call of these keys.

    Fake and wrapped tensors, dispatch modes, functionalization, torch.func's levels and tensors
    that are not dense all have keys of their own.
    """
    bits = keys.raw_repr()
    known = _left.get(bits)
    if known is None:
        rest = keys & AFTER_AUTOGRAD
        known = _left[bits] = any(rest == DispatchKeySet(backend) for backend in _BACKENDS)
    return known


def _forward(op: Any) -> Callable[..., Any]:
    def forward(*inputs: Any) -> Any:
        # A Function's forward runs without grad mode, which torch.func's outer levels still need.
        outer = transforming()
        with torch.set_grad_enabled(outer), below_autograd():
            return op(*inputs[:-1], **inputs[-1])

    return forward


def _refuse_tangents(spec: OpSpec, args: tuple[Any, ...]) -> None:
    """Forward-mode derivatives would be dropped silently; they are refused instead."""
    for x in args:
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise UnsupportedTransform(
                f"{spec.name} has no forward-mode derivative (jvp); use reverse mode (grad, vjp)"
            )


def _function(spec: OpSpec, backward: OpSpec) -> type[SingleLevelFunction]:
    """The autograd.Function of an op whose gradients `backward` gives.

    Names connect the two: `backward` takes `grad_<result>`, the forward's tensors and the results
    that the forward spec saves, and gives `d<tensor>`.
    """
    op = getattr(torch.ops.nsa, spec.name).default
    gradient = getattr(torch.ops.nsa, backward.name).default
    tensors = [arg.name for arg in spec.tensors]
    results = [item.name for item in spec.returns]
    wanted = [arg.name for arg in backward.tensors]
    given = [item.like for item in backward.returns]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        by_name = dict(zip(results, outputs, strict=True))
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(x for x in outputs if not x.is_floating_point()))
        ctx.save_for_backward(*inputs[:-1], *(by_name[name] for name in spec.saves))
        ctx.scalars = inputs[-1]
        ctx.policy = requested()  # autograd's device threads do not see `use_backend`
        ctx.shape = outputs[0].shape

    def run_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        values = dict(zip([*tensors, *spec.saves], ctx.saved_tensors, strict=True))
        values |= {f"grad_{name}": grad for name, grad in zip(results, grads, strict=True)}
        first = f"grad_{results[0]}"
        if values[first] is None:
            values[first] = values[tensors[0]].new_zeros(ctx.shape)
        with requesting(ctx.policy):
            grads = gradient(*map(values.get, wanted), **ctx.scalars)
        named = dict(zip(given, grads, strict=True))
        inputs = (named.get(name) if values[name] is not None else None for name in tensors)
        return (*inputs, None)

    members = {
        "forward": staticmethod(_forward(op)),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(run_backward),
    }
    return type(f"{spec.name}_autograd", (SingleLevelFunction,), members)


def _refusing_function(spec: OpSpec) -> type[SingleLevelFunction]:
    """For backward ops and `decode`: a graph node that raises when it is differentiated."""
    why = (
        "NSA defines first derivatives only. Do not use create_graph=True or a second "
        "torch.func.grad through it."
        if spec.direction == "backward"
        else "it is for inference. Train with nsa_attention."
    )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing is kept for a derivative that there is not."""

    def refuse(ctx: Any, *grads: Tensor | None) -> Any:
        raise UnsupportedTransform(f"{spec.name} cannot be differentiated: {why}")

    members = {
        "forward": staticmethod(_forward(getattr(torch.ops.nsa, spec.name).default)),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(refuse),
    }
    return type(f"{spec.name}_autograd", (SingleLevelFunction,), members)


def _train_or_infer(*args: Any, **kwargs: Any) -> Tensor:
    """`nsa_attention` under autograd: training runs the op that keeps what backward needs."""
    if forward_mode():
        _refuse_tangents(get("nsa_attention"), args)
    if torch.is_grad_enabled() and any_requires_grad(*args):
        results: tuple[Tensor, ...] = torch.ops.nsa.nsa_attention_forward.default(*args, **kwargs)
        return results[0]
    with below_autograd():
        result: Tensor = torch.ops.nsa.nsa_attention.default(*args, **kwargs)
        return result
