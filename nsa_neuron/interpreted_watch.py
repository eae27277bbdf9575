"""What a GPU forbids, or leaves open, in one launch of an interpreted kernel; each a `KernelFault`.

- A load or a store stays inside the tensors of its launch (their views, not their storages).
- An element is stored by one lane of a store, unless the lanes agree.
- What a program has stored it loads behind a barrier only, and what one lane has loaded another one
  stores into behind a barrier only: the threads of a program run side by side.
- No program loads or stores what another one stored, unless both have met at an atomic (as in "the
  last program adds up the parts"). The atomic must acquire and release on the whole GPU, with a
  barrier before it, so that it speaks for all threads, and one behind it. Such loads go past L1
  (`cache_modifier=".cg"`), which other SMs do not write to.
- `tl.multiple_of` holds: the compiler believes it.

What a mask leaves out of a load may be anything where the load does not say `other`: here it is NaN
or a wild integer. This module imports Triton; import it only where that is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton.language as tl

from nsa_neuron.errors import KernelFault

NOBODY = -1
_PAST_L1 = ("CG", "CV", "cg", "cv")  # Triton's enumeration, or its words from 3.9 on
_WHOLE_GPU = ("GPU", "SYSTEM")
_NAN_BITS, _WILD_BITS = 0xFF, 0x55


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
    """Who stored and who loaded each element of a storage, in units of one tensor's elements."""

    def __init__(self, region: _Region) -> None:
        storage = region.tensor.untyped_storage()
        self.base, self.unit = storage.data_ptr(), region.tensor.itemsize
        # Zero pages, which take no memory until they are touched; so a program's number plus one.
        count = storage.nbytes() // self.unit + 1
        self.program, self.stored, self.loaded = (np.zeros(count, np.int32) for _ in range(3))
        self.lane, self.first, self.last = (np.empty(count, np.int32) for _ in range(3))

    def index(self, addresses: Any) -> Any:
        return (addresses - self.base) // self.unit


class Watch:
    """Checks every access of one launch."""

    def __init__(
        self, kernel: str, tensors: dict[str, torch.Tensor], grid: tuple[int, int, int]
    ) -> None:
        self.kernel = kernel
        self.regions = [_Region.of(name, x) for name, x in tensors.items() if x.numel()]
        self.owners: dict[int, _Owners] = {}
        self.grid = grid
        self.current = 0
        # A phase ends at a barrier. When the program last stored, and when it met others.
        self.phase, self.stored, self.met_in = 0, NOBODY, NOBODY
        self.met: set[int] = set()

    def begin(self, program: int) -> tuple[int, ...]:
        """The place in the grid of a program that now takes its turn."""
        self.current = program
        self.phase, self.stored, self.met_in = self.phase + 1, NOBODY, NOBODY
        return self.place(program)

    @contextmanager
    def over(self, builder: Any) -> Iterator[None]:
        """Stands between kernels and the interpreter's memory for one launch."""
        plain, hint = type(builder), tl.multiple_of

        def load(ptrs: Any, mask: Any, other: Any, cache: Any, *rest: Any) -> Any:
            mask = _as_bool(mask)
            self.check_load(ptrs.data, mask.data, getattr(cache, "name", cache) in _PAST_L1)
            found = plain.create_masked_load(builder, ptrs, mask, other, cache, *rest)
            if other is None:
                _spoil(found, mask.data)
            return found

        def store(ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
            mask = _as_bool(mask)
            self.check_store(ptrs.data, value.data, mask.data)
            return plain.create_masked_store(builder, ptrs, value, mask, *rest)

        def atomic(op: Any, ptr: Any, val: Any, mask: Any, order: Any, scope: Any) -> Any:
            mask = _as_bool(mask)
            self.inside("updates", ptr.data[mask.data])
            if order.name == "ACQUIRE_RELEASE" and scope.name in _WHOLE_GPU:
                self.meet()
            return plain.create_atomic_rmw(builder, op, ptr, val, mask, order, scope)

        def barrier() -> Any:
            self.phase += 1
            return plain.create_barrier(builder)

        def multiple_of(x: Any, values: Any) -> Any:
            if not isinstance(values, list | tuple):
                self.check_multiple(x, values)
            return hint(x, values)

        def cache_policy(modifier: str, eviction: str) -> str:
            """From Triton 3.9 on loads bring this, which the interpreter itself throws away."""
            return modifier

        methods = {
            "create_masked_load": load, "create_masked_store": store, "create_atomic_rmw": atomic,
            "create_barrier": barrier, "get_cache_policy": cache_policy,
        }  # fmt: skip
        vars(builder).update(methods)
        tl.multiple_of = multiple_of
        try:
            yield
        finally:
            for name in methods:
                vars(builder).pop(name)
            tl.multiple_of = hint

    def place(self, program: int) -> tuple[int, ...]:
        return tuple(int(i) for i in np.unravel_index(program, self.grid))

    def meet(self) -> None:
        """An atomic speaks for what was stored in front of the last barrier."""
        if self.stored != self.phase:
            self.met.add(self.current)
            self.met_in = self.phase

    def check_multiple(self, x: Any, of: Any) -> None:
        """The values of a tensor, or of an induction variable, which is a number."""
        values = np.atleast_1d(getattr(getattr(x, "handle", None), "data", x))
        rest = values % int(of)
        if rest.any():
            self.refuse(f"says that {values[rest != 0][0]} is a multiple of {int(of)}")

    def check_load(self, pointers: Any, mask: Any, past_l1: bool) -> None:
        active = pointers[mask]
        if not active.size:
            return
        region = self.inside("loads", active)
        owners = self.owners.get(region.tensor.untyped_storage().data_ptr())
        if owners is None:
            return
        index = owners.index(active)
        made = owners.program[index] - 1
        self.check_owners("loads", region, owners, active, made)
        if not past_l1 and ((made != NOBODY) & (made != self.current)).any():
            self.refuse(f"loads what other programs stored to {region.describe()} through L1, "
                        'which is not coherent: it must say cache_modifier=".cg"')  # fmt: skip
        own = (made == self.current) & (owners.stored[index] == self.phase)
        if own.any():
            element = (int(active[own][0]) - region.start) // owners.unit
            self.refuse(f"loads element {element} of {region.describe()}, which it stored with no "
                        "barrier between: a race of threads on a GPU")  # fmt: skip
        lanes = np.flatnonzero(mask)
        owners.loaded[index], owners.last[index] = self.phase, lanes
        owners.first[index[::-1]] = lanes[::-1]

    def check_store(self, pointers: Any, value: Any, mask: Any) -> None:
        active = pointers[mask]
        if not active.size:
            return
        region = self.inside("stores", active)
        key = region.tensor.untyped_storage().data_ptr()
        owners = self.owners.get(key)
        if owners is None:
            owners = self.owners[key] = _Owners(region)
        index = owners.index(active)
        self.check_owners("stores", region, owners, active, owners.program[index] - 1)
        self.check_readers(region, owners, active, np.flatnonzero(mask))
        owners.program[index], owners.stored[index] = self.current + 1, self.phase
        self.stored = self.phase
        self.check_lanes(region, owners, index, np.broadcast_to(value, pointers.shape)[mask])

    def check_owners(
        self, verb: str, region: _Region, owners: _Owners, active: Any, made: Any
    ) -> None:
        """Nobody else stored these elements, or both have met at an atomic since.

        Args:
            made: the programs that stored them, or `NOBODY`.
        """
        foreign = (made != NOBODY) & (made != self.current)
        if self.met_in not in (NOBODY, self.phase):
            foreign &= ~np.isin(made, list(self.met))
        if foreign.any():
            self.refuse_other(verb, region, owners, active[foreign][0], made[foreign][0])

    def check_readers(self, region: _Region, owners: _Owners, active: Any, lanes: Any) -> None:
        """No other lane has loaded these elements since the last barrier."""
        index = owners.index(active)
        others = (owners.first[index] != lanes) | (owners.last[index] != lanes)
        others &= owners.loaded[index] == self.phase
        if others.any():
            element = (int(active[others][0]) - region.start) // owners.unit
            self.refuse(f"stores element {element} of {region.describe()}, which another lane "
                        "loaded with no barrier between: a race of threads on a GPU")  # fmt: skip

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


def _spoil(found: Any, mask: Any) -> None:
    """Fills what a mask left out of a load."""
    wild = np.full(1, _NAN_BITS if found.dtype.is_floating() else _WILD_BITS, np.uint8)
    found.data[~mask] = np.repeat(wild, found.data.itemsize).view(found.data.dtype)[0]
