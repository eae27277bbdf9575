"""Triton's interpreter made as strict as a GPU: what would be a fault or a race there is an error.

The interpreter runs the programs of a grid one after the other, in order, and reads and writes any
address that it is given. A kernel that writes into its neighbour's rows is right there and wrong on
a GPU; one that reads past a tensor ends the process. Kernels that are loaded through
`toolchain.triton_interpreter` therefore run under the rules of `interpreted_watch`, and their
programs start in a shuffled order, the same in every launch of that grid: a GPU promises none.
This module imports Triton; import it only where that is there.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

from nsa_neuron.errors import KernelFault
from nsa_neuron.interpreted_language import INTERPRETED_LANGUAGE
from nsa_neuron.interpreted_watch import Watch

_ORDER: ContextVar[int | str] = ContextVar("program_order", default=0)


@contextmanager
def program_order(order: int | str) -> Iterator[None]:
    """Starts programs in another order: `"ascending"`, `"descending"` or the seed of a shuffle."""
    token = _ORDER.set(order)
    try:
        yield
    finally:
        _ORDER.reset(token)


def places(order: int | str, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Which program starts i-th, `[count]`.

    Raises:
        ValueError: no such order.
    """
    if order == "ascending":
        return np.arange(count)
    if order == "descending":
        return np.arange(count)[::-1]
    if isinstance(order, str):
        raise ValueError(f"no order '{order}'; there are ascending, descending and whole numbers")
    return np.random.default_rng(order).permutation(count)


class StrictFunction(interpreter.InterpretedFunction):  # type: ignore[misc]
    """What `triton.jit` makes of a kernel while `toolchain.triton_interpreter` is entered."""

    def run(self, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if not warmup:
            StrictGrid(self.rewrite(), self.arg_names, grid, self.pre_run_hooks)(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As a device function, called by a kernel."""
        with INTERPRETED_LANGUAGE:
            return self.rewrite()(*args, **kwargs)


class StrictGrid(interpreter.GridExecutor):  # type: ignore[misc]
    """Runs the programs of one launch under the rules of `interpreted_watch`."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        # The rest (`num_warps`, ...) is for the compiler.
        known = {name: x for name, x in kwargs.items() if name in self.arg_names}
        named = inspect.getcallargs(self.fn, *args, **known)
        for hook in self.pre_run_hooks:
            hook(*args, **known)
        tensors = {name: x for name, x in named.items() if isinstance(x, torch.Tensor)}
        builder = interpreter.interpreter_builder
        with INTERPRETED_LANGUAGE:
            values = {
                name: x if name in self.constexprs else interpreter._implicit_cvt(x)
                for name, x in named.items()
            }
            grid = tuple(self.grid(values) if callable(self.grid) else self.grid)
            watch = Watch(self.fn.__name__, tensors, (*grid, 1, 1)[:3])
            builder.set_grid_dim(*watch.grid)
            with watch.over(builder):
                try:
                    for program in places(_ORDER.get(), math.prod(watch.grid)):
                        builder.set_grid_idx(*watch.begin(int(program)))
                        self.fn(**values)
                except KernelFault:
                    raise
                except Exception as error:
                    raise interpreter.InterpreterError(repr(error)) from error
