"""nki-library's kernels: AWS's own test functions with AWS's inputs, references and tolerances."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .manager import Manager, Outcome
from .parameters import cases_of, fill

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

PACKAGE = "test.integration.nkilib"


@dataclass(frozen=True)
class TestFunction:
    """One test function of nki-library.

    Attributes:
        file: path of its file under `test/integration/nkilib`, without ".py".
        name: "Class.method", or the name of a plain function.
    """

    __test__ = False  # pytest: a record, no test

    file: str
    name: str

    @property
    def id(self) -> str:
        """Name in the record."""
        return f"{self.file}::{self.name}"

    @classmethod
    def named(cls, name: str) -> TestFunction:
        """The function of an `id`."""
        return cls(*name.split("::"))

    def load(self) -> Callable[..., Any]:
        """The function, a method bound to a new instance; the checkout must be importable."""
        module = importlib.import_module(f"{PACKAGE}.{self.file.replace('/', '.')}")
        owner, _, method = self.name.rpartition(".")
        found: Callable[..., Any] = getattr(getattr(module, owner)() if owner else module, method)
        return found

    def run(self, pick: int, relax: Iterable[str] = ()) -> Outcome:
        """Run one parametrization, unchanged, on the simulator.

        Args:
            pick: which, counted from the smallest.
            relax: rules to note instead of raise.
        """
        function = self.load()
        case = cases_of(function)[pick]
        manager = Manager(frozenset(relax))
        arguments = {
            p: case[p] if p in case else fill(p)
            for p, parameter in inspect.signature(function).parameters.items()
            if p in case or parameter.default is inspect.Parameter.empty
        }
        arguments["test_manager"] = manager
        seed()
        with contextlib.redirect_stdout(io.StringIO()):
            function(**arguments)
        return manager.outcome


def seed() -> None:
    """The same draws every time: some of AWS's tests take inputs, and at import even parameters,
    from the global generators."""
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def functions(root: Path) -> Iterator[TestFunction]:
    """Every test function of the checkout, in the order of its files.

    Raises:
        Exception: a file of AWS's does not import; the caller is to say so.
    """
    folder = root / PACKAGE.replace(".", "/")
    seed()
    for path in sorted(folder.rglob("test_*.py")):
        file = path.relative_to(folder).with_suffix("").as_posix()
        module = importlib.import_module(f"{PACKAGE}.{file.replace('/', '.')}")
        own = {
            k: v for k, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__
        }
        for name, value in own.items():
            if inspect.isfunction(value) and name.startswith("test"):
                yield TestFunction(file, name)
            elif inspect.isclass(value) and name.startswith("Test"):
                for method, _ in inspect.getmembers(value, inspect.isfunction):
                    if method.startswith("test"):
                        yield TestFunction(file, f"{name}.{method}")


def not_for_trn2(function: Callable[..., Any]) -> str:
    """Why AWS itself does not run a test on trn2; "" where it does."""
    for mark in getattr(function, "pytestmark", []):
        if mark.name == "platforms" and "TRN2" in {p.name for p in mark.kwargs.get("exclude", ())}:
            return "AWS's mark leaves trn2 out"
        if mark.name == "skip":
            return "AWS's mark skips it"
    return ""
