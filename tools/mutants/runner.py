"""Runs the tests of planted faults, each worker on a copy of the project of its own."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict
from itertools import count
from queue import SimpleQueue
from threading import Lock
from typing import TYPE_CHECKING

from .score import CAUGHT, HARMLESS, SURVIVED, UNDECIDED, Outcome
from .warm import Pytests

if TYPE_CHECKING:
    from pathlib import Path

    from .faults import Fault


class Runner:
    """Plants faults and notes what became of them.

    Args:
        root: the project.
        work: where copies and outcomes are kept.
        limit: CPU seconds that one run of tests may take.
        wide: whether survivors meet the tests of their whole wing.
        warm: other people's packages that are imported once, not once per fault.
    """

    def __init__(
        self, root: Path, work: Path, limit: int = 300, wide: bool = False,
        warm: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self.root, self.work, self.limit, self.wide, self.warm = root, work, limit, wide, warm
        self.files = _files(root)
        self.state = _digest(root, self.files)
        self.sound: dict[str, set[str]] = {}  # by line, the tests that pass without a fault
        self._lock = Lock()
        self._clock = count(2_000_000_000)  # a new time stamp for every text: see `_write`

    def run(self, faults: list[Fault], workers: int, fresh: bool = False) -> list[Outcome]:
        """Outcomes in the order of the faults; known ones are not run again."""
        self.work.mkdir(parents=True, exist_ok=True)
        past = self._past()
        known = {} if fresh else past
        hints = {key.partition("-")[0]: _test(past[key].detail) for key in past}
        bench: SimpleQueue[Pytests] = SimpleQueue()

        def one(fault: Fault) -> Outcome:
            key = self._key(fault)
            if key in known:
                return known[key]
            tests = bench.get()
            before = tests.seconds
            try:
                outcome = self._try(fault, tests, hints.get(fault.digest, ""))
                self._note(key, outcome, tests.seconds - before)
            finally:
                bench.put(tests)
            return outcome

        with ExitStack() as stack, ThreadPoolExecutor(workers) as pool:
            for i in range(workers):
                copy = self._copy(self.work / f"copy{i}")
                bench.put(stack.enter_context(closing(Pytests(copy, self.limit, self.warm))))
            return list(pool.map(one, faults))

    def _try(self, fault: Fault, tests: Pytests, hint: str) -> Outcome:
        """What becomes of a fault: first by the test that noticed it the last time."""
        if fault.harmless:
            return Outcome(fault.wing, fault.name, HARMLESS, fault.harmless)
        lines = [*fault.tests, *(fault.wide if self.wide else ())]
        last = [shlex.quote(hint)] if hint else []
        for line in last + lines:
            noticed, test = self._planted(fault, tests, line)
            if not noticed:
                continue
            if not (failing := self._baseline(line, tests, test)):
                return Outcome(fault.wing, fault.name, CAUGHT, noticed)
            if line not in last:
                return Outcome(fault.wing, fault.name, UNDECIDED, failing)
        where = f"{fault.file}, {fault.why}; passes {' | '.join(lines) or 'no test at all'}"
        return Outcome(fault.wing, fault.name, SURVIVED, where)

    def _planted(self, fault: Fault, tests: Pytests, line: str) -> tuple[str, str]:
        """What pytest says with the fault planted (empty: all pass), and the test that failed."""
        path = tests.copy / fault.file
        text = path.read_text()
        self._write(path, fault.planted(text))
        try:
            code, output = tests.run(line)
        finally:
            self._write(path, text)
        if code == 0:
            return "", ""
        if code in (-signal.SIGXCPU, -signal.SIGKILL):
            return f"{line}: hit the limit of {self.limit} s", ""
        if code < 0:
            return f"{line}: died of {signal.Signals(-code).name}", ""
        return _last(output), _test(output)

    def _baseline(self, line: str, tests: Pytests, test: str) -> str:
        """Why tests prove nothing: up to one, or all, they fail or select nothing without a fault.

        In the order in which they ran with it: the tests before one may be why it fails.
        """
        if test in self.sound.get(line, ()):
            return ""
        code, output = tests.run(line, until=test)
        if code:
            return f"without it, pytest {line} ends with {code}: {_last(output)}"
        passed = re.findall(r"^PASSED (.*)$", output, re.M)
        self.sound.setdefault(line, set()).update([*passed, test])
        return ""

    def _write(self, path: Path, text: str) -> None:
        """Writes with a time stamp of its own, so that no bytecode of another text is taken."""
        path.write_text(text)
        with self._lock:
            stamp = next(self._clock)
        os.utime(path, (stamp, stamp))

    def _copy(self, to: Path) -> Path:
        """The project's files; and the proof that tests there import them, not the installed."""
        shutil.rmtree(to, ignore_errors=True)
        for name in self.files:
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(self.root / name, to / name)
        package = next((f.partition("/")[0] for f in self.files if f.endswith("/__init__.py")), "")
        if package:
            code = f"import importlib.util as u; print(u.find_spec({package!r}).origin)"
            found = subprocess.run(
                [sys.executable, "-c", code], cwd=to, env={**os.environ, "PYTHONPATH": str(to)},
                capture_output=True, text=True, check=True,
            ).stdout  # fmt: skip
            if not found.startswith(str(to)):
                raise RuntimeError(f"tests in {to} would import {found.strip()}")
        return to

    def _key(self, fault: Fault) -> str:
        return f"{fault.digest}-{self.state}{'-wide' * self.wide}"

    def _past(self) -> dict[str, Outcome]:
        path = self.work / "outcomes.jsonl"
        rows = map(json.loads, path.read_text().splitlines()) if path.is_file() else ()
        return {row.pop("key"): Outcome(**row) for row in rows}

    def _note(self, key: str, outcome: Outcome, seconds: float) -> None:
        with self._lock, (self.work / "outcomes.jsonl").open("a") as file:
            file.write(json.dumps({"key": key, **asdict(outcome)}) + "\n")
        name = f"{outcome.wing}/{outcome.name}"
        print(f"{outcome.status:10}{seconds:6.1f} s  {name}", file=sys.stderr, flush=True)


def _files(root: Path) -> list[str]:
    """Every file that belongs to the project, committed or not."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return sorted(name for name in set(listed.split("\0")) if name and (root / name).is_file())


def _digest(root: Path, files: list[str]) -> str:
    """Changes when any file does but the faults themselves, each of which has its own digest."""
    found = hashlib.sha256()
    for name in files:
        if not name.startswith("tools/mutants/"):
            found.update(name.encode() + b"\0" + (root / name).read_bytes())
    return found.hexdigest()[:16]


def _last(output: str) -> str:
    """The first failed test of pytest's summary, else its last line."""
    lines = [line for line in output.splitlines() if line.strip()]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return (failed or lines or ["no output"])[0 if failed else -1][:300]


def _test(output: str) -> str:
    """Name of the first test that failed, by pytest's summary; empty: it names none."""
    found = re.search(r"^(?:FAILED|ERROR) (\S+::.*?)(?: - .*)?$", output, re.M)
    return found[1] if found else ""
