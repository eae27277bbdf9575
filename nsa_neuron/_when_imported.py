"""Imports one module right after another has been imported.

`torch.ops.nsa` must exist whether a program imports torch or nsa_neuron first, and nsa_neuron must
not import torch for people who use the simulator only. So when torch is not there yet, a finder in
`sys.meta_path` waits for it, removes itself, and imports our registration behind it.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType


def when_imported(trigger: str, follower: str) -> None:
    """Imports `follower` as soon as `trigger` has been imported; nothing if that never happens."""
    sys.meta_path.insert(0, _Waiting(trigger, follower))


class _Waiting(MetaPathFinder):
    def __init__(self, trigger: str, follower: str) -> None:
        self.trigger = trigger
        self.follower = follower

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.trigger:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, self.follower)
        return spec


class _Then(Loader):
    """The trigger's own loader, with the follower's import behind it."""

    def __init__(self, loader: Loader, follower: str) -> None:
        self.loader = loader
        self.follower = follower

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        importlib.import_module(self.follower)
