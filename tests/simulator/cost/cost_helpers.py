"""Kernels as functions without arguments, and their modelled timelines."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nsa_neuron import simulator
from nsa_neuron.simulator import cost
from nsa_neuron.simulator.memory.tensor import NkiTensor
from nsa_neuron.simulator.nki import isa as nisa
from nsa_neuron.simulator.nki import language as nl

if TYPE_CHECKING:
    from collections.abc import Callable

    from nsa_neuron.simulator.cost import Parameters, Timeline
    from nsa_neuron.simulator.issue.record import Run

P = cost.load()


def record(
    body: Callable[..., Any], *args: Any, lnc: int = 1, data: bool = False, relax: str = ""
) -> Run:
    """The record of a body that need not return anything."""

    def kernel(*inputs: Any) -> Any:
        result = body(*inputs)
        if not isinstance(result, NkiTensor):
            result = nl.ndarray((1, 1), nl.float32, buffer=nl.shared_hbm)
        return result

    jitted = simulator.Kernel(kernel, lnc)
    rules = {"output-unwritten", *relax.split()}
    simulated = simulator.simulate(jitted, data=data, relax=rules)
    simulated(*args)
    assert simulated.run is not None
    return simulated.run


def timeline(body: Callable[..., Any], *args: Any, lnc: int = 1, **changes: float) -> Timeline:
    """The central timeline; PE starts warm unless `pe_warm_up` says otherwise."""
    return of(record(body, *args, lnc=lnc), **changes)


def of(run: Run, **changes: float) -> Timeline:
    """The central timeline of a record, with some constants replaced."""
    p: Parameters = replace(P, **{"pe_warm_up": 0.0, **changes})
    return cost.schedule(cost.program_of(run), p)


def sbuf(shape: tuple[int, ...], dtype: Any = None) -> Any:
    """A tile."""
    return nl.ndarray(shape, dtype or nl.float32)


def psum(shape: tuple[int, ...], dtype: Any = None) -> Any:
    """A PSUM tile."""
    return nl.ndarray(shape, dtype or nl.float32, buffer=nl.psum)


def hbm(shape: tuple[int, ...], dtype: Any = None) -> Any:
    """An HBM tensor."""
    return nl.ndarray(shape, dtype or nl.float32, buffer=nl.private_hbm)


def only(t: Timeline, opcode: str) -> int:
    """Index of the one instruction of an opcode."""
    (index,) = (i.index for i in t.instructions if i.opcode == opcode)
    return index


__all__ = ["P", "hbm", "nisa", "nl", "of", "only", "psum", "record", "sbuf", "timeline"]
