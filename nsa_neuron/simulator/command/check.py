"""`nsa simulate --check FILE.py::reference`: a kernel's results against a NumPy function's."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import numpy as np

from . import loading

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


def find_reference(module: Any, name: str) -> Callable[..., Any]:
    """A function of a module.

    Raises:
        LoadingError: there is none of that name.
    """
    found = getattr(module, name, None)
    if not name or not callable(found):
        names = sorted(k for k, v in vars(module).items() if inspect.isfunction(v))
        listed = ", ".join(names) or "none"
        raise loading.LoadingError(
            f"--check: no function {name!r} in {module.__file__}; there are: {listed}"
        )
    function: Callable[..., Any] = found
    return function


def wanted(reference: Callable[..., Any], values: Mapping[str, Any]) -> list[np.ndarray]:
    """What a reference gives for a kernel's arguments; floating-point arrays go in as float64.

    Arguments that the reference does not name are left out where it names the others.

    Raises:
        LoadingError: it cannot be called so, or gives something else than arrays.
    """
    wide = {k: _widened(v) for k, v in values.items()}
    parameters = inspect.signature(reference).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        named = {p.name for p in parameters}
        wide = {k: v for k, v in wide.items() if k in named}
    try:
        results = reference(**wide)
    except Exception as error:
        raise loading.LoadingError(
            f"--check: {reference.__name__}({', '.join(wide)}): {type(error).__name__}: {error}"
        ) from None
    made = list(results) if isinstance(results, tuple | list) else [results]
    if any(r is None or np.asarray(r).dtype.kind not in "biufcV" for r in made):
        raise loading.LoadingError(f"--check: {reference.__name__} gives no array of numbers")
    return [np.asarray(r) for r in made]


def _widened(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    return value.astype(np.float64) if value.dtype.kind in "fV" else value.copy()


def compare(
    results: Sequence[Any], want: Sequence[np.ndarray], within: float | None
) -> list[dict[str, Any]]:
    """The largest error of each result, and where it is.

    Args:
        results: of the kernel.
        want: of the reference.
        within: allowed error relative to the largest magnitude of the reference, or None.

    Raises:
        LoadingError: the reference gives another number of results, or another shape.
    """
    if len(results) != len(want):
        raise loading.LoadingError(
            f"--check: the kernel gives {len(results)} results, the reference {len(want)}"
        )
    found = []
    for number, (got, right) in enumerate(zip(results, want, strict=True)):
        got = np.asarray(got)
        if got.shape != right.shape:
            raise loading.LoadingError(
                f"--check: result {number} has shape {list(got.shape)}, the reference's has "
                f"{list(right.shape)}"
            )
        found.append(_largest(got.astype(np.float64), right.astype(np.float64), within))
    return found


def _largest(got: np.ndarray, want: np.ndarray, within: float | None) -> dict[str, Any]:
    with np.errstate(invalid="ignore"):
        error = np.abs(got - want)
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    error = np.where(same, 0.0, np.where(np.isnan(error), np.inf, error))
    finite = np.abs(want[np.isfinite(want)])
    scale = float(finite.max(initial=0.0))
    if not error.size:
        return {"error": 0.0, "relative": 0.0, "agrees": True}
    place = np.unravel_index(int(error.argmax()), error.shape)
    largest = float(error[place])
    relative = largest / scale if scale else float(largest > 0)
    return {
        "error": largest,
        "relative": relative,
        "index": [int(n) for n in place],
        "got": float(got[place]),
        "wanted": float(want[place]),
        "agrees": relative <= within if within is not None else bool(np.isfinite(largest)),
    }


def text(found: Sequence[dict[str, Any]], name: str, within: float | None) -> list[str]:
    """One line per result."""
    lines = []
    for number, f in enumerate(found):
        line = f"  check result {number} against {name}: largest error {f['error']:.3g}"
        if f["error"]:
            line += (
                f" ({f['relative']:.2e} of the largest magnitude) at {f['index']}: "
                f"{f['got']:.6g}, wanted {f['wanted']:.6g}"
            )
        if not f["agrees"]:
            allowed = "" if within is None else f", more than {within:g} allow"
            line += f"; DIFFERS{allowed}"
        lines.append(line)
    return lines
