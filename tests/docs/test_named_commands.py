"""Commands and options that any page names exist, wherever they stand: in a sentence, a table, a
block. (test_pages.py runs those of the blocks.)"""

from __future__ import annotations

import contextlib
import io
import re
from functools import cache
from typing import TYPE_CHECKING

import pytest
from console import ROOT

from nsa_neuron.cli import COMMANDS, main

if TYPE_CHECKING:
    from pathlib import Path

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks" / "results" / "README.md",
    ROOT / "tools" / "peers" / "README.md",
]
INLINE = re.compile(r"`([^`\n]+(?:\n[^`\n]+)?)`")
BLOCK = re.compile(r"^```\w*\n.*?^```$|^    [^\n]*$", re.MULTILINE | re.DOTALL)
LINE = re.compile(r"^(?:    |\$ )?((?:nsa|make|python -m) .*)$", re.MULTILINE)
OPTION = re.compile(r"(?<![\w-])--?[a-z][\w-]*")
FOLDERS = {f"--{name}" for name in ("fla", "sfnsa", "xunhao", "fsa", "lucidrains")}
"""Options that tools.peers makes of its peers' names."""
OTHERS = {"nsa_neuron.simulator"}  # its one option is run by test_pages.py


def named(page: Path) -> list[str]:
    """Command lines of a page, without comments and what is piped into."""
    text = page.read_text()
    found = [" ".join(code.split()) for code in INLINE.findall(text)]
    found += [line for block in BLOCK.findall(text) for line in LINE.findall(block)]
    return [re.split(r"\s+#|\s\|\s|;", code)[0] for code in found]


def those(words: str) -> list[tuple[str, str, list[str]]]:
    """Page, name and the rest of every command that starts so."""
    found = []
    for page in PAGES:
        for line in named(page):
            if line.startswith(words) and re.match(r"[a-z]", line.removeprefix(words)):
                name, *rest = line.removeprefix(words).split()
                found.append((page.name, name, rest))
    return found


@cache
def help_of(command: str) -> str:
    """What `nsa COMMAND --help` prints."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit):
        main([command, "--help"])
    return said.getvalue()


def test_commands_of_nsa_and_their_options_exist() -> None:
    known = {command.name for command in COMMANDS}
    lines, options = those("nsa "), 0
    for page, name, rest in lines:
        assert name in known, f"{page}: nsa {name}"
        for option in OPTION.findall(" ".join(rest)):
            options += 1
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", help_of(name)), (page, name, option)
    assert len(lines) > 100 and options > 60


def test_targets_and_variables_of_make_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = {*re.findall(r"^([a-z-]+):", makefile, re.MULTILINE)}
    variables = {*re.findall(r"^([A-Z_]+) \?=", makefile, re.MULTILINE), "ARGS"}
    lines = those("make ")
    for page, name, rest in lines:
        for word in (name, *rest):
            if "=" in word:
                assert word.split("=")[0] in variables, f"{page}: make {word}"
            else:
                assert word in targets, f"{page}: make {word}"
    assert len(lines) > 15


def test_tools_and_their_options_exist() -> None:
    lines = those("python -m ")
    for page, name, rest in lines:
        if name in OTHERS:
            continue
        path = ROOT / name.replace(".", "/")
        file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        assert file.is_file(), f"{page}: python -m {name}"
        for option in OPTION.findall(" ".join(rest)):
            made = FOLDERS if name == "tools.peers" else set()
            assert f'"{option}"' in file.read_text() or option in made, (page, name, option)
    assert len(lines) > 10
