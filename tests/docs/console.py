"""Console blocks of documents: run their commands again and compare, or write what they print now.

    python tests/docs/console.py docs/first_kernel.md docs/porting.md      # rewrites them

In a ```console block every line that starts with "$ " is a shell command, run in a folder that
looks like the repository, and what follows is all it prints. A command may end in `| head -3` or
`2>&1 | ...`; it must succeed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"(?<=```console\n).*?(?=```\n)", re.DOTALL)


def refreshed(text: str, folder: Path) -> str:
    """The document with what its commands print now.

    Args:
        text: the document.
        folder: where the commands may leave files.
    """
    return BLOCK.sub(lambda block: run_block(block.group(), folder), text)


def run_block(block: str, folder: Path) -> str:
    """A console block with the output of its commands."""
    shown = []
    for line in block.splitlines():
        if line.startswith("$ "):
            shown += [line, output(line.removeprefix("$ "), folder)]
    return "".join(f"{line}\n" for line in shown if line)


def output(command: str, folder: Path) -> str:
    """What a command prints, without spaces at line ends."""
    for name in ("examples", "tests"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "COLUMNS": "200", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["sh", "-ec", command], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    said = done.stdout.replace(f"{ROOT}/", "").rstrip("\n")
    return "\n".join(line.rstrip() for line in said.split("\n"))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as place:
            page = Path(name)
            page.write_text(refreshed(page.read_text(), Path(place)))
