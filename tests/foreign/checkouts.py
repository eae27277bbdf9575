"""Where others' repositories are checked out, and how their modules are imported here.

`NKI_LIBRARY_PATH` names a checkout of aws-neuron/nki-library, `AWS_NEURON_SDK_PATH` one of
aws-neuron/aws-neuron-sdk, and so on for each of `VARIABLES`. Nothing of them is copied: kernels,
inputs and references are imported from the checkout. What AWS's tests import beyond that (internal
dtype helpers, cloud metrics, the test orchestrator that drives Trainium hosts) is stood in for by a
few lines each.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest

from nsa_neuron import simulator
from nsa_neuron.simulator.machine.dtypes import convert, find, resolve

if TYPE_CHECKING:
    from collections.abc import Iterator

VARIABLES = {
    "library": "NKI_LIBRARY_PATH",
    "sdk": "AWS_NEURON_SDK_PATH",
    "triton-viz": "TRITON_VIZ_PATH",
    "nkipy": "NKIPY_PATH",
    "nxdi": "NXDI_PATH",
    "samples": "NKI_SAMPLES_PATH",
}


def path_of(repository: str) -> Path | None:
    """Checkout of a repository of `VARIABLES`, or None where its variable is not set.

    Raises:
        FileNotFoundError: the variable names no directory.
    """
    value = os.environ.get(VARIABLES[repository])
    if not value:
        return None
    path = Path(value).expanduser().resolve()
    if not path.is_dir():
        raise FileNotFoundError(f"{VARIABLES[repository]}={value} is not a directory")
    return path


def revision(path: Path) -> str:
    """Commit and date of a checkout."""
    command = ["git", "-C", str(path), "log", "-1", "--format=%h %cs"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def why_missing(repository: str) -> str:
    """Reason of a skip."""
    return f"{VARIABLES[repository]} names no checkout"


def static_cast(values: Any, dtype: Any) -> Any:
    """What AWS's `neuron_dtypes.static_cast` does: an array in another dtype."""
    array = np.asarray(values)
    if find(dtype) is None:
        return array.astype(dtype)
    target = resolve(dtype).numpy
    if array.dtype.kind == "f" and array.dtype.itemsize == 8:
        array = array.astype(np.float32)
    if target.kind not in "iu" and array.dtype != target:
        return convert(array.astype(np.float32), target)
    return array.astype(target)


def _neuron_dtypes() -> dict[str, Any]:
    return {
        "static_cast": static_cast,
        "sizeinbytes": lambda dtype: resolve(dtype).itemsize,
        "is_float_type": lambda dtype: resolve(dtype).is_float,
        "finfo": lambda dtype: ml_dtypes.finfo(resolve(dtype).numpy),
        "bfloat16": ml_dtypes.bfloat16,
        "float8_e4m3": ml_dtypes.float8_e4m3,
        "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
        "float8_e5m2": ml_dtypes.float8_e5m2,
        "float8_e5m2_x4": "float8_e5m2_x4",
        "float8_e4m3fn_x4": "float8_e4m3fn_x4",
        "float4_e2m1fn_x4": "float4_e2m1fn_x4",
    }


class _Anything:
    """Stands for a class that only annotations and unused code name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __class_getitem__(cls, item: Any) -> Any:
        return cls


class _AnyName(types.ModuleType):
    """A module of which every name is `_Anything`."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (_Anything,), {})


def _module(name: str, contents: dict[str, Any]) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update(contents)
    return module


_CLOUD = (
    "allpairspy",
    "aws_embedded_metrics",
    "boto3",
    "botocore",
    "fabric2",
    "filelock",
    "invoke",
    "paramiko",
    "plotext",
    "pytest_html",
    "test.utils.test_orchestrator",
)


class _StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes modules of `_CLOUD` and below out of nothing where they are not installed."""

    def __init__(self) -> None:
        self.names = tuple(n for n in _CLOUD if "." in n or importlib.util.find_spec(n) is None)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname in self.names or fullname.startswith(tuple(n + "." for n in self.names)):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _AnyName(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


# Modules under other names: AWS's tests and annotations use paths that have moved since.
_MOVED = {
    "neuronxcc.nki.typing": "nki.typing",
    "nkilib_src.nkilib.experimental.subkernels": "nkilib_src.nkilib.experimental.collectives",
}


class _Moved(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Serves the modules of `_MOVED` from where they are."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        known = any(fullname == old or old.startswith(fullname + ".") for old in _MOVED)
        if (known and not fullname.startswith("nkilib_src")) or fullname in _MOVED:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> Any:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        """Show the contents, and the folder, of the module that is meant."""
        if module.__name__ in _MOVED:
            source = importlib.import_module(_MOVED[module.__name__])
            module.__path__ = list(getattr(source, "__path__", []))
            vars(module).update({k: v for k, v in vars(source).items() if k[:2] != "__"})


def _without_repeated_docstring(text: str) -> str:
    """`core/mlp/mlp.py`, a dispatcher, repeats half its docstring and does not parse."""
    try:
        ast.parse(text)
    except IndentationError:
        start = text.index('    """\n\n        TKG mode supports:') + len('    """\n')
        end = text.index('    """\n', start) + len('    """\n')
        text = text[:start] + "\n" * text[start:end].count("\n") + text[end:]
    return text


def _with_platforms(text: str) -> str:
    """`test_qkv_tkg.py` names Platforms, which it does not import."""
    if re.search(r"^    Platforms,$", text, re.MULTILINE):
        return text
    first = "from test.integration.nkilib.core.qkv.test_qkv_common import ("
    return text.replace(first, f"from test.utils.common_dataclasses import Platforms; {first}", 1)


_REPAIRS = {
    "nkilib_src.nkilib.core.mlp.mlp": (
        "src/nkilib_src/nkilib/core/mlp/mlp.py",
        _without_repeated_docstring,
    ),
    "test.integration.nkilib.core.qkv.test_qkv_tkg": (
        "test/integration/nkilib/core/qkv/test_qkv_tkg.py",
        _with_platforms,
    ),
}


class _Repaired(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):
    """Loads the files of nki-library that at April 2026 do not import as they are.

    Only what is in the way is changed; a file that imports is loaded unchanged.
    """

    def __init__(self, root: Path) -> None:
        self._files = {name: root / path for name, (path, _) in _REPAIRS.items()}

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        file = self._files.get(fullname)
        if file is None or not file.is_file():
            return None
        return importlib.util.spec_from_loader(fullname, self, origin=str(file))

    def get_filename(self, fullname: str) -> str:
        return str(self._files[fullname])

    def get_data(self, path: str) -> bytes:
        name = next(n for n, file in self._files.items() if str(file) == path)
        return _REPAIRS[name][1](Path(path).read_text()).encode()


def _purge(prefixes: tuple[str, ...]) -> dict[str, types.ModuleType]:
    names = [
        n for n in sys.modules if n in prefixes or n.startswith(tuple(p + "." for p in prefixes))
    ]
    return {n: sys.modules.pop(n) for n in names}


@contextlib.contextmanager
def importable(repository: str, *folders: str) -> Iterator[Path]:
    """Make a checkout's modules importable, on the simulator; undone at the end.

    Args:
        repository: a key of `VARIABLES`.
        folders: put on `sys.path`, relative to the checkout.
    """
    root = path_of(repository)
    assert root is not None
    finders = [_StandInFinder(), _Moved(), _Repaired(root)] if repository == "library" else []
    owned = ("test", "nkilib_src", "neuron_dtypes", "neuronxcc", *_CLOUD)
    saved_modules, saved_path, saved_mark = _purge(owned), list(sys.path), pytest.mark
    saved_environment = dict(os.environ)
    sys.path[:0] = [str(root / f) for f in folders]
    if finders:
        sys.modules["neuron_dtypes"] = _module("neuron_dtypes", _neuron_dtypes())
    pytest.mark = pytest.MarkGenerator(_ispytest=True)  # theirs; ours is strict about names
    try:
        with simulator.activate(target="trn2", nki="0.6"):
            sys.meta_path[:0] = finders
            yield root
    finally:
        _purge(owned)
        sys.meta_path[:] = [f for f in sys.meta_path if f not in finders]
        sys.modules.update(saved_modules)
        sys.path[:] = saved_path
        pytest.mark = saved_mark
        os.environ.clear()
        os.environ.update(saved_environment)
