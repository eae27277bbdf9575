"""Arguments of a kernel into HBM tensors, and results back; torch is never imported."""

from __future__ import annotations

import copy
import inspect
import sys
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np

from ..machine.dtypes import DType, find, int64, resolve
from ..memory.allocation import allocation_of
from ..memory.layout import Form
from ..memory.storage import Memory
from ..memory.tensor import NKIObject, NkiTensor, whole
from ..rules.session import locate, violation
from ..rules.versions import is_in

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from ..issue.lnc import Launch
    from ..issue.record import Run
    from ..memory.allocation import Allocation
    from ..rules.options import Options


@dataclass(frozen=True)
class ShapeDtype:
    """Stands for a tensor in a shape-only run.

    Attributes:
        shape: dims.
        dtype: anything `dtypes.resolve` takes.
    """

    shape: tuple[int, ...]
    dtype: Any


def is_torch(value: Any) -> bool:
    """True for a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


_INT32 = (-(2**31), 2**32 - 1)


class Arguments:
    """Converts a call's arguments and remembers what must be written back.

    Attributes:
        tensors: the HBM tensors made of arrays, in order of appearance.
        torch: True when some argument was a torch tensor, so results are too.
    """

    def __init__(self, launch: Launch, options: Options) -> None:
        self._launch = launch
        self._options = options
        self._made: dict[int, NkiTensor] = {}
        self._sources: dict[int, Any] = {}
        self._copies: list[tuple[NkiTensor, NDArray[Any], NDArray[Any]]] = []
        self._keep: list[Any] = []
        self.tensors: list[NkiTensor] = []
        self.torch = False

    def convert_call(
        self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        """Convert the arguments of a call to `fn`, after checking that they fit its signature."""
        code = getattr(fn, "__code__", None)
        self._where = locate((code, 0)) if code else None
        signature = inspect.signature(fn)
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise violation(
                "usage",
                f"{error}; signature is {fn.__name__}{signature}",
                instruction=fn.__name__,
                location=self._where,
            ) from None
        names = {id(v): k for k, v in bound.arguments.items()}
        converted = [self.convert(a, names.get(id(a), f"argument {i}")) for i, a in enumerate(args)]
        return converted, {k: self.convert(v, k) for k, v in kwargs.items()}

    def convert(self, value: Any, name: str) -> Any:
        """Convert one argument.

        Raises:
            UsageError: rule "argument-kind" for anything the documents do not list.
        """
        if value is None or isinstance(value, bool | str | DType | Enum | float):
            return value
        if isinstance(value, int):
            if not _INT32[0] <= value <= _INT32[1]:
                raise self._refuse(name, "integers are 32-bit", value, _INT32)
            return value
        if isinstance(value, np.ndarray) or is_torch(value) or isinstance(value, ShapeDtype):
            return self._tensor(value, name)
        if isinstance(value, np.generic):
            return value.item()
        if type(value) is tuple or (isinstance(value, tuple) and hasattr(value, "_fields")):
            items = [self.convert(v, f"{name}[{i}]") for i, v in enumerate(value)]
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        if isinstance(value, dict):
            bad = [k for k in value if not isinstance(k, str)]
            if bad:
                raise self._refuse(name, "dictionary keys are strings", bad[0], "str")
            return {k: self.convert(v, f"{name}[{k!r}]") for k, v in value.items()}
        if isinstance(value, list):
            raise self._refuse(
                name,
                "lists are not kernel arguments (NKI 0.3)",
                "list",
                "tuple",
                hint="pass a tuple",
            )
        if isinstance(value, NKIObject):
            return self._object(value, name)
        if find(value) is not None:
            return resolve(value)
        if callable(value):
            return value
        raise self._refuse(
            name,
            f"a {type(value).__name__} is not a kernel argument",
            type(value).__name__,
            "tensor, None, bool, int, float, str, dtype, enum, tuple, dict, NKIObject, function",
        )

    def _refuse(self, name: str, message: str, value: Any, limit: Any, hint: str = "") -> Exception:
        return violation(
            "argument-kind",
            message,
            operand=name,
            value=value,
            limit=limit,
            hint=hint,
            location=self._where,
        )

    def _object(self, value: Any, name: str) -> Any:
        new = copy.copy(value)
        for key, item in vars(value).items():
            keep = isinstance(item, list)
            object.__setattr__(new, key, item if keep else self.convert(item, f"{name}.{key}"))
        return new

    def _tensor(self, value: Any, name: str) -> NkiTensor:
        known = self._made.get(id(value))
        if known is not None:
            return known
        shape = tuple(int(n) for n in value.shape)
        try:
            dtype = resolve(value.dtype)
        except TypeError as error:
            raise self._refuse(name, str(error), str(value.dtype), "an NKI dtype") from None
        if dtype is int64 and not is_in("int64", self._options.nki):
            message = f"NKI {self._options.nki} has no 64-bit types: convert to nl.int32"
            raise self._refuse(name, message, str(value.dtype), "an NKI dtype")
        if 0 in shape:
            raise self._refuse(name, "a tensor has no elements", shape, "dims >= 1")
        form = Form("shared_hbm", shape, dtype, None)
        allocation = allocation_of(form, next(self._launch.ids), 0, name, 0, None, "input")
        memory = self._memory(value, allocation, name)
        tensor = whole(memory, name)
        self._made[id(value)] = tensor
        self._keep.append(value)
        self._sources[id(memory)] = value
        self.tensors.append(tensor)
        return tensor

    def _memory(self, value: Any, allocation: Allocation, name: str) -> Memory:
        options = self._options
        width = allocation.pitch_bytes
        if not options.data:
            return Memory(allocation, None, 0, width, options.precise, True)
        if isinstance(value, ShapeDtype):
            raise self._refuse(name, "a run with data needs an array", "ShapeDtype", "array")
        if is_torch(value):
            self.torch = True
            array = torch_to_numpy(value)
        else:
            array = value
        kind = allocation.dtype.storage(options.precise)
        if array.dtype.kind == "b":
            array = array.view(np.uint8)
        usable = array.flags.c_contiguous and array.flags.writeable and array.dtype == kind
        store = array if usable else np.array(array.astype(kind), order="C")
        memory = Memory(
            allocation, store.reshape(-1).view(np.uint8), 0, width, options.precise, True
        )
        if not usable:
            tensor = whole(memory, "")
            self._copies.append((tensor, array, store.copy()))
        return memory

    def any_written(self, run: Run) -> bool:
        """True when the kernel wrote an argument."""
        ids = {t.memory.allocation.id for t in self.tensors}
        return any(a.allocation.id in ids for i in run.instructions for a in i.writes)

    def write_back(self) -> None:
        """Copy what the kernel changed into arguments that could not be shared in place."""
        for tensor, target, before in self._copies:
            now = tensor.array()
            same = np.array_equal(now.view(np.uint8), before.view(np.uint8))
            if not same and target.flags.writeable:
                target[...] = now.astype(target.dtype)

    def source(self, tensor: NkiTensor) -> Any:
        """The caller's own array of a tensor that is a whole argument, else None."""
        memory = tensor.memory
        whole = tensor.shape == memory.allocation.shape and tensor.offset == 0
        return self._sources.get(id(memory)) if whole and tensor.is_contiguous() else None


def torch_to_numpy(tensor: Any) -> NDArray[Any]:
    """A NumPy array that shares a CPU torch tensor's memory, whatever its dtype."""
    torch = sys.modules["torch"]
    dtype = resolve(tensor.dtype)
    tensor = tensor.detach()
    if tensor.device.type != "cpu":
        raise violation(
            "argument-kind", "a tensor must be on the CPU", value=str(tensor.device), limit="cpu"
        )
    if dtype.is_float and dtype.itemsize < 4 and dtype.name != "float16":
        bits = torch.int16 if dtype.itemsize == 2 else torch.uint8
        array: NDArray[Any] = tensor.view(bits).numpy().view(dtype.numpy)
        return array
    shared: NDArray[Any] = tensor.numpy()
    return shared


def numpy_to_torch(array: NDArray[Any], dtype: DType) -> Any:
    """A torch tensor that shares a NumPy array's memory."""
    torch = sys.modules["torch"]
    array = np.ascontiguousarray(array)
    target = getattr(torch, dtype.name, None)
    if array.dtype.isbuiltin == 1:
        out = torch.from_numpy(array)
        return out.view(torch.bool) if dtype.kind == "bool" else out
    if target is None:
        raise violation("output-kind", f"torch has no dtype {dtype}", value=dtype.name)
    bits = np.int16 if dtype.itemsize == 2 else np.uint8
    return torch.from_numpy(array.view(bits)).view(target)


def to_results(result: Any, arguments: Arguments, options: Options) -> Any:
    """Results as the caller's kind of array: NumPy, torch, or `ShapeDtype` when shape-only."""
    if result is None:
        return None
    if isinstance(result, tuple | list):
        return tuple(to_results(r, arguments, options) for r in result)
    if not options.data:
        return ShapeDtype(result.shape, result.dtype)
    source = arguments.source(result)
    if source is not None:
        return source
    array = result.array()
    if arguments.torch:
        return numpy_to_torch(array, result.dtype)
    return array.view(np.bool_) if result.dtype.kind == "bool" else array
