"""Registers every spec as `torch.ops.nsa.<name>`: routing, fake outputs, autograd, vmap.

One router serves every device: it binds and validates a call, asks the registry, runs the lowering
and remembers the choice under the call's sizes. This module reads `OPS` and the registry only; it
knows no concrete backend.
"""

from __future__ import annotations

import os
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import Library, infer_schema

from nsa_neuron.autograd import register_autograd
from nsa_neuron.errors import ContractViolation
from nsa_neuron.ops import OPS, common, get
from nsa_neuron.registry import REGISTRY, Lowered, Target, check_environment, requested
from nsa_neuron.spec import MAY_BE_ZERO, Bound, OpSpec, TensorArg
from nsa_neuron.vmap import register_vmap

if TYPE_CHECKING:
    from nsa_neuron.torch_private import OpOverload

NAMESPACE = "nsa"
LOWERED = "nsa_lowered"  # ops whose backend was chosen at compile time

_library = Library(NAMESPACE, "DEF")
_lowered = Library(LOWERED, "DEF")


class Choice(NamedTuple):
    """What a router remembers about calls of one key.

    Attributes:
        generation: the registry's when the choice was made.
        bound: the sizes.
        lowered: the chosen callable.
        index_names: tensors whose contents are checked at each call, here.
        shared: whether they are offsets only, which the layers of a model share: contents that the
            last call checked are not read again.
    """

    generation: int
    bound: Bound
    lowered: Lowered
    index_names: tuple[str, ...]
    shared: bool


class Router:
    """Runs calls of one op on whichever backend the policy chooses.

    Args:
        spec: the op.
        policy: a fixed `name:mode`; None: what `use_backend`, `NSA_BACKEND` or the tensors' device
            say at each call.
    """

    def __init__(self, spec: OpSpec, policy: str | None = None) -> None:
        self.spec = spec
        self._policy = policy
        self._names = spec.names
        self._position = {name: i for i, name in enumerate(spec.names)}
        self._defaults = [spec.defaults.get(name) for name in spec.names]
        self._tensors = sum(isinstance(arg, TensorArg) for arg in spec.args)
        self._calls: dict[Any, Choice] = {}
        self._checked: tuple[Choice | None, list[tuple[Any, int]]] = (None, [])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # The op decides about dtypes, not autocast: it would cast products inside a lowering.
        if torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return self(*args, **kwargs)
        values = [*args, *self._defaults[len(args) :]]
        for name, value in kwargs.items():
            values[self._position[name]] = value
        # Everything that validation and choice depend on; tensors come before scalars.
        key: list[Any] = [self._policy or requested(), *values[self._tensors :]]
        for x in values[: self._tensors]:
            if x is None:
                key.append(None)
            else:
                key += (x.shape, x.dtype, x.device, x.layout)
        frozen = tuple(key)
        known = self._calls.get(frozen)
        by_name = dict(zip(self._names, values, strict=False))
        if known is None or known.generation != REGISTRY.generation:
            return self._first(frozen, by_name)
        if known.index_names and not (known.shared and self._just_checked(known, by_name)):
            self.spec.check_values(known.bound, by_name)
            if known.shared:
                self._remember(known, by_name)
        return known.lowered(**by_name)

    def _first(self, key: Any, values: dict[str, Any]) -> Any:
        """Binds, validates, chooses; checks what the backend returns, once per choice."""
        bound = self.spec.bind(values)
        index_names = self._to_check(bound)
        if index_names:
            self.spec.check_values(bound, values)
        clamped = common.clamp(bound)
        selection = REGISTRY.select(clamped, key[0])
        lowered = selection.lowered
        if clamped is not bound:
            lowered = _with_clamped(lowered, bound, clamped)
        results = lowered(**values)
        check_results(bound, results, selection.target)
        index_names = tuple(name for name in index_names if name not in selection.checks)
        shared = all(self.spec.tensor(name).optional for name in index_names)
        self._calls[key] = Choice(REGISTRY.generation, bound, lowered, index_names, shared)
        return results

    def _to_check(self, bound: Bound) -> tuple[str, ...]:
        """The given index tensors whose contents are checked at each call. On an accelerator that
        would wait for the device, so there it happens only with NSA_CHECK_VALUES=1."""
        if bound.device.type != "cpu" and os.environ.get("NSA_CHECK_VALUES") != "1":
            return ()
        names = (arg.name for arg in self.spec.tensors if arg.dtype == "i32")
        return tuple(name for name in names if name in bound.shapes)

    def _just_checked(self, known: Choice, values: dict[str, Any]) -> bool:
        """Whether the last call checked the same tensors and torch's version counters say that
        their contents are the same still."""
        last, seen = self._checked
        if known is not last:
            return False
        for name, (ref, version) in zip(known.index_names, seen, strict=True):
            x = values[name]
            if ref() is not x or x._version != version:
                return False
        return True

    def _remember(self, known: Choice, values: dict[str, Any]) -> None:
        tensors = [values[name] for name in known.index_names]
        if not any(x.is_inference() for x in tensors):  # those count no versions
            self._checked = (known, [(weakref.ref(x), x._version) for x in tensors])

    def fake(self, *args: Any, **kwargs: Any) -> Any:
        """Empty results of the right sizes, dtypes and strides (always contiguous)."""
        values = dict(zip(self._names, [*args, *self._defaults[len(args) :]], strict=True))
        values.update(kwargs)
        bound = self.spec.bind(values)
        if torch.compiler.is_exporting():
            _open(bound)
        like = next(value for value in values.values() if isinstance(value, Tensor))
        results = [like.new_empty(shape, dtype=dtype) for _, shape, dtype in bound.returns()]
        return results[0] if len(results) == 1 else tuple(results)


def _open(bound: Bound) -> None:
    """Sizes of results that may be 0 become unknown ones: an exported graph serves all lengths, and
    torch would make a graph for two or more of whatever size it can compute from the inputs'."""
    dims = {symbol for item in bound.spec.returns for symbol in item.dims.split()}
    for symbol in dims.intersection(MAY_BE_ZERO):
        if isinstance(bound.sizes[symbol], torch.SymInt):
            bound.sizes[symbol] = torch.library.get_ctx().new_dynamic_size(min=0)


def _with_clamped(lowered: Lowered, bound: Bound, clamped: Bound) -> Lowered:
    """Calls with clamped scalars; ids that the caller asked for beyond them are padding, -1."""
    smaller = {k: v for k, v in clamped.scalars.items() if v != bound.scalars[k]}
    padding = bound.sizes.get("n", 0) - clamped.sizes.get("n", 0)
    names = [item.name for item in bound.spec.returns]

    def call(**values: Any) -> Any:
        results = lowered(**{**values, **smaller})
        if not padding or "block_indices" not in names:
            return results
        if not isinstance(results, tuple):
            return F.pad(results, (0, padding), value=-1)
        at = names.index("block_indices")
        return (*results[:at], F.pad(results[at], (0, padding), value=-1), *results[at + 1 :])

    return call


def check_results(bound: Bound, results: Any, target: Target) -> None:
    """A backend must return what the fake promised.

    Raises:
        ContractViolation: naming the result.
    """
    given = results if isinstance(results, tuple) else (results,)
    promised = bound.returns()
    if len(given) != len(promised):
        what = f"{len(given)} results, not {len(promised)}"
        raise ContractViolation(f"{target} returned {what} for {bound.spec.name}")
    for (name, shape, dtype), tensor in zip(promised, given, strict=True):
        if not isinstance(tensor, Tensor):
            what = f"a {type(tensor).__name__}, not a tensor"
            raise ContractViolation(f"{target} returned {name} of {bound.spec.name} as {what}")
        if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
            what = f"{tensor.dtype}{list(tensor.shape)}, not {dtype}{list(shape)}"
            raise ContractViolation(f"{target} returned {name} of {bound.spec.name} as {what}")
        if not tensor.is_contiguous():
            raise ContractViolation(
                f"{target} returned {name} of {bound.spec.name} with strides {tensor.stride()}; "
                "results must be contiguous"
            )


def pinned(name: str, target: Target) -> OpOverload:
    """The op `torch.ops.nsa_lowered.<name>__<backend>_<mode>`: one op fixed to one target.

    Compiled graphs call it in place of `torch.ops.nsa.<name>` once a lowering has been chosen.
    """
    short = f"{name}__{target.backend}_{target.mode}".replace("-", "_")
    namespace = getattr(torch.ops, LOWERED)
    if not hasattr(namespace, short):
        _define(_lowered, f"{LOWERED}::{short}", Router(get(name), str(target)))
    overload: OpOverload = getattr(namespace, short).default
    return overload


def _define(library: Library, qualified: str, router: Router) -> None:
    short = qualified.split("::")[1]
    schema = infer_schema(router.spec.reference, mutates_args=())
    library.define(short + schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(short, router, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, router.fake, lib=library)


def _register() -> None:
    routers = [(spec, Router(spec)) for spec in OPS]
    for spec, router in routers:
        qualified = f"{NAMESPACE}::{spec.name}"
        _define(_library, qualified, router)
        register_vmap(_library, qualified, spec)
    for spec, router in routers:
        backward = get(spec.backward) if spec.backward else None
        register_autograd(_library, spec, backward, router)


_register()
check_environment()
