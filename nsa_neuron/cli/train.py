"""Train a small byte-level model on this machine; stopped, it goes on where it was.

The text task is Python's help topics and standard library; `mqar` and `needle` ask for bytes that
lie farther back than a window reaches. Compare `--attention nsa`, `full` and `window`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from nsa_neuron.cli import shared, values
from nsa_neuron.nn.attention import KINDS
from nsa_neuron.nn.checkpoint import load_checkpoint
from nsa_neuron.terminal import progress
from nsa_neuron.training.loop import evaluate, train
from nsa_neuron.training.presets import CONFIGS, LAYERS, SCHEDULES, TASKS, kinds_of, task_of

if TYPE_CHECKING:
    import argparse

    from nsa_neuron.nn.config import NsaConfig

NUMBERS: dict[str, Callable[[str], float]] = {
    "steps": int, "batch": int, "length": int, "rate": float, "muon": float, "seed": values.seed,
    "save_every": int,
}  # fmt: skip


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="of the run: state, log, model.safetensors")
    parser.add_argument("--task", choices=TASKS, default="text")
    parser.add_argument(
        "--preset", choices=tuple(CONFIGS), help="default: small, or the model to begin with"
    )
    kinds = ", ".join(KINDS)
    parser.add_argument(
        "--attention",
        help=f"of all layers, or of each: {kinds}; default: nsa, or the model's to begin with",
    )
    for name, read in NUMBERS.items():
        word = f"--{name.replace('_', '-')}"
        parser.add_argument(word, type=read, help="default: the task's own")
    parser.add_argument("--begin-with", type=Path, help="a checkpoint: weights to start from")
    parser.add_argument("--until", type=values.whole(0), help="stop before this step")
    shared.add_json(parser)


def run(args: argparse.Namespace) -> int:
    config, kinds = _model(args)
    task = task_of(args.task)
    given = {name: getattr(args, name) for name in NUMBERS if getattr(args, name) is not None}
    how = dataclasses.replace(SCHEDULES[args.task], **given)
    with progress(f"{args.task}, {','.join(dict.fromkeys(kinds))}", how.steps) as advance:
        model = train(
            config, kinds, task, how, args.folder,
            lambda step, loss: advance(f"steps, loss {loss:.3f}"), args.until,
            args.begin_with,
        )  # fmt: skip
    found = evaluate(model, task, 8, how.length)
    result = {"folder": str(args.folder), "task": args.task, "kinds": kinds, **found}
    if args.json:
        shared.print_json(result)
    else:
        print(f"held out: loss {found['loss']:.4f} nats a byte, accuracy {found['accuracy']:.1%}")
        print(f"model     {args.folder / 'model.safetensors'}")
    return 0


def _model(args: argparse.Namespace) -> tuple[NsaConfig, tuple[str, ...]]:
    """Sizes and kinds of layers: those that are named, or those of the checkpoint to begin with."""
    if args.begin_with is None or args.preset is not None:
        preset = args.preset or "small"
        return CONFIGS[preset], kinds_of(args.attention or "nsa", LAYERS[preset])
    model, _ = load_checkpoint(args.begin_with)
    kinds = kinds_of(args.attention, len(model.kinds)) if args.attention else model.kinds
    return model.config, kinds
