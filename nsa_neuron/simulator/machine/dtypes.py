"""NKI data types and the conversions between them.

A :class:`DType` is the object behind ``nl.bfloat16`` and its siblings. AWS documents it as a string
(``DType = str`` in the 0.6 stubs) and AWS's kernels use it as one: ``str(dtype)``, dictionary keys,
``dtype == nl.float32``, ``getattr(nl, str(dtype).split(".")[-1])``. So it is a ``str`` with facts.

Conversion rules (docs/trainium2.md 2.6):

* Engines and DMA compute in fp32: operand -> fp32 -> result dtype.
* Rounding is to nearest, ties to even. Stochastic rounding, a runtime switch, is not modelled.
* fp32 -> integer rounds to nearest even and saturates (release note 0.6). NaN -> integer is not
  documented: 0 here.
* A float too large for its destination becomes an infinity. ``float8_e4m3fn`` has none and its
  overflow is not documented: NaN here, as in ``ml_dtypes``.
* Denormals are kept; no document says that they are flushed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


class UnknownDTypeError(TypeError):
    """An object that names no NKI data type."""


class DType(str):
    """One NKI data type; a string equal to its name, and to every other spelling of the same type.

    Attributes:
        numpy: storage type of the device's bits (``bool`` and packed types: unsigned integers).
        kind: ``"float"``, ``"int"``, ``"uint"``, ``"bool"`` or ``"packed"``.
        itemsize: bytes per element on the device.
        gen4_only: exists only from NeuronCore-v4 (Trn3) on.
    """

    numpy: np.dtype[Any]
    kind: str
    itemsize: int
    gen4_only: bool

    __slots__ = ("gen4_only", "itemsize", "kind", "numpy")

    def __new__(cls, name: str, numpy: Any, kind: str, gen4_only: bool = False) -> DType:
        """Make the type called ``name`` held as the NumPy type ``numpy``."""
        self = super().__new__(cls, name)
        self.numpy = np.dtype(numpy)
        self.kind = kind
        self.itemsize = self.numpy.itemsize
        self.gen4_only = gen4_only
        return self

    @property
    def name(self) -> str:
        """The plain name, as an ordinary string."""
        return str(self)

    @property
    def is_float(self) -> bool:
        """True for floating-point types, packed ones excluded."""
        return self.kind == "float"

    @property
    def is_integer(self) -> bool:
        """True for signed, unsigned and boolean types: those that bitwise operators accept."""
        return self.kind in ("int", "uint", "bool")

    @property
    def is_fp8(self) -> bool:
        """True for one-byte floating-point types."""
        return self.kind == "float" and self.itemsize == 1

    def storage(self, precise: bool = True) -> np.dtype[Any]:
        """NumPy type that holds an element.

        Args:
            precise: False is ``NKI_PRECISE_FP=0``: floats of less than 32 bits are held as fp32,
                so storing rounds nothing. ``itemsize`` stays that of the device.
        """
        return self.numpy if precise or self.kind != "float" else _FLOAT32

    def __eq__(self, other: object) -> bool:
        """Compare with any spelling: DType, string, NumPy, ml_dtypes or torch dtype."""
        return self is other or find(other) is self

    def __ne__(self, other: object) -> bool:
        """Negation of ``==``."""
        return not self == other

    __hash__ = str.__hash__

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and unpickle to the same object, so that ``is`` keeps working."""
        return resolve, (str(self),)


_FLOAT32 = np.dtype(np.float32)
_UINT16 = np.dtype(np.uint16)
_BF16 = np.dtype(ml_dtypes.bfloat16)

bool_ = DType("bool", np.uint8, "bool")
int8 = DType("int8", np.int8, "int")
int16 = DType("int16", np.int16, "int")
int32 = DType("int32", np.int32, "int")
int64 = DType("int64", np.int64, "int")  # NKI 0.7; moved and addressed with, never computed on
uint8 = DType("uint8", np.uint8, "uint")
uint16 = DType("uint16", np.uint16, "uint")
uint32 = DType("uint32", np.uint32, "uint")
float32 = DType("float32", np.float32, "float")
tfloat32 = DType("tfloat32", np.float32, "float")
bfloat16 = DType("bfloat16", ml_dtypes.bfloat16, "float")
float16 = DType("float16", np.float16, "float")
float8_e4m3 = DType("float8_e4m3", ml_dtypes.float8_e4m3, "float")
float8_e4m3fn = DType("float8_e4m3fn", ml_dtypes.float8_e4m3fn, "float")
float8_e5m2 = DType("float8_e5m2", ml_dtypes.float8_e5m2, "float")
float8_e8m0fnu = DType("float8_e8m0fnu", ml_dtypes.float8_e8m0fnu, "float", gen4_only=True)
float8_e5m2_x4 = DType("float8_e5m2_x4", np.uint32, "packed", gen4_only=True)
float8_e4m3fn_x4 = DType("float8_e4m3fn_x4", np.uint32, "packed", gen4_only=True)
float4_e2m1fn_x4 = DType("float4_e2m1fn_x4", np.uint16, "packed", gen4_only=True)

# What instructions compute with.
ALL: tuple[DType, ...] = (
    *(bool_, int8, int16, int32, uint8, uint16, uint32),
    *(float32, tfloat32, bfloat16, float16),
    *(float8_e4m3, float8_e4m3fn, float8_e5m2, float8_e8m0fnu),
    *(float8_e5m2_x4, float8_e4m3fn_x4, float4_e2m1fn_x4),
)

# Short spellings that AWS's kernels compare against, and Python's own types.
_ALIASES: dict[str, DType] = {
    "bool_": bool_,
    "float8e4": float8_e4m3,
    "float8e5": float8_e5m2,
    "half": float16,
    "float": float32,
    "fp32": float32,
    "fp16": float16,
    "bf16": bfloat16,
    "tf32": tfloat32,
}
_BY_NAME: dict[str, DType] = {**{str(d): d for d in (*ALL, int64)}, **_ALIASES}
_BY_NUMPY: dict[np.dtype[Any], DType] = {
    d.numpy: d for d in reversed(ALL) if d.kind not in ("bool", "packed") and d is not tfloat32
}
_BY_NUMPY |= {np.dtype(np.bool_): bool_, np.dtype(np.int64): int64}
_PYTHON: dict[object, DType] = {bool: bool_, int: int32, float: float32}


def find(spec: object) -> DType | None:
    """The data type that ``spec`` names, or None.

    Args:
        spec: a DType, a name, a NumPy or ml_dtypes dtype or scalar type, a torch dtype (recognised
            by its printed name, torch is not imported), or Python's ``bool``, ``int``, ``float``
            (weak scalars: bool, int32, float32).
    """
    if type(spec) is DType:
        return spec
    if isinstance(spec, str):
        return _BY_NAME.get(str(spec).rpartition(".")[2])
    if isinstance(spec, np.dtype):
        return _BY_NUMPY.get(spec)
    if isinstance(spec, type):
        if spec in _PYTHON:
            return _PYTHON[spec]
        try:
            return _BY_NUMPY.get(np.dtype(spec)) if issubclass(spec, np.generic) else None
        except TypeError:
            return None
    if type(spec).__module__ == "torch" and type(spec).__name__ == "dtype":
        return _BY_NAME.get(str(spec).rpartition(".")[2])
    return None


def resolve(spec: object) -> DType:
    """The data type that ``spec`` names.

    Raises:
        UnknownDTypeError: ``spec`` names none; the message lists what does.
    """
    found = find(spec)
    if found is not None:
        return found
    hint = ""
    name = str(spec).rpartition(".")[2].strip("'<>")
    if name in ("uint64", "float64", "double"):
        narrow = "float32" if name == "double" else name.replace("64", "32")
        hint = f" NeuronCore-v3 has no such 64-bit type: convert to nl.{narrow}."
    raise UnknownDTypeError(
        f"{spec!r} is not an NKI dtype.{hint} Expected one of nl.{', nl.'.join(ALL)}, "
        "or the NumPy, ml_dtypes or torch dtype of the same name."
    )


def bits(view: Array) -> Array:
    """The same elements as unsigned integers of the same size; no copy, any strides."""
    return view.view(_UINT[view.dtype.itemsize])


_UINT: dict[int, np.dtype[Any]] = {
    1: np.dtype(np.uint8),
    2: _UINT16,
    4: np.dtype(np.uint32),
    8: np.dtype(np.uint64),
}


def _is_native(dtype: np.dtype[Any]) -> bool:
    """True for NumPy's own integers and floats (ml_dtypes' e5m2 also claims kind ``f``)."""
    return dtype.isbuiltin == 1


def load_f32(view: Array) -> NDArray[np.float32]:
    """Read a view as fp32, as every arithmetic instruction does.

    Args:
        view: storage elements of any type and strides.

    Returns:
        fp32 array of the same shape. Read only by convention: for fp32 storage it is ``view``
        itself, and broadcast (stride 0) axes stay broadcast.
    """
    if view.dtype == _FLOAT32:
        return view
    if 0 in view.strides and view.size > 1:
        one = view[tuple(slice(0, 1) if s == 0 else slice(None) for s in view.strides)]
        return np.broadcast_to(load_f32(one), view.shape) if one.size < view.size else _to_f32(one)
    return _to_f32(view)


def _to_f32(view: Array) -> NDArray[np.float32]:
    if view.dtype.itemsize == 1 and not _is_native(view.dtype):
        return _fp8_to_f32(view.dtype)[bits(view)]
    if view.dtype == _BF16 and view.strides and view.strides[-1] != 2:
        # The cast loop of ml_dtypes is 20 times slower on strided rows than an integer copy.
        view = np.ascontiguousarray(view.view(_UINT16)).view(_BF16)
    return view.astype(_FLOAT32)


_F32_OF_FP8: dict[np.dtype[Any], NDArray[np.float32]] = {}
_FP8_OF_BF16: dict[np.dtype[Any], NDArray[np.uint8]] = {}


def _fp8_to_f32(dtype: np.dtype[Any]) -> NDArray[np.float32]:
    """fp32 value of each of the 256 codes of a one-byte float."""
    table = _F32_OF_FP8.get(dtype)
    if table is None:
        table = np.arange(256, dtype=np.uint8).view(dtype).astype(_FLOAT32)
        _F32_OF_FP8[dtype] = table
    return table


def _f32_to_fp8(values: NDArray[np.float32], dtype: np.dtype[Any]) -> Array:
    """Round fp32 to a one-byte float through a table of 65,536 bf16 codes.

    The value is first rounded to odd at 8 significant bits, which keeps what nearest-even
    rounding to 4 bits or fewer needs, so the result is that of one rounding (Boldo & Melquiond).
    """
    table = _FP8_OF_BF16.get(dtype)
    if table is None:
        every = np.arange(1 << 16, dtype=np.uint16).view(_BF16).astype(_FLOAT32)
        with np.errstate(all="ignore"):
            table = every.astype(dtype).view(np.uint8)
        _FP8_OF_BF16[dtype] = table
    word = np.ascontiguousarray(values).view(np.uint32)
    codes = table[(word >> 16) | ((word & 0xFFFF) != 0)]
    rounded: Array = codes.view(dtype)
    return rounded


def round_tf32(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Round fp32 to 10 explicit mantissa bits, ties to even; infinities and NaN stay."""
    word = np.ascontiguousarray(values).view(np.uint32)
    out = (((word >> 13) & 1) + np.uint32(0xFFF) + word) & np.uint32(0xFFFFE000)
    rounded = out.view(_FLOAT32)
    nan = np.isnan(values)
    return np.where(nan, np.float32(np.nan), rounded) if nan.any() else rounded


def to_integer(values: Array, dtype: np.dtype[Any]) -> Array:
    """Convert to an integer type: nearest even, saturating, NaN -> 0.

    Args:
        values: floating-point or integer array.
        dtype: NumPy integer type of the result.
    """
    info = np.iinfo(dtype)
    if values.dtype.kind in "iu":
        if np.can_cast(values.dtype, dtype):
            return values.astype(dtype)
        wide = values.astype(np.int64, copy=False)
        return np.clip(wide, info.min, info.max).astype(dtype)
    rounded: Array = np.rint(values)
    if values.size == 0:
        return rounded.astype(dtype)
    if dtype.itemsize < 4:
        clipped = np.clip(rounded, info.min, info.max)
        nan = np.isnan(clipped)
        return (np.where(nan, 0, clipped) if nan.any() else clipped).astype(dtype)
    # fp32 cannot hold 2**31 - 1 or 2**32 - 1: an out-of-range test must not rely on them.
    if rounded.min() >= info.min and float(rounded.max()) <= info.max:
        return rounded.astype(dtype)
    wide = np.nan_to_num(rounded.astype(np.float64), nan=0.0, posinf=2.0**40, neginf=-(2.0**40))
    return np.clip(wide, info.min, info.max).astype(dtype)


def convert(values: Array, dtype: np.dtype[Any]) -> Array:
    """Convert an instruction's result to a storage type.

    Args:
        values: fp32, integer or boolean array, or raw elements already of ``dtype``.
        dtype: NumPy storage type.

    Returns:
        array of ``dtype``; ``values`` itself when it is of that type already.
    """
    if values.dtype == dtype:
        return values
    if values.dtype.kind == "b":
        values = values.view(np.uint8)
    if dtype.kind in "iu":
        if not _is_native(values.dtype):
            values = load_f32(values)
        return to_integer(values, dtype)
    if values.dtype != _FLOAT32:
        values = load_f32(values)
    if dtype.itemsize == 1:
        return _f32_to_fp8(values, dtype)
    if dtype == np.float16:
        with np.errstate(over="ignore"):
            return values.astype(dtype)
    return np.ascontiguousarray(values).astype(dtype)


def store(view: Array, values: Array, dtype: DType | None = None) -> None:
    """Write a result into storage, converting to the storage's type.

    Args:
        view: destination, any strides.
        values: as many elements as ``view``, in row-major order (ranks may differ); fp32, integer
            or boolean results, or raw elements of ``view``'s type, which are copied bit for bit.
        dtype: the NKI type of ``view``; needed only for ``tfloat32`` and ``bool``, whose storage
            type (fp32, uint8) does not say how to round. Pass None under ``NKI_PRECISE_FP=0``.
    """
    if values.shape != view.shape:
        values = values.reshape(view.shape)
    if dtype is tfloat32:
        values = round_tf32(convert(values, _FLOAT32))
    elif dtype is bool_ and values.dtype.kind != "b":
        values = values != 0
    raw = convert(values, view.dtype)
    if _is_native(view.dtype):
        view[...] = raw
    else:
        bits(view)[...] = bits(raw)


def store_bits(view: Array, values: Array) -> None:
    """Write the result of a bit operator: no conversion, only the pattern.

    Args:
        view: integer destination, any strides.
        values: unsigned integers, as many elements; high bits that do not fit are dropped, missing
            ones are zero (no document says which; the operators "do not cast").
    """
    raw = bits(view)
    raw[...] = values.reshape(view.shape).astype(raw.dtype, copy=False)
