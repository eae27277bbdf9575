"""Runs of pytest that start warm: forked from a process that has imported what costs seconds.

That process imports other people's packages only (torch takes longer than most runs of tests);
everything of the project is imported by the fork, from the copy that holds the fault.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import select
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

SLOWEST = 20  # seconds of wall time granted for one of CPU time, on a machine with other work


class Pytests:
    """A warm process, and the runs of pytest forked from it, one at a time.

    Args:
        copy: the folder that tests run in and import the project from.
        limit: CPU seconds that one run may take.
        packages: what the process imports first; those that are not installed are left out.

    Attributes:
        seconds: of CPU, all runs together.
    """

    def __init__(self, copy: Path, limit: int, packages: tuple[str, ...] = ()) -> None:
        self.copy, self.limit = copy, limit
        self.seconds = 0.0
        self._output = copy.with_name(f"output-{copy.name}")
        environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
        environment["NSA_CACHE"] = str(copy.parent / "cache")  # libraries with faults in them
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # compiled once, not once per fault
        self._server = subprocess.Popen(
            [sys.executable, __file__, *packages], cwd=copy, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def run(self, line: str, until: str = "") -> tuple[int, str]:
        """Exit code (negative: the signal it died of) and output of `pytest line`.

        Args:
            line: pytest's arguments.
            until: name of the last test to run, if it is among them; empty: all.

        Raises:
            RuntimeError: the warm process is gone.
        """
        words = ["-x", "-q", "-rfEp", "-p", "no:cacheprovider", *shlex.split(line)]
        asked = {"words": words, "until": until, "limit": self.limit, "output": str(self._output)}
        if self._server.stdin is None or self._server.stdout is None:
            raise RuntimeError("the warm process has no pipes")
        self._server.stdin.write(json.dumps(asked) + "\n")
        self._server.stdin.flush()
        told = self._server.stdout.readline()
        if not told:
            raise RuntimeError(f"the warm process of {self.copy} is gone")
        code, seconds = json.loads(told)
        self.seconds += seconds
        return code, self._output.read_text(errors="replace")

    def close(self) -> None:
        """Ends the warm process."""
        self._server.communicate()


class _Until:
    """A plugin of pytest that leaves out what comes after a test."""

    def __init__(self, last: str) -> None:
        self.last = last

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        names = [item.nodeid for item in items]
        if self.last in names:
            del items[names.index(self.last) + 1 :]


def _serve(packages: list[str]) -> None:
    for package in ("pytest", *packages):
        try:
            importlib.import_module(package)
        except ImportError:
            continue
    sys.path[0] = os.getcwd()  # as `python -m pytest` has it; it was this file's folder
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            raise SystemExit(_pytest(asked))
        os.setpgid(child, child)
        try:
            status, used = _wait(child, asked["limit"] * SLOWEST)
        finally:  # too late or interrupted; and what its tests started and left behind
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
        print(json.dumps([os.waitstatus_to_exitcode(status), used]), flush=True)


def _wait(child: int, seconds: float) -> tuple[int, float]:
    """Status of a child that has ended or was ended, and the CPU seconds it took."""
    watched = os.pidfd_open(child)
    ended, _, _ = select.select([watched], [], [], seconds)
    os.close(watched)
    if not ended:
        os.killpg(child, signal.SIGKILL)
    _, status, used = os.wait4(child, 0)
    return status, used.ru_utime + used.ru_stime


def _pytest(asked: dict[str, Any]) -> int:
    """In the fork: limits and an output of its own."""
    import pytest

    resource.setrlimit(resource.RLIMIT_CPU, (asked["limit"], asked["limit"] + 5))
    output = os.open(asked["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, to in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, to)
    sys.argv = ["pytest", *asked["words"]]
    plugins = [_Until(asked["until"])] if asked["until"] else []
    return int(pytest.main(asked["words"], plugins=plugins))


if __name__ == "__main__":
    _serve(sys.argv[1:])
