"""What a view is: a place in a storage, its elements, its access pattern."""

from __future__ import annotations

import inspect
from math import prod
from typing import TYPE_CHECKING, Any

from ..rules.session import violation
from . import views
from .allocation import Access
from .layout import layout_of
from .views import ViewError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from typing_extensions import Self

    from ..machine.dtypes import DType
    from .storage import Memory


class NKIObject:
    """Base of the classes a kernel may use; arguments of this kind are copied in by `__dict__`.

    As in NKI, where `@dataclass` on a subclass changes nothing, every attribute with a default is a
    field, annotated or not, and is set by keyword or, in order, by position.
    """

    __slots__ = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__slots__" in cls.__dict__:
            return
        annotated = inspect.get_annotations(cls)
        for name, value in cls.__dict__.items():
            plain = not callable(value) and not hasattr(type(value), "__get__")
            if not name.startswith("__") and plain and type(value).__hash__ is not None:
                annotated.setdefault(name, Any)
        cls.__annotations__ = annotated
        if "__init__" not in cls.__dict__ and all(
            "__init__" not in c.__dict__ or c.__dict__["__init__"] is NKIObject.__init__
            for c in cls.__mro__[1:-1]
        ):
            cls.__init__ = NKIObject.__init__  # type: ignore[method-assign]  # dataclass keeps it

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _set_fields(self, args, kwargs)


def _set_fields(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Set fields by position and keyword; one without a value or default stays unset, as in NKI."""
    owners = type(self).__mro__
    names = [n for c in reversed(owners) for n in inspect.get_annotations(c)]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    unknown = [n for n in given if names and n not in names]
    if unknown or len(args) > len(names):
        what = f"field {unknown[0]!r}" if unknown else f"{len(args)} positional arguments"
        raise TypeError(f"{type(self).__name__}() got an unexpected {what}; fields: {names}")
    factories = getattr(type(self), "__dataclass_fields__", {})
    for name in dict.fromkeys((*names, *given)):
        if name in given:
            value = given[name]
        elif hasattr(type(self), name):
            value = getattr(type(self), name)
        elif callable(getattr(factories.get(name), "default_factory", None)):
            value = factories[name].default_factory()
        else:
            continue
        object.__setattr__(self, name, value)
    if hasattr(self, "__post_init__"):
        self.__post_init__()


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

    def __init__(
        self,
        shape: Sequence[int],
        dtype: DType,
        storage: Memory,
        buffer: Any = None,
        name: str = "",
        *,
        strides: tuple[int, ...] | None = None,
        offset: int = 0,
        dynamic: Dynamic | None = None,
    ) -> None:
        self.shape = tuple(shape)
        self.dtype = dtype
        self.memory = storage
        self.name = name
        self.strides = views.row_major(self.shape) if strides is None else strides
        self.offset = offset
        self.dynamic = dynamic
        self._access: Access | None = None
        self._array: NDArray[Any] | None = None

    @classmethod
    def whole(cls, memory: Memory, name: str) -> Self:
        """The view of all of a memory, in the shape it was made with."""
        form = memory.allocation.form
        new = object.__new__(cls)
        new.shape = form.shape
        new.strides = form.strides
        new.offset = 0
        new.dtype = form.dtype
        new.memory = memory
        new.name = name
        new.dynamic = None
        new._access = None
        new._array = None
        return new

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
        raise self._error(
            ViewError("view", "a tensor's value is not known at compile time; use a register")
        )

    def __setitem__(self, key: Any, value: Any) -> None:
        raise self._error(
            ViewError("legacy-api", "tensors are not assigned to: pass dst= to an instruction")
        )

    def access(self) -> Access:
        """Where this view lies; computed once."""
        found = self._access
        if found is None:
            allocation = self.memory.allocation
            form = allocation.form
            key = (self.shape, self.strides, self.offset, self.dtype)
            place = form.places.get(key)
            if place is None:
                if 0 in self.shape:
                    raise self._error(ViewError("index", "an empty view is used", self.shape))
                pitch = form.pitch_bytes // self.dtype.itemsize if form.on_chip else 0
                layout = layout_of(self.shape, self.strides, self.dtype, pitch)
                place = form.places[key] = form.place(layout, self.offset, False)
            found = self._access = Access.at(allocation, place)
        return found

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
        new = object.__new__(type(self))
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
        return violation(
            error.rule,
            error.message,
            instruction=method or None,
            operand=self.name or "tensor",
            value=error.value,
            limit=error.limit,
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
