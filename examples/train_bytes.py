"""NSA, full and windowed attention, trained alike on text and on two recall tasks, and compared.

    python examples/train_bytes.py runs --seeds 0 1

Each run is a folder that goes on where it was stopped. Writes `runs/results.json` (a row per run)
and `runs/curves.png` (needs matplotlib). `--only text` takes one task, `--steps` shortens all.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from nsa_neuron.terminal import progress, table
from nsa_neuron.training import evaluate, train
from nsa_neuron.training.loop import LOG
from nsa_neuron.training.presets import CONFIGS, LAYERS, SCHEDULES, TASKS, kinds_of, task_of

ATTENTIONS = ("nsa", "full", "window")


def main() -> None:
    args = parse()
    rows = []
    for name in args.only:
        for attention in args.attention:
            for seed in args.seeds:
                rows.append(one_run(args, name, attention, seed))
                args.folder.joinpath("results.json").write_text(json.dumps(rows, indent=1))
    headers = ("task", "attention", "seed", "held-out loss", "accuracy", "CPU s / step")
    keys = ("task", "attention", "seed", "loss", "accuracy", "cpu_seconds_per_step")
    print(table("", headers, [[shown(row[key]) for key in keys] for row in rows]))
    draw(args.folder, rows)


def shown(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--attention", nargs="+", default=list(ATTENTIONS))
    parser.add_argument("--preset", choices=tuple(CONFIGS), default="small")
    parser.add_argument("--steps", type=int, help="of every run; default: the task's own")
    return parser.parse_args()


def one_run(args: argparse.Namespace, name: str, attention: str, seed: int) -> dict[str, Any]:
    """Trains, or goes on, and evaluates."""
    task, how = task_of(name), dataclasses.replace(SCHEDULES[name], seed=seed)
    if args.steps:
        how = dataclasses.replace(how, steps=args.steps)
    folder = args.folder / f"{name}-{attention.replace(',', '-')}-{seed}"
    kinds = kinds_of(attention, LAYERS[args.preset])
    with progress(folder.name, how.steps) as advance:
        model = train(
            CONFIGS[args.preset], kinds, task, how, folder,
            lambda step, loss: advance(f"step {step}, loss {loss:.3f}"),
        )  # fmt: skip
    log = read_log(folder)
    return {
        "task": name,
        "attention": attention,
        "seed": seed,
        "folder": folder.name,
        "steps": how.steps,
        "bytes": sum(row["bytes"] for row in log),
        "cpu_seconds_per_step": sum(row["cpu_seconds"] for row in log) / len(log),
        **evaluate(model, task, 16, how.length),
    }


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
    colors = dict(
        zip(dict.fromkeys(row["attention"] for row in rows), plt.cm.tab10.colors, strict=False)
    )
    for panel, task in zip(panels[0], tasks, strict=True):
        for row in rows:
            if row["task"] == task:
                losses = [item["loss"] for item in read_log(folder / row["folder"])]
                smooth = [
                    sum(losses[max(0, i - 19) : i + 1]) / min(20, i + 1) for i in range(len(losses))
                ]
                label = row["attention"] if row["seed"] == rows[0]["seed"] else None
                panel.plot(smooth, color=colors[row["attention"]], label=label, lw=1)
        panel.set(title=task, xlabel="step", ylabel="loss, nats (mean of 20 steps)")
        panel.legend()
    figure.tight_layout()
    figure.savefig(folder / "curves.png", dpi=120)


if __name__ == "__main__":
    main()
