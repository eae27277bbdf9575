"""The examples of NSA run as a reader would run them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples" / "nsa"
PREFIX = 45 * 4  # bytes


def run(*command: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, *command], cwd=EXAMPLES, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_attention() -> None:
    said = run("attention.py", "cpu")
    assert said[0].startswith("o [1, 2048, 8, 64]")
    assert float(said[1].split("by ")[1].split()[0]) < 1e-5
    assert sum("-> cpu:" in line for line in said) == 3  # two of compress, one of nsa_attention


def test_serve() -> None:
    after = [line.rpartition(": ")[2] for line in run("serve.py")]
    questions = [10 + 3, 32 + 3]  # and three of the four bytes of an answer
    lengths = [PREFIX, *(PREFIX + n for n in questions)]
    assert after[0] == str([PREFIX] * 3)
    assert after[1] == str(lengths)
    assert after[2] == str([n + 2 for n in lengths])
