"""Imports one module right after another has been imported.

`torch.ops.nsa` must exist whether a program imports torch or nsa_neuron first, and nsa_neuron must
not import torch for people who use the simulator only. So when torch is not there yet, a finder in
`sys.meta_path` waits for it, removes itself, and imports our registration behind it: at once, or
where a module of ours is what imports torch, when that one is complete. Registration imports most
of our modules, and would find it half made.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType


def when_imported(trigger: str, follower: str) -> None:
    """Imports `follower` as soon as `trigger` has been imported; nothing if that never happens.

    Modules of the follower's package that are being imported then are completed first.
    """
    sys.meta_path.insert(0, _Waiting(trigger, follower))


class _Waiting(MetaPathFinder):
    """Looks on as the trigger and the follower's package are imported.

    Attributes:
        begun: how many of these imports have begun and not ended.
        arrived: whether the trigger is there.
    """

    def __init__(self, trigger: str, follower: str) -> None:
        self.trigger, self.follower = trigger, follower
        self.siblings = follower.rpartition(".")[0] + "."
        self.begun, self.arrived = 0, False

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.trigger and not name.startswith(self.siblings):
            return None
        finders = list(sys.meta_path)  # another thread may take this one out
        for finder in finders[finders.index(self) + 1 :] if self in finders else ():
            find = getattr(finder, "find_spec", None)  # missing in finders of before Python 3.4
            spec: ModuleSpec | None = find(name, path, target) if find else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Watched(spec.loader, self)
                return spec
        return None

    def ended(self, name: str) -> None:
        """An import that had begun is complete."""
        self.arrived = self.arrived or name == self.trigger
        if self.arrived and not self.begun and self in sys.meta_path:
            sys.meta_path.remove(self)
            importlib.import_module(self.follower)


class _Watched(Loader):
    """A module's own loader, which tells when it begins and ends."""

    def __init__(self, loader: Loader, waiting: _Waiting) -> None:
        self.loader, self.waiting = loader, waiting

    def __getattr__(self, name: str) -> Any:
        """Code, source and files, for those who ask before the module is imported (`python -m`)."""
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.waiting.begun += 1
        try:
            self.loader.exec_module(module)
        finally:
            self.waiting.begun -= 1
        self.waiting.ended(module.__name__)
