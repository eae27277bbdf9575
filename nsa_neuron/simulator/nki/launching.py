"""`nki.jit` and `nki.simulate`: a function becomes a kernel, a kernel its simulation."""

from __future__ import annotations

import difflib
import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..rules.session import violation
from ..run.launch import Kernel, Simulated, default_options
from . import misuse
from .configuration import CompileConfig, SpecializationConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ..rules.registers import RunTimeScalar


def jit(
    fn: Any = None,
    *,
    compile_config: Any = None,
    specialization_config: Any = None,
    **kwargs: Any,
) -> Any:
    """Decorate a kernel.

    Args:
        fn: the function; without one, the decorator is returned.
        compile_config, specialization_config: of `nki.compiler`; NKI 0.7.
        kwargs: `mode=` is ignored as documented, `platform_target=` is refused.
    """
    configs = (compile_config, specialization_config)
    for config, kind in zip(configs, (CompileConfig, SpecializationConfig), strict=True):
        if config is not None and not isinstance(config, kind):
            raise violation(
                "configuration",
                f"takes a nki.compiler.{kind.__name__}",
                instruction="nki.jit",
                value=type(config).__name__,
            )
    if "platform_target" in kwargs:
        raise violation(
            "usage",
            "platform_target= was removed in NKI 0.3",
            instruction="nki.jit",
            hint="set NEURON_PLATFORM_TARGET_OVERRIDE=trn2",
        )
    for key in kwargs:
        close = difflib.get_close_matches(key, ("compile_config", "specialization_config"), 1, 0.8)
        if close:
            raise violation("usage", f"has no {key}=", instruction="nki.jit", hint=f"{close[0]}=")
    if fn is None:
        return functools.partial(
            jit,
            compile_config=compile_config,
            specialization_config=specialization_config,
            **kwargs,
        )
    if isinstance(fn, Kernel):
        return fn
    if not callable(fn):
        raise violation(
            "usage", "nki.jit decorates a function", instruction="nki.jit", value=type(fn).__name__
        )
    return Kernel(fn, translate=misuse.translate, configs=configs)


def simulate(
    kernel: Any,
    *,
    data: bool | None = None,
    relax: Iterable[str] | None = None,
    target: str | None = None,
    precise: bool | None = None,
    strict: bool | None = None,
    unknown: Callable[[RunTimeScalar], int] | None = None,
    iterations: int | None = None,
    ranks: int = 1,
    nki: str | None = None,
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
        nki: version of NKI, "0.6" or "0.7"; that of `activate` unless given, else the newest.
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
        "nki": nki,
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
