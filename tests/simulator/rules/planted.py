"""Planted faults: kernels that break exactly one rule where `wrong` is true, and none elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from nsa_neuron import simulator
from nsa_neuron.simulator.nki import isa as nisa
from nsa_neuron.simulator.nki import language as nl

if TYPE_CHECKING:
    from collections.abc import Callable

X = np.random.default_rng(0).standard_normal((128, 64)).astype(np.float32)


@dataclass(frozen=True)
class Fault:
    """A planted fault.

    Attributes:
        rule: id of the rule that the wrong version breaks.
        run: `run(wrong, **options)` simulates one version and returns the `Simulated`.
        name: what it is called in reports.
        follows: rules that the wrong version goes on to break where its own is relaxed.
    """

    rule: str
    run: Callable[..., Any] = field(repr=False)
    name: str
    follows: tuple[str, ...] = ()


FAULTS: list[Fault] = []


def fault(
    rule: str, *args: Any, lnc: int = 1, follows: tuple[str, ...] = (), **options: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Plant a kernel `kernel(*args, wrong)`; its one argument is X unless others are given.

    Args:
        rule: the rule it breaks.
        args: arguments before `wrong`, copied for every run.
        lnc: number of cores.
        follows: see `Fault`.
        options: of `simulate`.
    """

    def plant(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def run(wrong: bool, **more: Any) -> Any:
            simulated = simulator.simulate(simulator.Kernel(kernel, lnc), **{**options, **more})
            given = args or (X,)
            simulated(*(a.copy() if isinstance(a, np.ndarray) else a for a in given), wrong)
            return simulated

        FAULTS.append(Fault(rule, run, kernel.__name__, follows))
        return kernel

    return plant


def launch_fault(rule: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Plant a function `run(wrong, **options)` that launches a kernel itself."""

    def plant(run: Callable[..., Any]) -> Callable[..., Any]:
        FAULTS.append(Fault(rule, run, run.__name__))
        return run

    return plant


def tile(x: Any) -> Any:
    """An SBUF copy of an HBM tensor."""
    made = nl.ndarray(x.shape, x.dtype)
    nisa.dma_copy(made, x)
    return made


def sbuf(*shape: int, dtype: Any = nl.float32, value: float = 0) -> Any:
    """A filled SBUF tensor."""
    made = nl.ndarray(shape, dtype)
    nisa.memset(made, value)
    return made


def psum(*shape: int, dtype: Any = nl.float32, zero: bool = False) -> Any:
    """A PSUM tensor, undefined or zero."""
    made = nl.ndarray(shape, dtype, buffer=nl.psum)
    if zero:
        nisa.memset(made, 0.0)
    return made


def result(t: Any) -> Any:
    """A shared HBM copy of a tile."""
    if t.buffer is nl.psum:
        copy = nl.ndarray(t.shape, t.dtype)
        nisa.tensor_copy(copy, t)
        t = copy
    made = nl.ndarray(t.shape, t.dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(made, t)
    return made
