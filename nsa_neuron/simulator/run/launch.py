"""Calling a kernel: `nki.jit`, `kernel[lnc]`, `nki.simulate`; arguments in, results out."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..issue.core import NeuronCore
from ..issue.current import current_core
from ..issue.lnc import Launch
from ..issue.ranks import World, of_rank
from ..issue.record import Run
from ..memory.tensor import NkiTensor
from ..rules.errors import SimulationError
from ..rules.options import Options
from ..rules.session import locate, violate, violation
from . import liveness
from .arguments import Arguments, to_results
from .configuration import check_configured, check_nested, degree
from .cores import check_cores

if TYPE_CHECKING:
    from collections.abc import Iterable


# What a facade makes of an exception that a kernel raised: the refusal to raise in its stead, or
# None where the exception says enough.
Translate = Callable[[Exception], SimulationError | None]

# What `nki.simulate` and direct calls use; `activate` replaces it for a while.
DEFAULTS: list[Options] = []


def default_options() -> Options:
    """Options of the innermost `activate`, else those of the environment."""
    if DEFAULTS:
        return DEFAULTS[-1]
    return Options(
        target=os.environ.get("NEURON_PLATFORM_TARGET_OVERRIDE", "trn2"),
        precise=os.environ.get("NKI_PRECISE_FP", "1") != "0",
    )


class Kernel:
    """A function decorated with `nki.jit`.

    Attributes:
        fn: the function.
        bracket: number of cores that the launch bracket says, or None.
        schedule: ordering edges between named instructions.
        translate: says what a Python exception in the kernel means, or None.
        configs: compile and specialisation configuration of NKI 0.7, or None each.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        lnc: int | None = None,
        schedule: tuple[Any, ...] = (),
        translate: Translate | None = None,
        configs: tuple[Any, Any] = (None, None),
    ) -> None:
        self.fn = fn
        self.bracket = lnc
        self.schedule = schedule
        self.translate = translate
        self.configs = configs
        functools.update_wrapper(self, fn)

    @property
    def lnc(self) -> int:
        """Number of cores of a launch in the version that `activate` says."""
        return self.degree(default_options())

    def degree(self, options: Options) -> int:
        """Number of cores of a launch, 1 or 2.

        Raises:
            UsageError: rule "lnc": the environment says another number than the bracket.
        """
        return degree(self.bracket, options.nki, self.fn.__name__)

    def __getitem__(self, lnc: Any) -> Kernel:
        if isinstance(lnc, tuple) and len(lnc) == 1:
            lnc = lnc[0]
        if isinstance(lnc, bool) or not hasattr(lnc, "__index__") or int(lnc) not in (1, 2):
            raise violation(
                "lnc",
                "the launch bracket takes the number of cores, one integer",
                instruction=self.fn.__name__,
                value=lnc,
                limit=(1, 2),
                hint="kernel[2](...); SPMD grids of NKI 0.1 are gone: loop inside the kernel",
            )
        return Kernel(self.fn, int(lnc), self.schedule, self.translate, self.configs)

    def with_schedule(self, edges: Iterable[Any]) -> Kernel:
        """Add ordering edges [("later", "earlier"), ...] between named instructions."""
        return Kernel(self.fn, self.bracket, (*self.schedule, *edges), self.translate, self.configs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run inline inside another kernel, else simulate."""
        core = current_core()
        if core is not None:
            check_nested(core, self.configs, self.fn.__name__)
            return self.fn(*args, **kwargs)
        return Simulated(self, default_options(), translate=self.translate)(*args, **kwargs)

    def __repr__(self) -> str:
        cores = "" if self.bracket is None else f"[{self.bracket}]"
        return f"<nki kernel {self.fn.__qualname__}{cores}>"


class Simulated:
    """A kernel bound to the simulator; calling it runs the kernel.

    Attributes:
        kernel: what is run.
        options: how.
        ranks: number of ranks that run it together, for collectives.
        translate: says what a Python exception in the kernel means, or None.
        runs: records of the latest call, one per rank; set also when the call raised.
    """

    def __init__(
        self,
        kernel: Kernel,
        options: Options,
        ranks: int = 1,
        translate: Translate | None = None,
    ) -> None:
        self.kernel = kernel
        self.options = options
        self.ranks = ranks
        self.translate = translate
        self.runs: list[Run] = []
        functools.update_wrapper(self, kernel.fn)

    @property
    def run(self) -> Run | None:
        """Record of the latest call (of rank 0), or None."""
        return self.runs[0] if self.runs else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the kernel on arrays, torch tensors or (shape-only) `ShapeDtype`s.

        Returns:
            Arrays of the kind that came in; inputs the kernel wrote are updated in place. With
            several ranks a list of that, one per rank, and only `PerRank` arrays are updated.

        Raises:
            SimulationError: the kernel breaks a rule.
        """
        lnc = self.kernel.degree(self.options)
        check_configured(self.kernel.configs, self.options.nki, self.kernel.fn.__name__)
        world = World(self.ranks, lnc)
        self.runs = []
        if self.ranks == 1:
            parts = [_Rank(self.kernel, self.options, world, 0, args, kwargs)]
        else:
            parts = [
                _Rank(
                    self.kernel,
                    self.options,
                    world,
                    r,
                    tuple(of_rank(a, r, self.ranks) for a in args),
                    {k: of_rank(v, r, self.ranks) for k, v in kwargs.items()},
                )
                for r in range(self.ranks)
            ]
        self.runs = [p.run for p in parts]
        bodies = [functools.partial(p.body, c, self.translate) for p in parts for c in p.cores]
        results = [bodies[0]()] if len(bodies) == 1 else world.scheduler.run(bodies)
        out = [p.finish(results[r * lnc]) for r, p in enumerate(parts)]
        return out[0] if self.ranks == 1 else out


class _Rank:
    """One launch of a kernel: its cores, arguments and record."""

    def __init__(
        self, kernel: Kernel, options: Options, world: World, rank: int, args: Any, kwargs: Any
    ) -> None:
        self.kernel = kernel
        self.options = options
        launch = Launch(options, world.lnc, world, rank)
        self.cores = [NeuronCore(i, launch, options) for i in range(world.lnc)]
        for core in self.cores:
            core.state["configuration"] = kernel.configs
        self.arguments = Arguments(launch, options)
        self.bound = self.arguments.convert_call(kernel.fn, args, kwargs)
        self.run = Run(
            kernel.fn.__name__,
            world.lnc,
            [c.trace for c in self.cores],
            [t.memory.allocation for t in self.arguments.tensors],
            options.data,
            target=options.target,
        )
        if launch.meeting is not None and launch.races is not None:
            launch.meeting.on_meet.append(launch.races.clear)

    def body(self, core: NeuronCore, translate: Translate | None) -> Any:
        """Run the kernel on one core."""
        with core, np.errstate(all="ignore"):
            try:
                result = self.kernel.fn(*self.bound[0], **self.bound[1])
                if core.pending:
                    core.settle()
                if core.unfinished is not None:
                    raise core.unfinished
            except Exception as error:
                refusal = translate(error) if translate else None
                if refusal is None:
                    raise
                raise refusal from error
            return result

    def finish(self, result: Any) -> Any:
        """Check what is known only at the end; hand back the results."""
        cores, run = self.cores, self.run
        with cores[0]:
            _order(self.kernel.schedule, cores)
            for core in cores:
                run.peaks.append(liveness.check(core.trace, core.machine))
            liveness.check_hbm(run, cores[0].machine)
            check_cores(cores)
            _check_results(run, self.kernel, result, self.arguments, self.options)
        self.arguments.write_back()
        return to_results(result, self.arguments, self.options)


def _check_results(
    run: Run, kernel: Kernel, result: Any, arguments: Arguments, options: Options
) -> None:
    """Refuse results that the device cannot hand back."""
    code = kernel.fn.__code__ if hasattr(kernel.fn, "__code__") else None
    where = locate((code, 0)) if code else None
    tensors = list(result) if isinstance(result, tuple | list) else [result]
    if result is None:
        if arguments.any_written(run):
            return
        raise violation(
            "output-kind",
            "the kernel returns nothing and writes none of its arguments",
            instruction=kernel.fn.__name__,
            location=where,
            hint="return the nl.shared_hbm tensor that holds the result",
        )
    for position, t in enumerate(tensors):
        name = f"result {position}"
        if not isinstance(t, NkiTensor):
            raise violation(
                "output-kind",
                f"is a {type(t).__name__}",
                operand=name,
                location=where,
                instruction=kernel.fn.__name__,
                limit="tensor or tuple of tensors",
            )
        allocation = t.memory.allocation
        if allocation.on_chip:
            violate(
                "output-buffer",
                f"is in {allocation.buffer}",
                operand=name,
                location=where,
                instruction=kernel.fn.__name__,
                value=allocation.buffer,
                limit="shared_hbm",
                hint="dma_copy it to an nl.shared_hbm tensor and return that",
            )
        if allocation.role == "scratch":
            allocation.role = "output"
        if options.data and not t.memory.readable(t.access()):
            mask = t.memory.written.mask(t.access())
            first = tuple(int(i[0]) for i in (~mask).nonzero())
            violate(
                "output-unwritten",
                f"{int((~mask).sum())} of {mask.size} elements were never written, first {first}",
                operand=name,
                instruction=kernel.fn.__name__,
                value=first,
                location=locate(allocation.site) or where,
            )


def _order(schedule: tuple[Any, ...], cores: list[NeuronCore]) -> None:
    """Add the edges of `with_schedule` to the record."""
    for later, earlier in schedule:
        names = (earlier,) if isinstance(earlier, str) else tuple(earlier)
        for core in cores:
            named = {i.name: i for i in core.trace.instructions if i.name}
            missing = [n for n in (later, *names) if n not in named]
            if missing:
                raise violation(
                    "usage",
                    f"no instruction is named {missing[0]!r}",
                    instruction="with_schedule",
                    value=missing[0],
                    limit=sorted(named),
                )
            named[later].depends_on(*(named[n] for n in names))
