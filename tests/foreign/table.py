"""Write the table of AWS's kernels into docs/simulator.md: `python -m tests.foreign.table`.

Runs every case whose checkout is named by NKI_LIBRARY_PATH or AWS_NEURON_SDK_PATH.
"""

from __future__ import annotations

import subprocess
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from . import library, sdk
from .checkouts import importable, path_of

if TYPE_CHECKING:
    from .library import LibraryCase
    from .sdk import SdkCase

DOCUMENT = Path(__file__).parents[2] / "docs/simulator.md"
BEGIN, END = "<!-- foreign kernels: begin -->", "<!-- foreign kernels: end -->"
HEAD = (
    "| Kernel | Inputs and reference from | Shapes | Instructions | Max error | Limit | Verdict |\n"
    "|---|---|---|--:|--:|--:|---|"
)


def row(case: LibraryCase | SdkCase) -> tuple[str, bool]:
    """One line of the table, and whether it agrees."""
    name = getattr(case, "kernel", case.id)
    print(case.id, flush=True)
    source = case.source.replace("::", " ")
    try:
        outcome = case.run()
    except Exception as error:
        traceback.print_exc()
        text = str(error).split("\n")[0].replace("|", "\\|")
        return f"| {name} | `{source}` | | | | | {type(error).__name__}: {text} |", False
    verdict = "agrees" if not outcome.failures else "; ".join(outcome.failures)
    if outcome.relaxed:
        verdict += "; relaxed " + ", ".join(f"`{r}`" for r in sorted(outcome.relaxed))
    shapes = ", ".join(outcome.shapes[:4]) + (", ..." if len(outcome.shapes) > 4 else "")
    numbers = f"{outcome.instructions} | {outcome.error:.1e} | {outcome.limit:.1e}"
    return f"| {name} | `{source}` | {shapes} | {numbers} | {verdict} |", not outcome.failures


def revision(path: Path) -> str:
    """Commit and date of a checkout."""
    command = ["git", "-C", str(path), "log", "-1", "--format=%h %cs"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def section(repository: str, title: str, cases: tuple, folders: tuple[str, ...]) -> list[str]:
    """Lines of one repository's table, or why there is none."""
    root = path_of(repository)
    if root is None:
        return [f"### {title}", "", "Not run: no checkout.", ""]
    with importable(repository, *folders):
        rows = [row(case) for case in cases]
    good = sum(ok for _, ok in rows)
    return [
        f"### {title} ({revision(root)})",
        "",
        f"{good} of {len(rows)} runs agree.",
        "",
        HEAD,
        *(line for line, _ in rows),
        "",
    ]


def main() -> int:
    """Write the section between the markers; 1 when there are no markers."""
    text = DOCUMENT.read_text()
    if BEGIN not in text or END not in text:
        print(f"{DOCUMENT} lacks {BEGIN} and {END}", file=sys.stderr)
        return 1
    lines = section("sdk", "aws-neuron-sdk, nki/examples", sdk.CASES, ())
    lines += section("library", "nki-library", library.CASES, (".", "src"))
    reasons = {
        (r, why, c.kernel) for c in (*sdk.CASES, *library.CASES) for r, why in c.relax.items()
    }
    lines += ["Rules that AWS's own code breaks, relaxed by name for the runs marked above:", ""]
    lines += [f"- `{rule}`, {kernel}: {why}." for rule, why, kernel in sorted(reasons)]
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    DOCUMENT.write_text(before + BEGIN + "\n" + "\n".join(lines) + "\n" + END + after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
