"""Runs the tests of planted faults, each worker on a copy of the project of its own."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import count
from queue import SimpleQueue
from threading import Lock
from typing import TYPE_CHECKING

from .score import CAUGHT, HARMLESS, SURVIVED, UNDECIDED, Outcome

if TYPE_CHECKING:
    from pathlib import Path

    from .faults import Fault

FAILED, BROKEN_OFF = 1, 2  # pytest's exit codes: tests fail, and even to be collected
SLOWEST = 20  # seconds of wall time granted for one of CPU time, on a machine with other work


class Runner:
    """Plants faults and notes what became of them.

    Args:
        root: the project.
        work: where copies and outcomes are kept.
        limit: CPU seconds that one run of tests may take.
        wide: whether survivors meet the tests of their whole wing.
    """

    def __init__(self, root: Path, work: Path, limit: int = 300, wide: bool = False) -> None:
        self.root, self.work, self.limit, self.wide = root, work, limit, wide
        self.files = _files(root)
        self.state = _digest(root, self.files)
        self.sound: dict[str, str] = {}
        self._lock = Lock()
        self._clock = count(2_000_000_000)  # a new time stamp for every text: see `_write`

    def run(self, faults: list[Fault], workers: int, fresh: bool = False) -> list[Outcome]:
        """Outcomes in the order of the faults; known ones are not run again."""
        self.work.mkdir(parents=True, exist_ok=True)
        known = {} if fresh else self._known()
        copies: SimpleQueue[Path] = SimpleQueue()
        for i in range(workers):
            copies.put(self._copy(self.work / f"copy{i}"))

        def one(fault: Fault) -> Outcome:
            key = self._key(fault)
            if key in known:
                return known[key]
            copy = copies.get()
            try:
                outcome = self._try(fault, copy)
            finally:
                copies.put(copy)
            self._note(key, outcome)
            return outcome

        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(one, faults))

    def _try(self, fault: Fault, copy: Path) -> Outcome:
        if fault.harmless:
            return Outcome(fault.wing, fault.name, HARMLESS, fault.harmless)
        lines = [*fault.tests, *(fault.wide if self.wide else ())]
        path = copy / fault.file
        text = path.read_text()
        for line in lines:
            if failing := self._baseline(line, copy):
                return Outcome(fault.wing, fault.name, UNDECIDED, failing)
            self._write(path, fault.planted(text))
            try:
                noticed = self._noticed(*self._pytest(line, copy), line)
            finally:
                self._write(path, text)
            if noticed:
                return Outcome(fault.wing, fault.name, CAUGHT, noticed)
        where = f"{fault.file}, {fault.why}; passes {' | '.join(lines)}"
        return Outcome(fault.wing, fault.name, SURVIVED, where)

    def _baseline(self, line: str, copy: Path) -> str:
        """Why tests prove nothing: they fail, or select nothing, without any fault."""
        if line not in self.sound:
            code, output = self._pytest(line, copy)
            failing = f"without it, pytest {line} ends with {code}: {_last(output)}"
            self.sound[line] = failing if code else ""
        return self.sound[line]

    def _noticed(self, code: int, output: str, line: str) -> str:
        """What noticed a fault; empty: nothing did."""
        if code == 0:
            return ""
        if code in (-signal.SIGXCPU, -signal.SIGKILL):
            return f"{line}: hit the limit of {self.limit} s"
        if code < 0:
            return f"{line}: died of {signal.Signals(-code).name}"
        if code in (FAILED, BROKEN_OFF):
            return _last(output)
        raise RuntimeError(f"pytest {line} ends with {code}: {output[-2000:]}")

    def _pytest(self, line: str, copy: Path) -> tuple[int, str]:
        words = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
        limit = (self.limit, self.limit + 5)
        with subprocess.Popen(
            [*words, *shlex.split(line)], cwd=copy, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        ) as process:  # fmt: skip
            try:
                resource.prlimit(process.pid, resource.RLIMIT_CPU, limit)
                output, _ = process.communicate(timeout=self.limit * SLOWEST)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                output, _ = process.communicate()
        return process.returncode, output

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

    def _known(self) -> dict[str, Outcome]:
        path = self.work / "outcomes.jsonl"
        rows = map(json.loads, path.read_text().splitlines()) if path.is_file() else ()
        return {row.pop("key"): Outcome(**row) for row in rows}

    def _note(self, key: str, outcome: Outcome) -> None:
        with self._lock, (self.work / "outcomes.jsonl").open("a") as file:
            file.write(json.dumps({"key": key, **asdict(outcome)}) + "\n")
        print(f"{outcome.status:10}{outcome.wing}/{outcome.name}", file=sys.stderr, flush=True)


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
