"""A kernel from `FILE.py::kernel`, and its arguments from text: what command lines need."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..machine.dtypes import UnknownDTypeError, find, resolve
from ..nki.launching import jit
from ..nki.misuse import translate
from ..run.arguments import ShapeDtype
from ..run.launch import Kernel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ..machine.dtypes import DType


class LoadingError(Exception):
    """A file, kernel or argument named on a command line cannot be used."""


@contextmanager
def imported(path: str | Path) -> Iterator[Any]:
    """A file as a module, with its folder (or its package's) on `sys.path` meanwhile.

    Modules that its import brought in are forgotten at the end. Activate the simulator around it.

    Raises:
        LoadingError: there is no such file, or it is not Python.
        SimulationError: it uses what NKI has not.
    """
    file = Path(path).resolve()
    if not file.is_file():
        raise LoadingError(f"no file {path}")
    if file.suffix != ".py":
        raise LoadingError(f"{path} is no Python file: write FILE.py::KERNEL")
    names, root = [file.stem], file.parent
    while (root / "__init__.py").exists():
        names.insert(0, root.name)
        root = root.parent
    name = ".".join(names)
    before, saved_path = dict(sys.modules), list(sys.path)
    sys.modules.pop(name, None)
    sys.path.insert(0, str(root))
    importlib.invalidate_caches()
    try:
        yield _import(name, file)
    finally:
        sys.path[:] = saved_path
        for added in [n for n in sys.modules if n not in before and _below(n, root)]:
            del sys.modules[added]
        if name in before:
            sys.modules[name] = before[name]


def _import(name: str, file: Path) -> Any:
    """The module, or a refusal at its own line instead of a traceback through the simulator."""
    try:
        return importlib.import_module(name)
    except SyntaxError as error:
        place = f"{error.filename or file}:{error.lineno or 1}"
        raise LoadingError(f"{place}: {error.msg}") from None
    except SystemExit as error:  # else a test job would read the file's exit code as the kernel's
        raise LoadingError(f"{file} ends the process (exit code {error.code}) on import") from None
    except Exception as error:
        refusal = translate(error)
        if refusal is None:
            raise
        raise refusal from None


def _below(name: str, root: Path) -> bool:
    """Whether a loaded module comes from a folder."""
    file = getattr(sys.modules[name], "__file__", None)
    return bool(file) and root in Path(str(file)).resolve().parents


def split(target: str) -> tuple[str, str]:
    """File and kernel name of `FILE.py::kernel`; the name is "" where it is left out."""
    path, _, name = target.partition("::")
    return path, name


def find_kernel(module: Any, name: str) -> Kernel:
    """The kernel of a module; its only one where the name is "".

    Raises:
        LoadingError: naming the kernels there are.
    """
    kernels = {k: v for k, v in vars(module).items() if isinstance(v, Kernel)}
    own = {k: v for k, v in kernels.items() if v.fn.__module__ == module.__name__}
    listed = ", ".join(sorted(own or kernels)) or "none decorated with @nki.jit"
    if not name:
        if len(own) == 1:
            return next(iter(own.values()))
        raise LoadingError(f"which kernel? write {module.__file__}::NAME; there are: {listed}")
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if isinstance(found, Kernel):
        return found
    if inspect.isfunction(found):
        kernel: Kernel = jit(found)
        return kernel
    raise LoadingError(f"no kernel {name!r} in {module.__file__}; there are: {listed}")


def parse_arguments(kernel: Kernel, words: Sequence[str], seed: int, data: bool) -> dict[str, Any]:
    """Arguments of a call from `name=value` words.

    Raises:
        LoadingError: a word that cannot be read, an unknown name, or a missing argument.
    """
    signature = inspect.signature(kernel.fn)
    rng = np.random.default_rng(seed)
    values: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise LoadingError(f"--arg {word}: write NAME=VALUE, e.g. {_example(kernel)}")
        if name not in signature.parameters:
            raise LoadingError(f"--arg {word}: {kernel.fn.__name__}{signature} has no {name!r}")
        try:
            values[name] = parse_value(text, rng, data)
        except LoadingError as error:
            raise LoadingError(f"--arg {word}: {error}") from None
    for name, parameter in signature.parameters.items():
        optional = parameter.default is not parameter.empty or parameter.kind in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        )
        if name not in values and not optional:
            raise LoadingError(
                f"{kernel.fn.__name__}{signature} needs {name}: --arg {name}=randn:128x512:bf16"
            )
    return values


def _example(kernel: Kernel) -> str:
    name = next(iter(inspect.signature(kernel.fn).parameters), "a")
    return f"{name}=randn:128x512:bf16"


def _arange(shape: tuple[int, ...], rng: Any) -> Any:
    return np.arange(int(np.prod(shape)), dtype=np.float64).reshape(shape)


_FILLS: dict[str, Callable[..., Any]] = {
    "randn": lambda shape, rng: rng.standard_normal(shape),
    "rand": lambda shape, rng: rng.random(shape),
    "zeros": lambda shape, rng: np.zeros(shape),
    "ones": lambda shape, rng: np.ones(shape),
    "arange": _arange,
    "full": lambda shape, rng, value: np.full(shape, value),
    "randint": lambda shape, rng, low, high: rng.integers(low, high, shape),
}
_TENSOR = re.compile(r"(\w+)(?:\(([^)]*)\))?:(\d+(?:x\d+)*)(?::([\w.]+))?")
HELP = (
    "randn:128x512:bf16, rand, zeros, ones, arange, full(2.5):8x8:fp32, randint(0,10):8x1:int32, "
    "a file.npy, a number, true, none, a dtype (dtype:bf16), a (1,2) tuple, or text"
)


def parse_value(text: str, rng: np.random.Generator, data: bool = True) -> Any:
    """One argument.

    Args:
        text: a tensor `FILL[(numbers)]:SHAPE[:DTYPE]` (dtype float32 unless given), an `.npy` file,
            `dtype:NAME`, a Python literal, none/true/false, or any other text as a string.
        rng: source of random fills.
        data: False gives `ShapeDtype` instead of arrays.

    Raises:
        LoadingError: what is wrong and what can be written.
    """
    tensor = _TENSOR.fullmatch(text)
    if tensor:
        return _tensor(tensor, rng, data)
    if text.endswith(".npy"):
        return _file(text, data)
    if text.startswith("dtype:"):
        return _dtype(text.removeprefix("dtype:"))
    words = {"none": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    if text.partition(":")[0].partition("(")[0] in _FILLS:
        raise LoadingError(f"cannot read {text!r}; write e.g. {HELP}")
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _tensor(match: re.Match[str], rng: np.random.Generator, data: bool) -> Any:
    fill, extra, dims, name = match.groups()
    if fill not in _FILLS:
        raise LoadingError(f"no fill {fill!r}; there are {', '.join(_FILLS)}")
    shape = tuple(int(n) for n in dims.split("x"))
    dtype = _dtype(name or "float32")
    if not data:
        return ShapeDtype(shape, dtype)
    try:
        numbers = [float(n) if "." in n else int(n) for n in (extra or "").split(",") if n.strip()]
        values = _FILLS[fill](shape, rng, *numbers)
    except (TypeError, ValueError):
        raise LoadingError(f"{fill} cannot use ({extra or ''}); write e.g. {HELP}") from None
    return np.asarray(values).astype(np.bool_ if dtype.kind == "bool" else dtype.numpy)


def _file(text: str, data: bool) -> Any:
    if not Path(text).is_file():
        raise LoadingError(f"no file {text}")
    array = np.load(text, allow_pickle=False)
    if find(array.dtype) is None:
        raise LoadingError(f"{text} holds {array.dtype}, which NKI has no dtype for")
    return array if data else ShapeDtype(array.shape, array.dtype)


def _dtype(name: str) -> DType:
    try:
        return resolve(name)
    except UnknownDTypeError as error:
        raise LoadingError(str(error)) from None
