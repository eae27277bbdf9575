"""What a view is: a place in a storage, its elements, its access pattern."""

from __future__ import annotations

import numbers
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from ..rules.registers import RunTimeScalar
from ..rules.session import current_session, violate, violation
from .allocation import Access, access_at
from .layout import layout_of
from .nki_object import NKIObject
from .views import ViewError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Self

    from ..machine.dtypes import DType
    from .layout import Place
    from .storage import Memory


# Python's and NumPy's numbers and arrays: what a tensor's elements might be compared with.
_VALUES = (RunTimeScalar, numbers.Number, np.generic, np.ndarray)


class Dynamic:
    """The run-time part of a view's address.

    Attributes:
        kind: "scalar" (one index for the view) or "vector" (one index per row).
        index: the tensor or register that holds it.
        stride: elements of the view's dtype that one step of the index moves.
        dim: dim of the receiver that is indexed.
        count: size of that dim, the exclusive bound of a legal index; None for `.ap`, whose
            bound is the storage itself.
    """

    __slots__ = ("count", "dim", "index", "kind", "stride")

    def __init__(self, kind: str, index: Any, stride: int, dim: int, count: int | None) -> None:
        self.kind = kind
        self.index = index
        self.stride = stride
        self.dim = dim
        self.count = count


class BaseTensor(NKIObject):
    """A view of a tensor in SBUF, PSUM or HBM; `NkiTensor` adds the methods that make views.

    Element (i0, i1, ...) is element `offset + sum(strides[k] * ik)` of the storage, counted in
    elements of `dtype`. On chip dim 0 is the partition dim and strides[0] is the storage's free
    element count.

    Attributes:
        memory: the bytes, shared by all views.
        shape: dims.
        strides: elements of `dtype`.
        offset: elements of `dtype` from the start of the storage.
        dtype: element type.
        name: name given when the tensor was made.
        dynamic: run-time part of the address, or None.
    """

    __slots__ = (
        "_access",
        "_array",
        "dtype",
        "dynamic",
        "memory",
        "name",
        "offset",
        "shape",
        "strides",
    )

    __init__ = object.__init__  # Python runs it without a frame: see `tensor.whole`, `_view`

    memory: Memory
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    dtype: DType
    name: str
    dynamic: Dynamic | None
    _access: Access | None
    _array: NDArray[Any] | None

    @property
    def buffer(self) -> Any:
        """Memory region: `nl.sbuf`, `nl.psum`, `nl.private_hbm` or `nl.shared_hbm`."""
        from ..machine.regions import REGIONS

        return REGIONS[self.memory.allocation.buffer]

    @property
    def ndim(self) -> int:
        """Number of dims."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def on_chip(self) -> bool:
        """True in SBUF and PSUM."""
        return self.memory.allocation.on_chip

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        a = self.memory.allocation
        name = f" {self.name!r}" if self.name else ""
        return f"NkiTensor({self.shape}, {self.dtype}, {a.buffer}{name}, offset={self.offset})"

    def __iter__(self) -> Any:
        raise self._error(ViewError("view", "a tensor cannot be iterated over; index it"))

    def __bool__(self) -> bool:
        """True: a kernel is built before any element is known, so `if tensor:` asks if it is None.

        Raises:
            SimulationError: rule "tensor-truth": a comparison found False, which NKI would not see.
        """
        session = current_session()
        if session is None:
            return True
        if self.memory.verdict and session.data and self.dynamic is None:
            elements = self.array()
            false = elements.size - int(np.count_nonzero(elements != 0))
            if false:
                violate(
                    "tensor-truth",
                    f"{false} of {elements.size} elements of this comparison are false, yet NKI "
                    "takes every tensor as true: the branch or assert does not look at them",
                    operand=self.name or "tensor",
                    table=(repr(self),),
                    hint="return the tensor and compare outside; choose with nl.where; or "
                    "register_load one element and loop on it",
                )
        session.warn(
            f"the truth of tensor {self.name!r} is asked for: always true in NKI, whatever its "
            "elements; ask for an optional tensor by `!= None`"
        )
        return True

    def __eq__(self, other: object) -> bool:
        """False for None and objects of other kinds; what could mean the elements is refused.

        Raises:
            SimulationError: rule "legacy-api": the other is a number, array, register or tensor.
        """
        if other is not None and isinstance(other, (BaseTensor, *_VALUES)):
            raise violation(
                "legacy-api",
                "Python cannot compare a tensor's elements (== and != see only the objects)",
                operand=self.name or "tensor",
                hint="nl.equal(a, b) or nl.not_equal(a, b) for the elements; `a is b` for objects",
                table=(repr(self),),
            )
        return NotImplemented

    __hash__ = object.__hash__

    def __setitem__(self, key: Any, value: Any) -> None:
        raise self._error(
            ViewError("legacy-api", "tensors are not assigned to: pass dst= to an instruction")
        )

    def access(self) -> Access:
        """Where this view lies; computed once."""
        found = self._access
        if found is None:
            allocation = self.memory.allocation
            key = (self.shape, self.strides, self.offset, self.dtype)
            place = allocation.form.places.get(key)
            if place is None:
                place = self._place()
            found = access_at(allocation, place)
            if self.dynamic is None:  # where it lies at run time, nobody knows before
                self._access = found
        return found

    def _place(self) -> Place:
        """What of the tensor this view is, when it is asked for the first time."""
        form = self.memory.allocation.form
        if 0 in self.shape:
            raise self._error(ViewError("index", "an empty view is used", self.shape))
        pitch = form.pitch_bytes // self.dtype.itemsize if form.on_chip else 0
        layout = layout_of(self.shape, self.strides, self.dtype, pitch)
        place = form.place(layout, self.offset, False)
        key = (self.shape, self.strides, self.offset, self.dtype)
        form.places[key] = place
        if key == (form.shape, form.strides, 0, form.dtype):
            form.whole = place
        return place

    def array(self) -> NDArray[Any]:
        """The elements as a NumPy view of the storage; never a copy. Static views only."""
        found = self._array
        if found is None:
            found = self._array = self.memory.array(
                self.shape, self.strides, self.offset, self.dtype
            )
        return found

    def is_contiguous(self) -> bool:
        """True for a dense row-major view; the partition dim and size-1 dims are not looked at."""
        step = 1
        first = 1 if self.on_chip else 0
        for size, stride in zip(
            self.shape[: first - 1 if first else None : -1],
            self.strides[: first - 1 if first else None : -1],
            strict=True,
        ):
            if size != 1 and stride != step:
                return False
            step *= size
        return True

    def get_pattern(self) -> list[list[int]]:
        """The access pattern [[stride, count], ...] in the order of `shape`."""
        return [[s, n] for s, n in zip(self.strides, self.shape, strict=True)]

    def is_indirect(self) -> bool:
        """True when part of the address is a run-time index."""
        return self.dynamic is not None

    def _view(
        self,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        offset: int | None = None,
        dtype: DType | None = None,
        dynamic: Dynamic | None = None,
    ) -> Self:
        new: Self = type(self)()
        new.shape = shape
        new.strides = strides
        new.offset = self.offset if offset is None else offset
        new.dtype = self.dtype if dtype is None else dtype
        new.memory = self.memory
        new.name = self.name
        new.dynamic = self.dynamic if dynamic is None else dynamic
        new._access = None
        new._array = None
        return new

    def _error(self, error: ViewError, method: str = "") -> Exception:
        name = self.name or "tensor"
        indexed = method == "[]"
        return violation(
            error.rule,
            error.message,
            instruction=None if indexed else method or None,
            operand=f"{name}[...]" if indexed else name,
            value=error.value,
            limit=error.limit,
            hint=error.hint,
            table=(repr(self),),
        )


def same_width(tensor: BaseTensor, new: DType) -> None:
    """Under NKI_PRECISE_FP=0 narrow floats are held as fp32 and have no bits to look at."""
    memory = tensor.memory
    if memory.precise:
        return
    if any(d.storage(False).itemsize != d.itemsize for d in (tensor.dtype, new)) and (
        new.name != tensor.dtype.name
    ):
        raise ViewError(
            "view", "NKI_PRECISE_FP=0 holds narrow floats as fp32: no reinterpretation", new.name
        )
