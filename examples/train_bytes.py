"""NSA, full and windowed attention, trained alike on text and on two recall tasks, and compared.

    python examples/train_bytes.py runs --seeds 0 1

Each run is a folder that goes on where it was stopped; a finished one is read, not run again, so
several processes may each take a part (`--only text --attention nsa`) and a last one collects them.
Writes `runs/results.json` (a row per run) and `runs/curves.png` (needs matplotlib).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsa_neuron.environment import describe
from nsa_neuron.terminal import progress, table
from nsa_neuron.training import Task, evaluate, train
from nsa_neuron.training.loop import LOG, MODEL
from nsa_neuron.training.presets import CONFIGS, LAYERS, SCHEDULES, kinds_of, task_of
from nsa_neuron.training.tasks import MultiQueryRecall

if TYPE_CHECKING:
    from nsa_neuron.nn import ByteLanguageModel

ATTENTIONS = ("nsa", "full", "window")
PRESETS = {"text": "small", "mqar": "recall", "needle": "recall"}
BEGIN_WITH = {"needle": "mqar"}  # the run of the same attention and seed
LENGTHS = {"text": (512, 4096), "mqar": (256, 1024, 4096), "needle": (1024, 4096, 8192)}
PIECES = 32  # sequences of an evaluation at each length
EVALUATION = "evaluation.json"


def main() -> None:
    args = parse()
    rows = [
        one_run(args, name, attention, seed)
        for name in args.only
        for attention in args.attention
        for seed in args.seeds
    ]
    args.folder.joinpath("results.json").write_text(json.dumps(rows, indent=1) + "\n")
    headers = ("task", "attention", "seed", "bytes at once", "loss", "accuracy", "CPU s / step")
    print(table("", headers, [line for row in rows for line in lines(row)]))
    draw(args.folder, rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", nargs="+", choices=tuple(PRESETS), default=list(PRESETS))
    parser.add_argument("--attention", nargs="+", default=list(ATTENTIONS))
    parser.add_argument("--steps", type=int, help="of every run; default: the task's own")
    return parser.parse_args()


def one_run(args: argparse.Namespace, name: str, attention: str, seed: int) -> dict[str, Any]:
    """Trains, or goes on, and evaluates, unless that has been done."""
    preset, how = PRESETS[name], dataclasses.replace(SCHEDULES[name], seed=seed)
    if args.steps:
        how = dataclasses.replace(how, steps=args.steps)
    suffix = f"{attention.replace(',', '-')}-{seed}"
    folder, first = args.folder / f"{name}-{suffix}", BEGIN_WITH.get(name)
    done = folder / EVALUATION
    if done.exists() and (row := json.loads(done.read_text()))["steps"] == how.steps:
        return dict(row)
    kinds = kinds_of(attention, LAYERS[preset])
    with progress(folder.name, how.steps) as advance:
        model = train(
            CONFIGS[preset], kinds, task_of(name), how, folder,
            lambda step, loss: advance(f"steps, loss {loss:.3f}"),
            begin_with=args.folder / f"{first}-{suffix}" / MODEL if first else None,
        )  # fmt: skip
    log = read_log(folder)
    row = {
        "task": name,
        "attention": attention,
        "seed": seed,
        "folder": folder.name,
        "preset": preset,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": how.steps,
        "bytes": sum(item["bytes"] for item in log),
        "cpu_seconds": round(sum(item["cpu_seconds"] for item in log), 1),
        "held_out": held_out(model, name),
        "machine": describe(),
    }
    done.write_text(json.dumps(row, indent=1))
    return row


def held_out(model: ByteLanguageModel, name: str) -> dict[str, dict[str, float]]:
    """Loss and accuracy by length; what is recalled lies farther back than windows reach together.

    Information can pass from window to window, layer by layer; so `near` is all layers' windows.
    Each key is asked for once, so that no answer can be copied from an earlier one.
    """
    task: Task = task_of(name)
    if isinstance(task, MultiQueryRecall):
        task = dataclasses.replace(task, rounds=1, near=len(model.kinds) * model.config.window)
    return {str(length): evaluate(model, task, PIECES, length) for length in LENGTHS[name]}


def lines(row: dict[str, Any]) -> list[list[str]]:
    """A line of the table for each length."""
    start = [row["task"], row["attention"], str(row["seed"])]
    cost = f"{row['cpu_seconds'] / row['steps']:.2f}"
    return [
        [*start, length, f"{found['loss']:.4f}", f"{found['accuracy']:.3f}", cost]
        for length, found in row["held_out"].items()
    ]


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The log's rows."""
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


def draw(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Training losses, smoothed, one panel per task."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no curves: matplotlib is not installed")
        return
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, panels = plt.subplots(1, len(tasks), figsize=(5 * len(tasks), 4), squeeze=False)
    kinds = dict.fromkeys(row["attention"] for row in rows)
    colors = dict(zip(kinds, plt.cm.tab10.colors, strict=False))
    for panel, task in zip(panels[0], tasks, strict=True):
        for row in (row for row in rows if row["task"] == task):
            log = read_log(folder / row["folder"])
            read, smooth = 0.0, []
            for i, item in enumerate(log):
                read += item["bytes"] / 1e6
                losses = [x["loss"] for x in log[max(0, i - 19) : i + 1]]
                smooth.append((read, sum(losses) / len(losses)))
            label = row["attention"] if row["seed"] == rows[0]["seed"] else None
            panel.plot(*zip(*smooth, strict=True), color=colors[row["attention"]], label=label)
        panel.set(title=task, xlabel="MB read", ylabel="loss, nats (mean of 20 steps)")
        panel.legend()
    figure.tight_layout()
    figure.savefig(folder / "curves.png", dpi=120)


if __name__ == "__main__":
    main()
