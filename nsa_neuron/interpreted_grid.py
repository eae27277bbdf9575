"""Triton's interpreter made as strict as a GPU: what would be a fault or a race there is an error.

The interpreter runs the programs of a grid one after the other, in order, and reads and writes any
address that it is given. A kernel that writes into its neighbour's rows is right there and wrong on
a GPU; one that reads past a tensor ends the process. Kernels that are loaded through
`toolchain.triton_interpreter` therefore run under three rules, each a `KernelFault`:

- a load or a store stays inside the tensors of its launch (their views, not their storages);
- an element is stored by one lane of a store, unless the lanes agree;
- no program loads or stores what another one stored, unless both have met at an atomic (as in "the
  last program adds up the parts"; the atomics must acquire and release).

Programs start in a shuffled order, the same in every launch of that grid: a GPU promises none.
This module imports Triton; import it only where that is there.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

from nsa_neuron.errors import KernelFault
from nsa_neuron.interpreted_language import INTERPRETED_LANGUAGE

NOBODY = -1
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
    """Runs the programs of one launch under the rules of the module's docstring."""

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
            watch = _Watch(self.fn.__name__, tensors, (*grid, 1, 1)[:3])
            builder.set_grid_dim(*watch.grid)
            with watch.over(builder):
                try:
                    for place in watch.programs():
                        builder.set_grid_idx(*place)
                        self.fn(**values)
                except KernelFault:
                    raise
                except Exception as error:
                    raise interpreter.InterpreterError(repr(error)) from error


@dataclass
class _Region:
    """The addresses of a tensor argument, first byte to behind the last."""

    name: str
    tensor: torch.Tensor
    start: int
    stop: int

    @classmethod
    def of(cls, name: str, x: torch.Tensor) -> _Region:
        reach = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        start = x.data_ptr()
        return cls(name, x, start, start + (reach + 1) * x.itemsize)

    def describe(self) -> str:
        kind = str(self.tensor.dtype).removeprefix("torch.")
        return f"'{self.name}' ({kind} {list(self.tensor.shape)})"


class _Owners:
    """Which program stored each element of a storage, in units of one tensor's elements."""

    def __init__(self, region: _Region) -> None:
        storage = region.tensor.untyped_storage()
        self.base, self.unit = storage.data_ptr(), region.tensor.itemsize
        # Zero pages, which take no memory until they are touched; so a program's number plus one.
        self.program = np.zeros(storage.nbytes() // self.unit + 1, np.int32)
        self.lane = np.empty(len(self.program), np.int32)

    def index(self, addresses: Any) -> Any:
        return (addresses - self.base) // self.unit


class _Watch:
    """Checks every access of one launch."""

    def __init__(
        self, kernel: str, tensors: dict[str, torch.Tensor], grid: tuple[int, int, int]
    ) -> None:
        self.kernel = kernel
        self.regions = [_Region.of(name, x) for name, x in tensors.items() if x.numel()]
        self.owners: dict[int, _Owners] = {}
        self.met: set[int] = set()
        self.current = 0
        self.grid = grid

    @contextmanager
    def over(self, builder: Any) -> Iterator[None]:
        """Stands between kernels and the interpreter's memory for one launch."""
        plain = type(builder)

        def load(ptrs: Any, mask: Any, *rest: Any) -> Any:
            mask = _as_bool(mask)
            self.check_load(ptrs.data, mask.data)
            return plain.create_masked_load(builder, ptrs, mask, *rest)

        def store(ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
            mask = _as_bool(mask)
            self.check_store(ptrs.data, value.data, mask.data)
            return plain.create_masked_store(builder, ptrs, value, mask, *rest)

        def atomic(op: Any, ptr: Any, val: Any, mask: Any, *rest: Any) -> Any:
            mask = _as_bool(mask)
            self.inside("updates", ptr.data[mask.data])
            self.met.add(self.current)
            return plain.create_atomic_rmw(builder, op, ptr, val, mask, *rest)

        methods = {
            "create_masked_load": load, "create_masked_store": store, "create_atomic_rmw": atomic,
        }  # fmt: skip
        vars(builder).update(methods)
        try:
            yield
        finally:
            for name in methods:
                vars(builder).pop(name)

    def programs(self) -> Iterator[tuple[int, ...]]:
        """The programs in the order in which they take their turns."""
        for program in places(_ORDER.get(), math.prod(self.grid)):
            self.current = int(program)
            yield self.place(self.current)

    def place(self, program: int) -> tuple[int, ...]:
        return tuple(int(i) for i in np.unravel_index(program, self.grid))

    def check_load(self, pointers: Any, mask: Any) -> None:
        active = pointers[mask]
        if not active.size:
            return
        region = self.inside("loads", active)
        owners = self.owners.get(region.tensor.untyped_storage().data_ptr())
        if owners is None:
            return
        self.check_owners("loads", region, owners, active)

    def check_store(self, pointers: Any, value: Any, mask: Any) -> None:
        active = pointers[mask]
        if not active.size:
            return
        region = self.inside("stores", active)
        key = region.tensor.untyped_storage().data_ptr()
        owners = self.owners.get(key)
        if owners is None:
            owners = self.owners[key] = _Owners(region)
        self.check_owners("stores", region, owners, active)
        index = owners.index(active)
        owners.program[index] = self.current + 1
        self.check_lanes(region, owners, index, np.broadcast_to(value, pointers.shape)[mask])

    def check_owners(self, verb: str, region: _Region, owners: _Owners, active: Any) -> None:
        """Nobody else stored these elements, or both have met at an atomic since."""
        made = owners.program[owners.index(active)] - 1
        foreign = (made != NOBODY) & (made != self.current)
        if self.current in self.met:
            foreign &= ~np.isin(made, list(self.met))
        if foreign.any():
            self.refuse_other(verb, region, owners, active[foreign][0], made[foreign][0])

    def check_lanes(self, region: _Region, owners: _Owners, index: Any, values: Any) -> None:
        """Lanes of one store that meet in an element must bring the same value."""
        owners.lane[index] = np.arange(len(index))
        winner = owners.lane[index]
        met = winner != np.arange(len(index))
        if not met.any():
            return
        mine, theirs = values[met].tobytes(), values[winner[met]].tobytes()
        if mine != theirs:
            at = int(index[met][0]) - int(owners.index(region.start))
            self.refuse(f"lanes of one store bring different values to element {at} of "
                        f"{region.describe()}")  # fmt: skip

    def inside(self, verb: str, addresses: Any) -> _Region:
        """The region that holds the first address; refuses addresses in none."""
        if not addresses.size:
            return self.regions[0]
        least, most = int(addresses.min()), int(addresses.max())
        for region in self.regions:
            if region.start <= least and most < region.stop:
                return region
        held = np.zeros(addresses.shape, bool)
        for region in self.regions:
            held |= (addresses >= region.start) & (addresses < region.stop)
        if not held.all():
            self.refuse_outside(verb, int(addresses[~held][0]), int((~held).sum()))
        first = int(addresses.reshape(-1)[0])
        return next(r for r in self.regions if r.start <= first < r.stop)

    def refuse_outside(self, verb: str, address: int, count: int) -> None:
        if not self.regions:
            self.refuse(f"{verb} {count} elements and was given no tensor")
        nearest = min(self.regions, key=lambda r: max(r.start - address, address - r.stop + 1))
        off = address - nearest.stop
        where = f"{off} bytes behind" if off >= 0 else f"{nearest.start - address} bytes before"
        self.refuse(f"{verb} {count} elements outside its tensors, the first {where} "
                    f"{nearest.describe()}")  # fmt: skip

    def refuse_other(
        self, verb: str, region: _Region, owners: _Owners, address: int, program: int
    ) -> None:
        element = (int(address) - region.start) // owners.unit
        self.refuse(f"{verb} element {element} of {region.describe()}, which program "
                    f"{self.place(int(program))} stored: a race on a GPU")  # fmt: skip

    def refuse(self, what: str) -> None:
        raise KernelFault(f"kernel '{self.kernel}', program {self.place(self.current)}: {what}")


def _as_bool(mask: Any) -> Any:
    """A mask as booleans: Triton's `&` of a tile and a scalar gives integers, which a GPU takes and
    the interpreter refuses from Triton 3.9 on."""
    return type(mask)(mask.data.astype(bool), mask.dtype)
