"""Names of torch that begin with an underscore, or lie in such a module: all that we use.

They may change in any release, so they stand here and nowhere else, each with a test in
`tests/house/test_torch_private.py`. Tried with torch 2.13 and 2.14. What belongs to compilation is
imported when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import fx
from torch._C import DispatchKey, DispatchKeySet
from torch._functorch.utils import enable_single_level_autograd_function
from torch._ops import OpOverload
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

if TYPE_CHECKING:
    from types import CodeType

__all__ = [
    "AFTER_AUTOGRAD",
    "DispatchKey",
    "DispatchKeySet",
    "OpOverload",
    "SingleLevelFunction",
    "any_requires_grad",
    "below_autograd",
    "enable_single_level_autograd_function",
    "transforming",
]

AFTER_AUTOGRAD: DispatchKeySet = torch._C._after_autograd_keyset
"""Keys that the dispatcher comes to behind autograd."""

any_requires_grad = torch._C._any_requires_grad
"""Whether any tensor among the arguments records a gradient."""

below_autograd = torch._C._AutoDispatchBelowAutograd
"""Context in which calls go past autograd."""

transforming = torch._C._are_functorch_transforms_active
"""Whether torch.func is at work."""


class SingleLevelFunction(_SingleLevelFunction):
    """An autograd function whose node belongs to the level that is current when it is applied.

    `torch.autograd.Function` hands calls under torch.func back to it: from Python in torch 2.13, in
    C++ from 2.14 on.
    """

    @staticmethod
    def _compiled_autograd_key(ctx: Any) -> tuple[Any, ...]:
        """As `torch.autograd.Function` has it."""
        return (ctx._autograd_function_id,)


def forward_mode() -> bool:
    """Whether forward-mode derivatives are being taken."""
    return forward_ad._current_level >= 0


def inductor(
    gm: fx.GraphModule, inputs: Any, choose: Callable[[fx.GraphModule], fx.GraphModule]
) -> Callable[..., Any]:
    """Compiles with inductor; `choose` sees every graph, forward and backward, before it."""
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    def inner(graph: fx.GraphModule, example: Any, **kwargs: Any) -> Any:
        return compile_fx_inner(choose(graph), example, **kwargs)

    # The autograd cache's key knows nothing of our choices.
    with torch._functorch.config.patch(enable_autograd_cache=False):
        compiled: Any = compile_fx(gm, inputs, inner_compile=inner)
    return cast("Callable[..., Any]", compiled)


def aot(
    gm: fx.GraphModule, inputs: Any, compiler: Callable[[fx.GraphModule, Any], Any]
) -> Callable[..., Any]:
    """Runs AOTAutograd; `compiler` gets every graph, forward and backward."""
    from torch._dynamo.backends.common import aot_autograd

    compiled: Callable[..., Any] = aot_autograd(fw_compiler=compiler, bw_compiler=compiler)(
        gm, inputs
    )
    return compiled


def boxed(forward: Callable[..., Any]) -> Any:
    """A graph's forward as AOTAutograd calls it."""
    from functorch.compile import make_boxed_func

    return make_boxed_func(forward)


def has_cpp_compiler() -> bool:
    """Whether inductor finds a C++ compiler."""
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        cpp_builder.get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


def dynamo_backend(name: str) -> Callable[..., Any] | None:
    """A backend of torch.compile; None: there is none of that name."""
    from torch._dynamo.backends.registry import list_backends, lookup_backend

    if name not in list_backends():
        return None
    found: Callable[..., Any] = lookup_backend(name)
    return found


def code_being_compiled() -> CodeType | None:
    """The code that dynamo traces; None outside of it."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        code: CodeType = InstructionTranslator.current_tx().f_code
    except AttributeError:
        return None
    return code


def code_before_breaks(code: CodeType | None) -> CodeType | None:
    """The code that a piece behind a graph break was cut from."""
    from torch._dynamo.resume_execution import ContinueExecutionCache

    resumed: Any = ContinueExecutionCache.generated_code_metadata
    while code in resumed:
        code = resumed[code].code
    return code


def original_of(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """The function that torch.compile compiled; of a module its forward."""
    original: Any = compiled
    if isinstance(compiled, torch._dynamo.OptimizedModule):
        original = type(compiled._orig_mod).forward
    while hasattr(original, "_torchdynamo_orig_callable"):
        original = original._torchdynamo_orig_callable
    return cast("Callable[..., Any]", original)


def compile_record(compiled: Any) -> Any:
    """torch.compile's record of backend and options behind a compiled callable, or None."""
    context = getattr(compiled, "dynamo_ctx", None)
    if context is None and getattr(compiled, "__closure__", None):
        cells = dict(zip(compiled.__code__.co_freevars, compiled.__closure__, strict=True))
        context = cells["self"].cell_contents if "self" in cells else None
    callback = getattr(context, "callback", None)
    while callback is not None and not hasattr(callback, "compiler_name"):
        callback = getattr(callback, "_torchdynamo_orig_backend", None)
    return callback


def process_group(name: str) -> Any:
    """A process group by its name, which custom ops take; None: the name is empty."""
    from torch.distributed import distributed_c10d

    resolve: Any = distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
    return resolve(name) if name else None


def flatten_mesh(mesh: Any, name: str) -> Any:
    """A mesh of one dimension with the ranks of several; it shares the root, as FSDP needs."""
    return mesh._flatten(name)
