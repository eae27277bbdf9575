"""Registration waits for torch and for our own half-imported modules, and leaves no trace.

On a package of its own: `waits` stands for nsa_neuron, `heavy` for torch, `waits.last` for the
registration. `order` tells which modules were complete when.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from nsa_neuron._when_imported import when_imported

if TYPE_CHECKING:
    from pathlib import Path

ENDS = "\nimport builtins; builtins.order.append(__name__)\n"
MODULES = {
    "heavy.py": "",
    "heavier.py": "",
    "other.py": "import heavy",
    "waits/__init__.py": "",
    "waits/last.py": "import waits.light",
    "waits/light.py": "",
    "waits/needs.py": "import heavy",
    "waits/outer.py": "import waits.inner",
    "waits/inner.py": "import heavy",
    "waits/broken.py": "import heavy\nraise ValueError",
    "waits/space/within.py": "",
    "waits_not/__init__.py": "import heavy",
}


@pytest.fixture
def order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Names of the modules in the order in which they were complete."""
    for name, text in MODULES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text + ENDS)
    ended: list[str] = []
    monkeypatch.setattr("builtins.order", ended, raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = {*sys.modules}
    yield ended
    for name in {*sys.modules} - before:
        if name.partition(".")[0] in ("heavy", "heavier", "other", "waits", "waits_not"):
            del sys.modules[name]


@pytest.mark.parametrize(
    ("first", "wanted"),
    [
        ("heavy", "heavy waits waits.light waits.last"),
        ("other", "heavy waits waits.light waits.last other"),
        ("waits_not", "heavy waits waits.light waits.last waits_not"),
        ("waits.needs", "waits heavy waits.needs waits.light waits.last"),
        ("waits.outer", "waits heavy waits.inner waits.outer waits.light waits.last"),
        ("waits.light", "waits waits.light"),
        ("heavier", "heavier"),
    ],
)
def test_the_follower_comes_behind_the_trigger_and_half_made_siblings(
    order: list[str], first: str, wanted: str
) -> None:
    when_imported("heavy", "waits.last")
    assert order == [], "nothing happens before"
    importlib.import_module(first)
    assert order == wanted.split()


def test_it_happens_once_and_the_finder_goes(order: list[str]) -> None:
    finders = [*sys.meta_path]
    when_imported("heavy", "waits.last")
    assert len(sys.meta_path) == len(finders) + 1
    importlib.import_module("waits.needs")
    assert sys.meta_path == finders
    importlib.reload(sys.modules["heavy"])
    importlib.reload(sys.modules["waits.needs"])
    assert order.count("waits.last") == 1


def test_siblings_before_the_trigger_do_not_count(order: list[str]) -> None:
    when_imported("heavy", "waits.last")
    importlib.import_module("waits.light")
    importlib.import_module("heavier")
    assert "waits.last" not in sys.modules
    importlib.import_module("heavy")
    assert order[-1] == "waits.last"


def test_a_trigger_that_fails_is_waited_for_again(order: list[str], tmp_path: Path) -> None:
    (tmp_path / "heavy.py").write_text("raise ValueError")
    when_imported("heavy", "waits.last")
    with pytest.raises(ValueError):
        importlib.import_module("waits.needs")
    assert "waits.last" not in sys.modules
    (tmp_path / "heavy.py").write_text("# longer than before, so that it is read again" + ENDS)
    importlib.invalidate_caches()
    importlib.import_module("heavy")
    assert order[-1] == "waits.last"


def test_a_sibling_that_fails_behind_the_trigger_holds_nothing_up(order: list[str]) -> None:
    when_imported("heavy", "waits.last")
    with pytest.raises(ValueError):
        importlib.import_module("waits.broken")
    importlib.import_module("waits.inner")
    assert order[-1] == "waits.last"


@pytest.mark.parametrize("name", ["heavy", "waits.light", "waits.needs"])
def test_a_module_has_its_own_loader(order: list[str], name: str) -> None:
    when_imported("heavy", "waits.last")
    module = importlib.import_module(name)
    assert module.__spec__ is not None
    assert type(module.__loader__) is type(module.__spec__.loader) is SourceFileLoader


def test_a_folder_without_code_is_found(order: list[str]) -> None:
    when_imported("heavy", "waits.last")
    assert importlib.util.find_spec("waits.space").loader is None  # type: ignore[union-attr]
    assert importlib.util.find_spec("waits.nowhere") is None
    importlib.import_module("waits.space.within")
    assert order == ["waits", "waits.space.within"]


class Old:
    """A finder of before Python 3.4; Python itself asks it no more from 3.12 on."""

    def find_module(self, name: str, path: Any = None) -> None:
        pass


class Making:
    """A finder and loader of its own kind, as of zip files or frozen programs."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name == "heavy" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = ModuleType(spec.name)
        module.made = "here"  # type: ignore[attr-defined]
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.ran = True  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore:Old:ImportWarning")
def test_other_finders_and_loaders_work_behind_it(order: list[str]) -> None:
    making = Making()
    sys.meta_path[:0] = [making, Old()]  # type: ignore[list-item]
    when_imported("heavy", "waits.last")
    heavy = importlib.import_module("heavy")
    assert (heavy.made, heavy.ran, heavy.__loader__) == ("here", True, making)
    assert order == ["waits", "waits.light", "waits.last"]
