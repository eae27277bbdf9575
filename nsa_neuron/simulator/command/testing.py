"""What the pytest plugin loads once a test uses it: launchers, hardware, explained failures."""

from __future__ import annotations

import glob
import importlib
import importlib.util
import inspect
import linecache
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..nki.launching import jit, simulate
from ..rules.session import violation
from ..rules.table import RULES
from ..run.activation import activate
from ..run.launch import Kernel, Simulated, default_options

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import ModuleType

    from ..rules.errors import SimulationError

# Device files of the Neuron driver (SDK nki/get-started/setup-env.rst).
DEVICES = "/dev/neuron*"


def devices() -> tuple[str, ...]:
    """Neuron devices that the vendor's nki could use; empty without that package."""
    found = tuple(sorted(glob.glob(DEVICES)))
    return found if found and _vendor_installed() else ()


def _vendor_installed() -> bool:
    loaded = sys.modules.get("nki")
    if loaded is not None:
        return _is_vendor(loaded)
    return importlib.util.find_spec("nki") is not None


class Simulator:
    """Gives kernels that run on the simulator.

    Args:
        relax: rules to note instead of raise, in every launch.
        note: called after a launch that broke relaxed rules, with their ids.
    """

    def __init__(self, relax: Iterable[str], note: Callable[[str], None]) -> None:
        self._relax = frozenset(relax)
        self._note = note

    def __call__(
        self,
        kernel: Any,
        *,
        lnc: int | None = None,
        relax: Iterable[str] = (),
        data: bool = True,
        precise: bool | None = None,
        nki: str | None = None,
    ) -> Simulated:
        """A simulated version of a kernel.

        Args:
            kernel: decorated with `nki.jit` (the simulator's or the vendor's), or a function.
            lnc: number of cores; None keeps what `kernel[n]` says.
            relax: rules to note instead of raise, besides the session's.
            data: False runs shape-only.
            precise: False holds narrow floats as fp32 (NKI_PRECISE_FP=0).
            nki: version of NKI; None takes the session's.
        """
        kernel = simulated_copy(kernel)
        if lnc is not None:
            kernel = jit(kernel)[lnc]
        made = simulate(kernel, data=data, relax=self._relax.union(relax), precise=precise, nki=nki)
        return _Noting(made, self._note)


class _Noting(Simulated):
    """A simulated kernel that tells which relaxed rules it broke."""

    def __init__(self, made: Simulated, note: Callable[[str], None]) -> None:
        super().__init__(made.kernel, made.options, made.ranks, made.translate)
        self._note = note

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)
        finally:
            cores = self.run.cores if self.run is not None else []
            rules = sorted({error.rule for core in cores for error in core.relaxed})
            if rules:
                self._note(", ".join(rules))


class Hardware:
    """Gives kernels that run on a Neuron device; what only a simulator can do is ignored."""

    def __call__(self, kernel: Any, *, lnc: int | None = None, **_: Any) -> Any:
        return kernel if lnc is None else kernel[lnc]


def explain(error: SimulationError) -> str:
    """The rule, the kernel's line in its surroundings, and the operand table."""
    rule = RULES[error.rule]
    lines = [f"rule    {rule.id}: {rule.text}", f"source  {rule.source}"]
    if error.location is not None:
        lines += [f"line    {error.location}", *_surroundings(error.location)]
    if error.table:
        lines += ["operands", *(f"    {row}" for row in error.table)]
    if error.hint:
        lines.append(f"instead {error.hint}")
    return "\n".join(lines)


def _surroundings(location: Any) -> list[str]:
    """Two lines before and after the kernel's, which is marked."""
    first = max(1, location.lineno - 2)
    shown = []
    for number in range(first, location.lineno + 3):
        text = linecache.getline(location.filename, number).rstrip()
        if text or number == location.lineno:
            shown.append(f"  {'>' if number == location.lineno else ' '} {number:5} {text}")
    return shown


def simulated_copy(kernel: Any) -> Any:
    """The kernel itself, or a private copy that uses the simulator's nki if it uses the vendor's.

    Raises:
        UsageError: the kernel uses the vendor's nki and was made inside a function, so that it
            cannot be imported again.
    """
    fn = getattr(kernel, "fn", None) or getattr(kernel, "func", None) or kernel
    fn = getattr(fn, "__wrapped__", fn)
    if isinstance(kernel, Kernel | Simulated) or not hasattr(fn, "__globals__"):
        return kernel
    if not _touches_vendor(fn.__globals__) and not _is_vendors_name(type(kernel).__module__):
        return kernel
    if "<locals>" in fn.__qualname__:
        raise violation(
            "usage",
            "the kernel was made inside a function, with the vendor's nki",
            instruction=fn.__qualname__,
            hint="define it at module level, or run pytest with --nki-target trn2",
        )
    with _without_vendor(), activate(nki=default_options().nki):
        module = _import_again(fn.__module__, fn.__code__.co_filename)
    found: Any = module
    for part in fn.__qualname__.split("."):
        found = getattr(found, part)
    return found


def _import_again(name: str, path: str) -> ModuleType:
    """A fresh module, by name if it can be imported so, else from its file."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@contextmanager
def _without_vendor() -> Iterator[None]:
    """Takes the packages that use the vendor's nki out of `sys.modules`, and puts them back."""
    tops = {
        name.partition(".")[0]
        for name, module in list(sys.modules.items())
        if not _is_vendor(module) and _touches_vendor(getattr(module, "__dict__", {}))
    } - {__name__.partition(".")[0]}
    taken = {n: m for n, m in sys.modules.items() if n.partition(".")[0] in tops}
    for name in taken:
        del sys.modules[name]
    try:
        yield
    finally:
        for name in [n for n in sys.modules if n.partition(".")[0] in tops]:
            del sys.modules[name]
        sys.modules.update(taken)


def _touches_vendor(names: dict[str, Any]) -> bool:
    """True where a module's names hold the vendor's modules or things made in them."""
    for value in list(names.values()):
        if inspect.ismodule(value):
            home = value.__name__
        elif inspect.isclass(value) or inspect.isroutine(value):
            home = getattr(value, "__module__", "")
        else:
            home = type(value).__module__
        if _is_vendors_name(home):
            return True
    return False


def _is_vendor(module: Any) -> bool:
    return _is_vendors_name(getattr(module, "__name__", ""))


def _is_vendors_name(name: Any) -> bool:
    return isinstance(name, str) and (name == "nki" or name.startswith("nki."))
