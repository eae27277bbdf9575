"""Make `import nki` mean the simulator for a while."""

from __future__ import annotations

import importlib
import importlib.abc
import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..rules.versions import NEWEST
from .launch import DEFAULTS, default_options

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import ModuleType

_FACADE = f"{__package__.rpartition('.')[0]}.nki"
_NAMES = (
    "nki",
    "nki.language",
    "nki.isa",
    "nki.isa.constants",
    "nki.collectives",
    "nki.compiler",
    "nki.dtype",
    "nki.typing",
    "nki.meta",
)


class _RefuseOldApi(importlib.abc.MetaPathFinder):
    """Says what to write where a kernel imports NKI 0.1."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname == "neuronxcc" or fullname.startswith("neuronxcc."):
            raise ImportError(
                f"{fullname} is the NKI 0.1 API; write `import nki`, `import nki.language as nl`, "
                "`import nki.isa as nisa` (SDK nki/migration/index.rst)",
                name=fullname,
            )


class Activation:
    """An active simulator; ends at `restore()` or at the end of its `with` block."""

    def __init__(self, **changes: Any) -> None:
        options = replace(default_options(), **changes)
        options.validate()
        self._saved: dict[str, ModuleType] = {
            k: m for k, m in sys.modules.items() if k == "nki" or k.startswith("nki.")
        }
        self._environment = os.environ.get("NKI_SIMULATOR")
        self._finder = _RefuseOldApi()
        self._options = options
        self._active = True
        for name in self._saved:
            del sys.modules[name]
        for name in _NAMES:
            sys.modules[name] = importlib.import_module(_FACADE + name[3:])
        DEFAULTS.append(options)
        os.environ["NKI_SIMULATOR"] = "1"
        sys.meta_path.insert(0, self._finder)

    def restore(self) -> None:
        """Put back what was there before; a second call does nothing."""
        if not self._active:
            return
        self._active = False
        for name in [k for k in sys.modules if k == "nki" or k.startswith("nki.")]:
            del sys.modules[name]
        sys.modules.update(self._saved)
        DEFAULTS.remove(self._options)
        if self._environment is None:
            os.environ.pop("NKI_SIMULATOR", None)
        else:
            os.environ["NKI_SIMULATOR"] = self._environment
        sys.meta_path.remove(self._finder)

    def __enter__(self) -> Activation:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()


def activate(
    target: str = "trn2",
    *,
    relax: Iterable[str] = (),
    data: bool = True,
    precise: bool | None = None,
    strict: bool = False,
    nki: str = NEWEST,
) -> Activation:
    """Make `import nki`, `nki.language`, `nki.isa`, ... resolve to the simulator from now on.

    Args:
        target: machine, "trn2".
        relax: ids of rules to note instead of raise.
        data: False makes every launch shape-only.
        precise: False is NKI_PRECISE_FP=0; None takes it from the environment.
        strict: refuse what a run would only warn of.
        nki: version of NKI, "0.6" or "0.7": the names that there are, and what they mean.

    Returns:
        an `Activation`: a context manager, or call its `restore()`.
    """
    changes: dict[str, Any] = {
        "target": target,
        "relax": frozenset(relax),
        "data": data,
        "strict": strict,
        "nki": nki,
    }
    if precise is not None:
        changes["precise"] = precise
    return Activation(**changes)
