"""`nki.jit` and `nki.simulate`: a function becomes a kernel, a kernel its simulation."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..rules.session import violation
from ..run.launch import Kernel, Simulated, default_options
from . import misuse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ..rules.registers import VirtualRegister


def jit(fn: Any = None, **kwargs: Any) -> Any:
    """Decorate a kernel; `mode=` is ignored as documented, `platform_target=` is refused."""
    if "platform_target" in kwargs:
        raise violation(
            "usage",
            "platform_target= was removed in NKI 0.3",
            instruction="nki.jit",
            hint="set NEURON_PLATFORM_TARGET_OVERRIDE=trn2",
        )
    if fn is None:
        return functools.partial(jit, **kwargs)
    if isinstance(fn, Kernel):
        return fn
    if not callable(fn):
        raise violation(
            "usage", "nki.jit decorates a function", instruction="nki.jit", value=type(fn).__name__
        )
    return Kernel(fn, translate=misuse.translate)


def simulate(
    kernel: Any,
    *,
    data: bool | None = None,
    relax: Iterable[str] | None = None,
    target: str | None = None,
    precise: bool | None = None,
    strict: bool | None = None,
    unknown: Callable[[VirtualRegister], int] | None = None,
    iterations: int | None = None,
    ranks: int = 1,
) -> Simulated:
    """Make a simulated version of a kernel.

    Args:
        kernel: decorated with `nki.jit`, `kernel[2]`, or a plain function, which is wrapped.
        data: False runs shape-only.
        relax: ids of rules to note instead of raise.
        target: machine, "trn2".
        precise: False holds narrow floats as fp32 (NKI_PRECISE_FP=0).
        strict: True refuses what a run would only warn of.
        unknown: shape-only: value of a register that data would have set.
        iterations: shape-only: how many iterations of each hardware loop are run; all unless given.
        ranks: how many ranks run the kernel together, as `nki.collectives` needs; arguments that
            differ between them are given as `PerRank([...])`.

    Raises:
        UsageError: `kernel` is not callable.
    """
    if isinstance(kernel, Simulated):
        kernel = kernel.kernel
    if not isinstance(kernel, Kernel):
        if not callable(kernel):
            raise violation(
                "usage",
                "simulate takes a kernel",
                instruction="nki.simulate",
                value=type(kernel).__name__,
                limit="a function or @nki.jit kernel",
            )
        kernel = jit(kernel)
    changes = {
        "data": data,
        "target": target,
        "precise": precise,
        "strict": strict,
        "unknown": unknown,
        "iterations": iterations,
        "relax": None if relax is None else frozenset(relax),
    }
    options = replace(
        default_options(),
        **{k: v for k, v in changes.items() if v is not None},  # type: ignore[arg-type]
    )
    options.validate()
    if not isinstance(ranks, int) or ranks < 1:
        raise violation(
            "usage", "ranks is a positive integer", instruction="nki.simulate", value=ranks
        )
    return Simulated(kernel, options, ranks, misuse.translate)
