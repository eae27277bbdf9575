"""Which tests execute which line, for faults that are drawn: which tests might notice them.

    python -m tools.mutants.lines            the whole suite, in about twice its time
    python -m tools.mutants.lines tests/cpu  some of it

Writes `build/mutants/lines.json`: for each file and line the test functions that execute it (none
named: it runs when the file is imported), and the CPU seconds that each of them takes. What a test
asks of other processes is not seen.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import coverage
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "mutants"
RECORDED = FOLDER / "lines.json"
PACKAGES = ("nsa_neuron", "nki_kernels", "cuda_kernels")
# Processes of their own, nothing of which is seen here.
NOT_SEEN = ("tests/newcomer", "tests/tools")


class Recorder:
    """A plugin of pytest: the lines that each test function executes, and its CPU time.

    Args:
        path: without its ending, of what is written at the end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = defaultdict(float)
        self.coverage = coverage.Coverage(
            data_file=str(path.with_suffix(".coverage")), config_file=False,
            source=[str(ROOT / name) for name in PACKAGES],
        )  # fmt: skip
        self.coverage.start()

    @pytest.hookimpl(hookwrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        name = item.nodeid.partition("[")[0]
        self.coverage.switch_context(name)
        begin = time.process_time()
        yield
        self.seconds[name] += time.process_time() - begin

    def pytest_sessionfinish(self) -> None:
        self.coverage.stop()
        self.coverage.save()
        self.path.with_suffix(".seconds").write_text(json.dumps(self.seconds))


def pytest_configure(config: pytest.Config) -> None:
    """Each worker of pytest-xdist records what runs in it."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker:
        config.pluginmanager.register(Recorder(FOLDER / f"lines-{worker}"))


def main(tests: list[str]) -> int:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for path in FOLDER.glob("lines-*"):
        path.unlink()
    left_out = [f"--ignore={name}" for name in NOT_SEEN]
    workers = str(len(os.sched_getaffinity(0)))
    command = [sys.executable, "-m", "pytest", "-q", "-n", workers, "--dist", "worksteal"]
    code = subprocess.run([*command, "-p", __spec__.name, *left_out, *tests], cwd=ROOT).returncode
    RECORDED.write_text(json.dumps(_merged()))
    return code


def _merged() -> dict[str, dict[str, Any]]:
    lines: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    seconds: dict[str, float] = defaultdict(float)
    for path in FOLDER.glob("lines-*.coverage"):
        data = coverage.CoverageData(str(path))
        data.read()
        for name in data.measured_files():
            own = lines[str(Path(name).relative_to(ROOT))]
            for line, tests in data.contexts_by_lineno(name).items():
                own[str(line)].update(filter(None, tests))
    for path in FOLDER.glob("lines-*.seconds"):
        for test, spent in json.loads(path.read_text()).items():
            seconds[test] += spent
    sets = {name: {line: sorted(each) for line, each in own.items()} for name, own in lines.items()}
    return {"lines": sets, "seconds": seconds}


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
