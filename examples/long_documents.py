"""Facts in three long documents: how far back each attention finds them, how fast, in what memory.

    python examples/long_documents.py runs --lengths 8192 20480

The documents are Python's help topics, its standard library's source, and synthetic patient
histories (a visit a line, over 30 years, made from a seed). Eight facts of the needle task are
planted in each. The NSA model is the shipped one, trained on texts of up to 8K bytes; full and
windowed attention are those of `train_bytes.py runs` (`needle-full-0` and so on), up to 4K. Writes
`runs/long.json`, and a page per document of what NSA looked at, `runs/long-<document>.html`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from nsa_neuron.environment import describe
from nsa_neuron.nn.checkpoint import RECALL, load_checkpoint
from nsa_neuron.planted import plant
from nsa_neuron.show import html
from nsa_neuron.terminal import progress, table
from nsa_neuron.training.corpus import help_topics, python_corpus
from nsa_neuron.training.loop import MODEL

ATTENTIONS = ("nsa", "full", "window")
COMPLAINTS = (
    "headache", "back pain", "cough", "fatigue", "a rash on the left arm", "no complaints",
    "dizziness when standing", "shortness of breath on stairs", "poor sleep", "a sprained ankle",
)  # fmt: skip
ADVICE = ("rest", "physiotherapy", "ibuprofen 400 mg", "a blood test", "see again in two weeks",
          "no change of medication", "more walking", "a chest x-ray")  # fmt: skip


def documentation(length: int) -> bytes:
    """Python's help topics."""
    return b"\n\n".join(help_topics())[:length]


def code(length: int) -> bytes:
    """The standard library's source, as far as training left it out."""
    return bytes(python_corpus().held_out[-length:].tolist())


def record(length: int) -> bytes:
    """A patient's visits over 30 years."""
    draw, lines, size, day = random.Random(0), [], 0, 0
    while size < length:
        day += draw.randint(1, 30)
        year, rest = divmod(day, 360)
        line = (
            f"{1995 + year % 30}-{rest // 30 + 1:02}-{rest % 30 + 1:02} visit: "
            f"{draw.choice(COMPLAINTS)}; blood pressure {draw.randint(105, 160)}/"
            f"{draw.randint(60, 100)}, pulse {draw.randint(52, 98)}, weight "
            f"{draw.uniform(68, 92):.1f} kg. advice: {draw.choice(ADVICE)}."
        )
        lines.append(line)
        size += len(line) + 1
    return "\n".join(lines).encode()[:length]


DOCUMENTS = {"documentation": documentation, "code": code, "record": record}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 20480])
    parser.add_argument("--attention", nargs="+", default=list(ATTENTIONS))
    parser.add_argument("--documents", nargs="+", choices=tuple(DOCUMENTS), default=list(DOCUMENTS))
    parser.add_argument("--seed", type=int, default=0, help="of the runs")
    parser.add_argument("--trials", type=int, default=8, help="of eight facts each")
    parser.add_argument("--out", default="long.json", help="of the rows, in the folder")
    args = parser.parse_args()
    cases = [
        (args.folder, attention, args.seed, name, length, args.trials)
        for name in args.documents
        for length in args.lengths
        for attention in args.attention
    ]
    rows = []
    with progress("documents", len(cases)) as advance:
        for case in cases:
            advance(f"{case[3]}, {case[4]} bytes, {case[1]}")
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as own:
                rows.append(
                    own.submit(one, *case).result()
                )  # a process: its peak memory is its own
            args.folder.joinpath(args.out).write_text(json.dumps(rows, indent=1) + "\n")
    headers = (
        "document",
        "bytes",
        "attention",
        "right",
        "by quarter, farthest first",
        "bytes/s",
        "MiB",
    )
    print(table("", headers, [line(row) for row in rows]))


def one(
    folder: Path, attention: str, seed: int, name: str, length: int, trials: int
) -> dict[str, Any]:
    """One model on one document: facts planted anew in each trial."""
    path = RECALL if attention == "nsa" else folder / f"needle-{attention}-{seed}" / MODEL
    model, _ = load_checkpoint(path)
    document, hits, wall, cpu = DOCUMENTS[name](length), [], [], []
    for trial in range(trials):
        began, used = time.perf_counter(), time.process_time()
        found = plant(model, document, seed=trial, looking=attention == "nsa" and trial == 0)
        if found.look is None:
            wall.append(time.perf_counter() - began)
            cpu.append(time.process_time() - used)
        else:
            page = folder / f"long-{name}.html"
            page.write_text(html(found.look, f"Facts asked for in: {name}", f"{length:,} bytes"))
        hits += [((a.asked - a.place) / length, a.right) for a in found.answers]
    quarters: list[list[bool]] = [[], [], [], []]
    for share, right in hits:
        quarters[min(3, int(4 * (1 - share)))].append(right)
    return {
        "document": name, "bytes": length, "attention": attention, "seed": seed,
        "facts": len(hits), "right": sum(right for _, right in hits) / len(hits),
        "by_quarter": [sum(q) / len(q) if q else None for q in quarters],
        "bytes_per_second": round(length / min(wall)), "cpu_seconds": round(min(cpu), 2),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "load": round(os.getloadavg()[0], 1), "machine": describe(),
    }  # fmt: skip


def line(row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    quarters = " ".join("-" if q is None else f"{q:.2f}" for q in row["by_quarter"])
    return [
        row["document"], str(row["bytes"]), row["attention"], f"{row['right']:.3f}", quarters,
        str(row["bytes_per_second"]), str(row["peak_mib"]),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
