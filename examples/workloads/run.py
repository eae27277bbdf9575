"""Three kinds of long document, and what each attention finds in them, how far back, how fast.

    python examples/workloads/run.py runs --lengths 20480 65536 131072

A documentation set, a code base and a patient's record, each turned into lookups (`lookup.py` says
what a name and an answer are). The recall model is trained on shortly on pieces of up to 8K bytes:
NSA from the shipped checkpoint, full and windowed attention from those of
`train_bytes.py runs --only mqar needle --seeds 0`, all with the same batches. Then whole documents
are read. Writes `runs/workloads.json` and a page for each document of what NSA looked at. A model
that has been trained is not trained again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import random
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from codebase import CodeBase
from documentation import Documentation
from lookup import ASKED, Lookup, asked
from patients import TOGETHER, Patients

from nsa_neuron.environment import describe
from nsa_neuron.nn.checkpoint import RECALL, load_checkpoint
from nsa_neuron.show import html, look
from nsa_neuron.terminal import progress, table
from nsa_neuron.training import TrainConfig, train
from nsa_neuron.training.loop import LOG, MODEL
from nsa_neuron.training.presets import CONFIGS, LAYERS, kinds_of

if TYPE_CHECKING:
    from lookup import Source

SOURCES: dict[str, Source] = {
    "documentation": Documentation(), "code": CodeBase(), "record": Patients(),
}  # fmt: skip
ATTENTIONS = ("nsa", "full", "window")
BEFORE = "needle-{}-0"  # the run of train_bytes.py that full and windowed attention begin with
HOW = TrainConfig(
    steps=200, batch=8, length=512, rate=3e-3, muon=0.02, warm_up=10, seed=11,
    growth=((0.3, 2048), (0.6, 4096), (0.85, 8192)),
)  # fmt: skip
BASE = 1e7  # of the rotary encoding: at 128K bytes its slow half must still tell near from far
LENGTHS = (20480, 65536, 131072)
TRIALS = {20480: 4, 65536: 2}  # documents of a length; one of others
ROWS = "workloads.json"
NEAR = (16384, 65536)  # distances at which the table is cut


def main() -> None:
    args = parse()
    path = args.folder / ROWS
    rows = json.loads(path.read_text()) if path.exists() else []
    for name in args.only:
        for attention in args.attention:
            model = trained(args.folder, name, attention, args.steps)
            for length in args.lengths:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as own:
                    # A process of its own, so that its peak memory is its own.
                    page = length == min(args.lengths) and attention == "nsa"
                    shown = args.folder / f"workload-{name}.html" if page else None
                    row = own.submit(read, model, name, attention, length, shown).result()
                same = (row["document"], row["attention"], row["bytes"])
                rows = [r for r in rows if (r["document"], r["attention"], r["bytes"]) != same]
                rows.append(row)
                path.write_text(json.dumps(rows, indent=1) + "\n")
                print(*line(row), flush=True)
    print(table("", HEADERS, [line(row) for row in rows]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=tuple(SOURCES), default=list(SOURCES))
    parser.add_argument("--attention", nargs="+", choices=ATTENTIONS, default=list(ATTENTIONS))
    parser.add_argument("--lengths", type=int, nargs="*", default=list(LENGTHS))
    parser.add_argument("--steps", type=int, default=HOW.steps, help="of training")
    return parser.parse_args()


def trained(folder: Path, name: str, attention: str, steps: int) -> Path:
    """The checkpoint of a model that was trained on such documents."""
    own = folder / f"{name}-{attention}"
    kinds = kinds_of(attention, LAYERS["recall"])
    before = RECALL if attention == "nsa" else folder / BEFORE.format(attention) / MODEL
    with progress(own.name, steps) as advance:
        train(
            dataclasses.replace(CONFIGS["recall"], rope_base=BASE),
            kinds, Lookup(SOURCES[name]), dataclasses.replace(HOW, steps=steps), own,
            lambda step, loss: advance(f"steps, loss {loss:.3f}"), begin_with=before,
        )  # fmt: skip
    return own / MODEL


@torch.no_grad()
def read(path: Path, name: str, attention: str, length: int, page: Path | None) -> dict[str, Any]:
    """One model reads documents of a length and answers; of the first it writes a page."""
    model, _ = load_checkpoint(path)
    answers, wall, cpu, peak = [], [], [], 0
    for trial in range(TRIALS.get(length, 1)):
        draw = random.Random(f"{name} {length} {trial}")
        document = SOURCES[name].whole(length - 2 * ASKED, draw)
        order = list(document.places)
        text = asked(document, order)
        tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()[None]
        began, used = time.perf_counter(), time.process_time()
        said = model(tokens, last=2 * len(order))[0, ::2].argmax(-1).tolist()
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - used)
        for i, (letter, answer) in enumerate(zip(order, said, strict=True)):
            at = len(text) - 2 * (len(order) - i)
            answers.append((at - document.places[letter], answer == text[at + 1]))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if page is not None and trial == 0:
            found = look(model, text, [-2, -4, -6])
            page.write_text(html(found, f"Looked up in: {name}", ABOUT))
    log = [json.loads(line) for line in path.with_name(LOG).read_text().splitlines()]
    return {
        "document": name, "attention": attention, "bytes": length,
        "asked": len(answers), "right": sum(right for _, right in answers) / len(answers),
        "answers": answers, "bytes_per_second": round(length / min(wall)),
        "cpu_seconds": round(min(cpu), 2), "peak_mib": round(peak / 1024),
        "threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 1),
        "trained": {
            "steps": len(log), "bytes": sum(item["bytes"] for item in log),
            "cpu_seconds": round(sum(item["cpu_seconds"] for item in log), 1),
        },
        "machine": describe(),
    }  # fmt: skip


ABOUT = (
    "Capitals are names, bound to titles, functions or codes in this document only. At its end "
    "names come again; choose a query to see where the model looked for the name's definition."
)
HEADERS = (
    "document", "attention", "bytes", "right", f"to {NEAR[0]}", f"to {NEAR[1]}", "farther",
    "together", "bytes/s", "CPU s", "MiB",
)  # fmt: skip


def line(row: dict[str, Any]) -> list[str]:
    """A row of the table: right answers, by distance, and whole problems of the record."""
    parts: list[list[bool]] = [[], [], []]
    for distance, right in row["answers"]:
        parts[sum(distance > near for near in NEAR)].append(right)
    cells = [f"{sum(p)}/{len(p)}" if p else "-" for p in parts]
    flags = [right for _, right in row["answers"]]
    whole = [all(flags[i : i + TOGETHER]) for i in range(0, len(flags), TOGETHER)]
    together = f"{sum(whole)}/{len(whole)}" if row["document"] == "record" else "-"
    return [
        row["document"], row["attention"], str(row["bytes"]), f"{row['right']:.2f}", *cells,
        together, str(row["bytes_per_second"]), str(row["cpu_seconds"]), str(row["peak_mib"]),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
