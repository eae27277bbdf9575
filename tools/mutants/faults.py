"""Planted faults as data: one TOML file per wing, each fault a change of one text in one file.

Such a file:

    wing = "conformance"
    tests = ["tests/conformance"]          # what `--wide` runs for those that survive
    files = ["nsa_neuron/conformance/**/*.py"]         # what `--drawn` draws from

    [[fault]]
    name = "budget-factor"
    file = "nsa_neuron/numerics.py"
    old = "factor: float = 2.0"            # must stand there exactly once
    new = "factor: float = 20.0"
    tests = ["tests/reference/test_numerics.py -k largest"]   # arguments of pytest
    why = "every kernel may be ten times worse"
    harmless = "..."                       # only where no test can notice: the proof
"""

from __future__ import annotations

import hashlib
import json
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path

import tomllib

HERE = Path(__file__).parent
KEYS = {"name", "file", "old", "new", "tests", "why", "harmless"}


class StaleFault(Exception):
    """A fault whose text no longer stands in its file, or that is not well formed."""


@dataclass(frozen=True)
class Fault:
    """A planted fault. See the module docstring.

    Attributes:
        wing: part of the project it stands in.
        tests: command lines of pytest, each of which may notice it.
        wide: those of the whole wing.
    """

    wing: str
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    wide: tuple[str, ...]
    why: str
    harmless: str = ""

    def __str__(self) -> str:
        return f"{self.wing}/{self.name}"

    @property
    def digest(self) -> str:
        """Changes when the fault does."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def planted(self, text: str) -> str:
        """The file's text with the fault in it.

        Raises:
            StaleFault: the old text stands there never or more than once.
        """
        count = text.count(self.old)
        if count != 1:
            raise StaleFault(f"{self}: its text stands {count} times in {self.file}, not once")
        return text.replace(self.old, self.new)


def load(folder: Path = HERE) -> list[Fault]:
    """Every fault of every wing.

    Raises:
        StaleFault: a fault is not well formed, or two have one name.
    """
    found: list[Fault] = []
    for path in sorted(folder.glob("*.toml")):
        read = tomllib.loads(path.read_text())
        wing, wide = read["wing"], tuple(read["tests"])
        for i, row in enumerate(read["fault"]):
            if not row.keys() <= KEYS or not KEYS - {"harmless"} <= row.keys():
                raise StaleFault(f"{path.name}: fault {i} must have {', '.join(sorted(KEYS))}")
            if row["old"] == row["new"]:
                raise StaleFault(f"{wing}/{row['name']}: changes nothing")
            found.append(Fault(wing, wide=wide, **{**row, "tests": tuple(row["tests"])}))
    names = [str(fault) for fault in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise StaleFault(f"two faults are named {', '.join(twice)}")
    return found


def files(folder: Path = HERE) -> dict[str, list[str]]:
    """The patterns of each wing's files, from the project's root."""
    read = (tomllib.loads(path.read_text()) for path in sorted(folder.glob("*.toml")))
    return {row["wing"]: row["files"] for row in read}


def stale(faults: list[Fault], root: Path) -> list[str]:
    """What is wrong with faults in a tree: texts that do not match, tests that do not exist."""
    problems = []
    for fault in faults:
        try:
            fault.planted((root / fault.file).read_text())
        except (StaleFault, OSError) as error:
            problems.append(str(error))
        for line in (*fault.tests, *fault.wide):
            path = shlex.split(line)[0].partition("::")[0]
            if not (root / path).exists():
                problems.append(f"{fault}: there is no {path}")
    return problems
