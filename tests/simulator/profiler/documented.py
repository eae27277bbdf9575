"""Numbers in docs/profiling.md: run its commands again and compare, or write what they print now.

    python tests/simulator/profiler/documented.py        # rewrites docs/profiling.md

In a console block every line that starts with "$ " is a shell command, and what follows is all it
prints. Rows of the table whose first cell is a step of the example hold that step's numbers.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from typing import TYPE_CHECKING

from profile_helpers import ROOT, STEPS, example

if TYPE_CHECKING:
    from pathlib import Path

    from nsa_neuron.simulator import Profile

DOCUMENT = ROOT / "docs" / "profiling.md"
_BLOCK = re.compile(r"(?<=```console\n).*?(?=```\n)", re.DOTALL)
_ROW = re.compile(r"^\| `(\w+)` \|.*\|$", re.MULTILINE)


def refreshed(text: str, folder: Path) -> str:
    """The document with the numbers of today's model.

    Args:
        text: the document.
        folder: where the commands may leave files.
    """
    settings: list[str] = []
    text = _BLOCK.sub(lambda block: _run_block(block.group(), settings, folder), text)
    return _ROW.sub(_row, text)


def _run_block(block: str, settings: list[str], folder: Path) -> str:
    shown = []
    for line in block.splitlines():
        if not line.startswith("$ "):
            continue
        shown.append(line)
        command = line.removeprefix("$ ")
        if re.match(r"\w+=", command):
            settings.append(command)
        else:
            shown.append(_output("\n".join([*settings, command]), folder))
    return "".join(f"{line}\n" for line in shown if line)


def _output(command: str, folder: Path) -> str:
    """What a command prints, run in a folder that looks like the repository."""
    link = folder / "examples"
    if not link.exists():
        link.symlink_to(ROOT / "examples")
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    done = subprocess.run(
        ["sh", "-ec", command],
        cwd=folder,
        env={**os.environ, "PATH": path, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done.stdout.rstrip("\n")


def _row(match: re.Match[str]) -> str:
    step = match.group(1)
    return row(step, example(step)) if step in STEPS else match.group()


def row(step: str, found: Profile) -> str:
    """A row of the table of steps."""
    facts, band = found.to_dict(), found.time
    core = facts["cores"][0]
    return (
        f"| `{step}` | {band.central / 1e3:.1f} | {band.low / 1e3:.1f} to {band.high / 1e3:.1f} "
        f"| {facts['roofline']['hbm_bytes'] / 1e6:.1f} | {core['dma']['transfers']} "
        f"| {core['dma']['bytes_per_descriptor']:,.0f} | {core['tensor']['utilisation']:.1%} "
        f"| {facts['roofline']['share_of_ceiling']:.0%} |"
    )


if __name__ == "__main__":
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as place:
        DOCUMENT.write_text(refreshed(DOCUMENT.read_text(), Path(place)))
    sys.exit(0)
