"""What is tried: a user's model or function, its inputs, and how it decodes."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nsa_neuron.agree import saved
from nsa_neuron.errors import NsaError

if TYPE_CHECKING:
    from types import ModuleType

Decode = Callable[[Callable[..., Any], Tensor, int], tuple[Tensor, Tensor]]
"""`decode(model, tokens, steps)` -> tokens `[B, steps]`, the logits each was chosen from
`[B, steps, V]`."""


@dataclass(frozen=True)
class Subject:
    """A model or function with the inputs that it is tried on.

    Attributes:
        name: for people.
        model: called as `model(*args, **kwargs)`.
        args, kwargs: its inputs; tensors may stand in tuples, lists, dictionaries, dataclasses.
        decode: how it continues token ids; None: by running the whole again for each token, if its
            only positional input is integers `[B, S]`.
    """

    name: str
    model: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    decode: Decode | None = None

    def placed(self, device: str | torch.device, dtype: torch.dtype | None = None) -> Subject:
        """A copy whose floating tensors have a dtype (default: their own) on a device."""

        def move(x: Tensor) -> Tensor:
            kind = dtype if x.is_floating_point() and dtype else x.dtype
            moved = x.detach().to(device, kind, copy=True)
            return moved.requires_grad_(moved.is_floating_point())

        model = self.model
        if isinstance(model, nn.Module):
            model = copy.deepcopy(model).to(device)
            if dtype is not None:
                model = model.to(dtype)
            model.eval()
        args = tuple(mapped(move, x) for x in self.args)
        kwargs = {name: mapped(move, x) for name, x in self.kwargs.items()}
        return Subject(self.name, model, args, kwargs, self.decode)

    def __call__(self) -> Any:
        return self.model(*self.args, **self.kwargs)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Every module by its qualified name; the model itself is the empty name."""
        return dict(self.model.named_modules()) if isinstance(self.model, nn.Module) else {}

    @property
    def leaves(self) -> dict[str, Tensor]:
        """Every tensor that gets a gradient, by name."""
        found: dict[str, Tensor] = {}
        if isinstance(self.model, nn.Module):
            found |= {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        inputs = [*enumerate(self.args), *self.kwargs.items()]
        for name, value in inputs:
            for i, x in enumerate(tensors(value)):
                if x.requires_grad:
                    found[f"input {name}" + (f"[{i}]" if i else "")] = x
        return found

    @property
    def prompt(self) -> Tensor | None:
        """The token ids `[B, S]` that decoding continues; None: the inputs are none."""
        first = self.args[0] if len(self.args) == 1 else None
        fits = isinstance(first, Tensor) and first.dim() == 2 and not first.is_floating_point()
        return first if fits else None

    def describe(self) -> str:
        """One line: the model's class and parameters, the inputs."""
        what = getattr(self.model, "__name__", type(self.model).__name__)
        if isinstance(self.model, nn.Module):
            parameters = list(self.model.parameters())
            kinds = sorted({str(p.dtype).removeprefix("torch.") for p in parameters})
            count = sum(p.numel() for p in parameters)
            what = f"{type(self.model).__name__}, {count:,} parameters ({', '.join(kinds)})"
        shown = [
            f"{name}: {str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
            for name, value in [*enumerate(self.args), *self.kwargs.items()]
            for x in tensors(value)
        ]
        return f"{what}; inputs {', '.join(shown) or 'none'}"


def load(text: str) -> Subject:
    """The subject that `FILE.py::make` gives.

    `make()` returns `(model, inputs)`: an `nn.Module` or a function, and a tensor, a tuple of
    positional inputs or a dictionary of keyword inputs. If the file also defines `decode(model,
    tokens, steps)`, see `Decode`, decoding uses it. A file of `nsa agree --save` is the call in it.

    Raises:
        NsaError: no such file or function, or what it returns is nothing of the kind.
    """
    path, _, name = text.partition("::")
    if path.endswith(saved.SUFFIX):
        call = saved.load(Path(path))
        return Subject(path, call.function, (), call.values)
    name = name or "make"
    text = f"{path}::{name}"
    with imported(Path(path)) as module:
        make = getattr(module, name, None)
        if not callable(make):
            raise NsaError(f"{path} has no function '{name}'")
        with _said_briefly(text):
            made = make()
    if not isinstance(made, tuple) or len(made) != 2 or not callable(made[0]):
        raise NsaError(f"{text} returned {type(made).__name__}; it must return (model, inputs)")
    model, inputs = made
    if not isinstance(inputs, (Tensor, tuple, dict)):
        raise NsaError(
            f"{text} returned inputs of type {type(inputs).__name__}; they must be a tensor, a "
            "tuple of positional or a dict of keyword inputs"
        )
    args = (inputs,) if isinstance(inputs, Tensor) else inputs if isinstance(inputs, tuple) else ()
    kwargs = inputs if isinstance(inputs, dict) else {}
    return Subject(text, model, args, kwargs, getattr(module, "decode", None))


@contextmanager
def imported(path: Path) -> Iterator[ModuleType]:
    """The module of a file, whose folder is on the path meanwhile."""
    if not path.is_file():
        raise NsaError(f"there is no file {path}")
    # A name of its own: a user's `random.py` must not become everybody's `random`.
    spec = importlib.util.spec_from_file_location(f"subject_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise NsaError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look their annotations up there
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        with _said_briefly(str(path)):
            spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(folder)


@contextmanager
def _said_briefly(what: str) -> Iterator[None]:
    """Turns what a user's file raises into one line with its place; NSA_DEBUG=1 shows all."""
    try:
        yield
    except (Exception, SystemExit) as error:  # sys.exit(0) would say that every target agrees
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{frame.filename}:{frame.lineno}"
        raise NsaError(f"{what} raised {type(error).__name__}: {error} ({place})") from error


def mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A value with a function applied to every tensor in its tuples, lists, dictionaries and
    dataclasses."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {name: mapped(function, x) for name, x in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a named tuple
        return type(value)(*(mapped(function, x) for x in value))
    if isinstance(value, (tuple, list)):
        return type(value)(mapped(function, x) for x in value)
    if fields := _fields(value):
        return dataclasses.replace(value, **mapped(function, fields))
    return value


def tensors(value: Any) -> Sequence[Tensor]:
    """The tensors in a value's tuples, lists, dictionaries (transformers' outputs are those) and
    dataclasses."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [x for part in value.values() for x in tensors(part)]
    if isinstance(value, (tuple, list)):
        return [x for part in value for x in tensors(part)]
    return [x for part in _fields(value).values() for x in tensors(part)]


def _fields(value: Any) -> dict[str, Any]:
    """What a dataclass's object is made of; empty: it is none."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return {}
    return {each.name: getattr(value, each.name) for each in dataclasses.fields(value) if each.init}
