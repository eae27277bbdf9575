"""What an operation is: arguments, constraints, reference, comparison, cases and cost.

An `OpSpec` is the one place that says what an operation means. Validation, fake outputs, cache
keys, costs, the command line and the tests all read the `Bound` that binding arguments to a spec
gives. Sizes in a `Bound` may be symbolic (`torch.SymInt`), so one binding serves eager calls, fake
tensors and exported programs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nsa_neuron.cases import cast
from nsa_neuron.errors import InvalidArgument, InvalidType

if TYPE_CHECKING:
    from nsa_neuron.cases import Case
    from nsa_neuron.numerics import Comparator

Size = Any  # int or torch.SymInt

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MAX_INT = 2**31 - 1
"""Largest integer argument: no size is larger, and kernels take them as 32-bit numbers."""
MAY_BE_ZERO = ("Nc", "Nc_out")  # short sequences have no compressed block
_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int, torch.SymInt),
    "float": (float, int, torch.SymFloat, torch.SymInt),
    "str": (str,),
}


@dataclass(frozen=True)
class TensorArg:
    """A tensor argument.

    Attributes:
        name: as in the signature.
        dims: symbols of its dimensions, such as `"B T Hkv Dk"`, or fixed sizes; several legal
            forms are separated by `|`. The first argument with a symbol fixes its size, later
            ones must agree.
        dtype: `"float"` (the call's one floating dtype), `"stat"` (float32, or float64 in a
            float64 call: statistics such as lse), `"i32"`.
        optional: may be None.
        differentiable: a gradient flows to it.
    """

    name: str
    dims: str
    dtype: str = "float"
    optional: bool = False
    differentiable: bool = False

    @property
    def forms(self) -> tuple[tuple[str, ...], ...]:
        return tuple(tuple(form.split()) for form in self.dims.split("|"))


@dataclass(frozen=True)
class ScalarArg:
    """A scalar argument; integers become the size `symbol` of the bound call.

    Attributes:
        name: as in the signature.
        kind: `"int"`, `"float"` or `"str"`.
        symbol: the contract's name (`l`, `d`, `m`, `n`, `w`); empty: not a size.
        minimum: smallest legal value.
        choices: legal values of a string.
        optional: may be None.
    """

    name: str
    kind: str = "int"
    symbol: str = ""
    minimum: int | None = None
    choices: tuple[str, ...] = ()
    optional: bool = False


@dataclass(frozen=True)
class Return:
    """A result: its dims in the symbols of the arguments, or `like` an argument."""

    name: str
    dims: str = ""
    dtype: str = "float"
    like: str = ""


@dataclass
class Bound:
    """A spec with one call's sizes. Holds no tensor, so it can be kept in caches.

    Attributes:
        spec: the operation.
        sizes: value of every symbol; ints or SymInts.
        scalars: value of every scalar argument.
        shapes: shape of every tensor that was given; `shape_of` of an absent one is None.
        dtype: the call's floating dtype.
        device: where every tensor lies.
    """

    spec: OpSpec
    sizes: dict[str, Size]
    scalars: dict[str, Any]
    shapes: dict[str, tuple[Size, ...]]
    dtype: torch.dtype
    device: torch.device

    def __getitem__(self, symbol: str) -> Size:
        return self.sizes[symbol]

    @property
    def packed(self) -> bool:
        """Whether sequences lie back to back along the token axis."""
        return "cu_seqlens_q" in self.shapes or "cu_seqlens_k" in self.shapes

    @property
    def group(self) -> Size:
        """G, the query heads that share a kv head."""
        return self.sizes["Hq"] // self.sizes["Hkv"]

    @property
    def stat_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def returns(self) -> list[tuple[str, tuple[Size, ...], torch.dtype]]:
        """Name, shape and dtype of every result; an absent input's gradient is empty, `[0]`."""
        dtypes = {"float": self.dtype, "stat": self.stat_dtype, "i32": torch.int32}
        rows = []
        for item in self.spec.returns:
            if item.like:
                shape = self.shapes.get(item.like, (0,))
                kind = self.spec.tensor(item.like).dtype
            else:
                shape, kind = tuple(self.sizes[s] for s in item.dims.split()), item.dtype
            rows.append((item.name, shape, dtypes[kind]))
        return rows

    def describe(self) -> str:
        """One line for people: `q=bf16[1, 8, 4, 64], window=512`."""
        short = str(self.dtype).removeprefix("torch.")
        shapes = [f"{name}{list(shape)}" for name, shape in self.shapes.items()]
        scalars = [f"{name}={value}" for name, value in self.scalars.items() if value is not None]
        return ", ".join([f"{short} on {self.device}", *shapes, *scalars])


@dataclass(frozen=True)
class Cost:
    """What a call must do at least: counted, not measured.

    Attributes:
        flops: floating-point operations of its matmuls (a multiply-add is 2).
        bytes: bytes read and written once each.
    """

    flops: int
    bytes: int


@dataclass(frozen=True, eq=False)  # there is one object per op, which can be a key
class OpSpec:
    """One operation. See the module docstring.

    Attributes:
        name: the public name, the name in `torch.ops.nsa`, and the stem of kernel files.
        args: tensor and scalar arguments in the order of the reference's signature.
        returns: results in order.
        reference: plain torch, right for every legal input, float64-capable; its signature is the
            op's schema and its docstring the public documentation.
        derive: computes derived sizes (`Nc`) and refuses illegal combinations; runs on SymInts.
        check_values: refuses illegal contents of index tensors; reads data.
        compare: how each result is judged against the float64 reference.
        cases: inputs that every backend is tried on.
        inputs: makes the tensors of a case.
        cost: counts a call.
        backward: name of the op that gives gradients; empty: not differentiable.
        saves: names of the results that the backward op takes, after the gradients and inputs.
        typical: sizes of a typical call where they are not those of every op, by symbol.
    """

    name: str
    args: tuple[TensorArg | ScalarArg, ...]
    returns: tuple[Return, ...]
    reference: Callable[..., Any]
    derive: Callable[[Bound], None]
    check_values: Callable[[Bound, Mapping[str, Any]], None]
    compare: Mapping[str, Comparator]
    cases: tuple[Case, ...]
    inputs: Callable[[Case, torch.Generator], dict[str, Any]]
    cost: Callable[[Bound], Cost]
    backward: str = ""
    saves: tuple[str, ...] = ()
    typical: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def direction(self) -> str:
        """`"backward"` of an op that gives another's gradients, else `"forward"`."""
        return "backward" if self.name.endswith("_backward") else "forward"

    @cached_property
    def stem(self) -> str:
        """The name that a forward op and its backward op share: of kernels, launchers, plans."""
        return self.name.removesuffix("_backward")

    @cached_property
    def paged(self) -> bool:
        """Whether keys and values lie in pages of caches, whose lengths are on the device."""
        return any(arg.dims.startswith("pages_") for arg in self.tensors)

    @cached_property
    def takes_scale(self) -> bool:
        """Whether logits are scaled, by an argument that may be left out."""
        return "scale" in self.defaults

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(arg.name for arg in self.args)

    @cached_property
    def tensors(self) -> tuple[TensorArg, ...]:
        return tuple(arg for arg in self.args if isinstance(arg, TensorArg))

    @cached_property
    def scalars(self) -> tuple[ScalarArg, ...]:
        return tuple(arg for arg in self.args if isinstance(arg, ScalarArg))

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """Default values of the arguments that have one."""
        parameters = inspect.signature(self.reference).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not p.empty}

    def arguments(self, case: Case, dtype: torch.dtype) -> dict[str, Any]:
        """Every argument of a case by name, floating tensors in `dtype`.

        Statistics (lse) are float32, or float64 in float64 calls. The same case in another dtype
        holds the same numbers, but for what the op's own forward computes (o, lse of backward ops),
        which is rounded from float64.
        """
        stats = tuple(arg.name for arg in self.tensors if arg.dtype == "stat")
        made = {**self.defaults, **case.scalars, **self.inputs(case, case.generator())}
        return cast({name: made[name] for name in self.names}, dtype, stats)

    def tensor(self, name: str) -> TensorArg:
        return next(arg for arg in self.tensors if arg.name == name)

    def bind(self, values: Mapping[str, Any]) -> Bound:
        """Resolves and validates one call's arguments, without reading tensor contents.

        Args:
            values: every argument by name.

        Raises:
            InvalidArgument, InvalidType: naming the argument, what it is, what it must be.
        """
        try:
            return self._bind(values)
        except InvalidArgument as error:
            if not self._transposed(values):
                raise
            hint = (
                f"{error.expected}. The tensors look like [B, H, S, D], as "
                "scaled_dot_product_attention takes them; nsa ops take [B, S, H, D]: "
                "x.transpose(1, 2)"
            )
            raise type(error)(self.name, error.argument, error.found, hint) from None

    def _transposed(self, values: Mapping[str, Any]) -> bool:
        """Whether q and its keys make sense with heads and tokens exchanged."""
        keys = (arg.name for arg in self.tensors if arg.dims == "B T Hkv Dk")
        q, k = values.get("q"), values.get(next(keys, ""))
        if not (isinstance(q, Tensor) and isinstance(k, Tensor)) or q.is_nested or k.is_nested:
            return False
        if not q.dim() == k.dim() == 4:
            return False
        _, heads, tokens, _ = q.shape
        _, kv_heads, kv_tokens, _ = k.shape
        fits = kv_heads > 0 and heads % kv_heads == 0 and kv_tokens >= tokens
        return bool(fits and heads < tokens)

    def _bind(self, values: Mapping[str, Any]) -> Bound:
        sizes: dict[str, Size] = {}
        given = {arg.name: self._tensor(arg, values[arg.name]) for arg in self.tensors}
        present = {name: tensor for name, tensor in given.items() if tensor is not None}
        scalars = {arg.name: self._scalar(arg, values[arg.name]) for arg in self.scalars}
        sizes.update({arg.symbol: scalars[arg.name] for arg in self.scalars if arg.symbol})
        dtype, device = self._common(present)
        for arg in self.tensors:
            if arg.name in present:
                self._bind_dims(arg, tuple(present[arg.name].shape), sizes)
        shapes = {name: tuple(tensor.shape) for name, tensor in present.items()}
        bound = Bound(self, sizes, scalars, shapes, dtype, device)
        self.derive(bound)
        return bound

    def refuse(self, argument: str, found: object, expected: str) -> InvalidArgument:
        return InvalidArgument(self.name, argument, found, expected)

    def _tensor(self, arg: TensorArg, value: Any) -> Tensor | None:
        if value is None and arg.optional:
            return None
        if not isinstance(value, Tensor):
            raise InvalidType(self.name, arg.name, type(value).__name__, "a torch.Tensor")
        if value.is_nested:
            expected = "a dense tensor; pack sequences back to back and give cu_seqlens instead"
            raise InvalidType(self.name, arg.name, "a nested tensor", expected)
        if value.layout != torch.strided:
            raise InvalidType(self.name, arg.name, str(value.layout), "a dense (strided) tensor")
        ranks = [len(form) for form in arg.forms]
        if value.dim() not in ranks:
            wanted = " or ".join(f"[{', '.join(form)}]" for form in arg.forms)
            raise self.refuse(arg.name, f"of shape {list(value.shape)}", f"of shape {wanted}")
        return value

    def _scalar(self, arg: ScalarArg, value: Any) -> Any:
        if value is None and arg.optional:
            return None
        right_type = isinstance(value, _KINDS[arg.kind])
        if isinstance(value, bool) or not right_type:
            found = f"{value!r} ({type(value).__name__})"
            raise InvalidType(self.name, arg.name, found, f"of type {arg.kind}")
        if arg.minimum is not None and value < arg.minimum:
            raise self.refuse(arg.name, value, f"at least {arg.minimum}")
        if type(value) is int and value > MAX_INT:  # a SymInt would be guarded
            raise self.refuse(arg.name, value, f"at most {MAX_INT}")
        if arg.choices and value not in arg.choices:
            raise self.refuse(arg.name, repr(value), f"one of {', '.join(arg.choices)}")
        if arg.kind == "float" and isinstance(value, float) and not abs(value) < float("inf"):
            raise self.refuse(arg.name, value, "finite")
        return value

    def _common(self, present: Mapping[str, Tensor]) -> tuple[torch.dtype, torch.device]:
        first = next(iter(present))
        dtype, device = present[first].dtype, present[first].device
        if dtype not in FLOATS:
            raise InvalidType(self.name, first, str(dtype), f"one of {_names(FLOATS)}")
        stat = torch.float64 if dtype == torch.float64 else torch.float32
        for arg in self.tensors:
            if arg.name not in present:
                continue
            tensor = present[arg.name]
            wanted = {"float": dtype, "stat": stat, "i32": torch.int32}[arg.dtype]
            if tensor.dtype != wanted:
                why = f" like '{first}'" if arg.dtype == "float" else ""
                raise InvalidType(self.name, arg.name, str(tensor.dtype), f"{wanted}{why}")
            if tensor.device != device:
                found = f"on {tensor.device}"
                raise self.refuse(arg.name, found, f"on {device} like '{first}'")
        return dtype, device

    def _bind_dims(self, arg: TensorArg, shape: tuple[Size, ...], sizes: dict[str, Size]) -> None:
        form = next(form for form in arg.forms if len(form) == len(shape))
        for axis, (symbol, size) in enumerate(zip(form, shape, strict=True)):
            wanted = int(symbol) if symbol.isdigit() else sizes.setdefault(symbol, size)
            if symbol not in MAY_BE_ZERO and size < 1:
                found = f"of shape {list(shape)}, size {size} at axis {axis}"
                raise self.refuse(arg.name, found, f"at least 1 there ({symbol})")
            if differ(size, wanted):
                found = f"of shape {list(shape)}, size {size} at axis {axis}"
                named = "" if symbol.isdigit() else f"{symbol} = "
                raise self.refuse(arg.name, found, f"{named}{wanted} there")


def differ(a: Size, b: Size) -> bool:
    """Whether two sizes are different, as far as can be known without running; an op that is run
    compares numbers."""
    if type(a) is int and type(b) is int:
        return a != b
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(a != b)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
