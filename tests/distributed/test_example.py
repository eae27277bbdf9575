"""`examples/train_distributed.py` under torchrun: it trains, refuses, outlives a killed rank."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "train_distributed.py"
SMALL = ("--batch", "2", "--length", "64", "--save-every", "2")


def torchrun(*words):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def rows(folder):
    path = folder / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def children(pid):
    """Processes whose parent is `pid`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(path.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the ranks in /proc")
def test_a_run_goes_on_behind_a_killed_rank(tmp_path):
    """torchrun ends the other rank and starts both again: only the last steps were lost."""
    folder, steps = tmp_path / "run", 16
    words = ("--nproc-per-node", 2, "--max-restarts", 1, EXAMPLE, folder, "--cp", 2)
    run = torchrun(*words, "--steps", steps, *SMALL)
    try:
        deadline = time.monotonic() + 600
        while len(rows(folder)) < 5 and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        before = rows(folder)
        os.kill(max(children(run.pid)), signal.SIGKILL)
        out, _ = run.communicate(timeout=600)
    finally:
        run.kill()
    assert run.returncode == 0, out
    assert 4 < len(before) < steps
    assert [row["step"] for row in rows(folder)] == list(range(steps))
    assert [row["loss"] for row in rows(folder)[:4]] == [row["loss"] for row in before[:4]]
    assert sorted(p.name for p in folder.glob("step-*")) == ["step-14", "step-16"]


@pytest.mark.slow
def test_a_mesh_of_another_size_is_refused(tmp_path):
    """By a rank alone, as torchrun would start it; test_meshes.py has every rank refuse."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run(
        [sys.executable, EXAMPLE, tmp_path / "run", "--cp", "3", "--length", "96"],
        env={**os.environ, **alone, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode != 0 and "rank 0: Parallelism: argument 'mesh' is" in said, said
    assert "Traceback" not in said and not (tmp_path / "run").exists()
