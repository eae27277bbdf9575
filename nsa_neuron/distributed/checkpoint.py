"""Checkpoints of spread models, which another mesh can load: `torch.distributed.checkpoint`.

A checkpoint is a folder `step-<n>`, which appears whole or not at all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer

from nsa_neuron.errors import StateMismatch

if TYPE_CHECKING:
    from pathlib import Path

OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True, strict=False)
ABOUT = "about.json"


def save(
    folder: Path,
    step: int,
    models: Sequence[nn.Module],
    optimizers: Sequence[Optimizer],
    about: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Writes a checkpoint; every rank calls this.

    Args:
        folder: of the run, seen by all ranks.
        step: finished steps.
        models: this rank's model, or its stages of a pipeline.
        optimizers: one for each.
        about: plain data, which `load` compares.
        keep: newest checkpoints that stay.
    """
    target, beside = folder / f"step-{step}", folder / f".step-{step}"
    if dist.get_rank() == 0:
        shutil.rmtree(beside, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    state_dict_saver.save(_state(models, optimizers), checkpoint_id=beside)
    if dist.get_rank() == 0:
        (beside / ABOUT).write_text(json.dumps(dict(about)))
        shutil.rmtree(target, ignore_errors=True)
        beside.rename(target)
        for old in sorted(steps(folder))[:-keep]:
            shutil.rmtree(folder / f"step-{old}", ignore_errors=True)
    dist.barrier()
    return target


def load(
    folder: Path,
    models: Sequence[nn.Module],
    optimizers: Sequence[Optimizer],
    about: Mapping[str, Any],
) -> int:
    """Loads the newest checkpoint of a run, whatever mesh wrote it; every rank calls this.

    Returns:
        Its finished steps; 0 if there is none.

    Raises:
        StateMismatch: it is of another model.
    """
    found = steps(folder)
    if not found:
        return 0
    source = folder / f"step-{max(found)}"
    wrote = json.loads((source / ABOUT).read_text())
    if wrote != json.loads(json.dumps(dict(about))):
        wrong = [name for name in about if wrote.get(name) != about[name]]
        raise StateMismatch(f"{source} is of another run: its {' and '.join(wrong)} differ")
    state = _state(models, optimizers)
    state_dict_loader.load(state, checkpoint_id=source)
    for model, optimizer in zip(models, optimizers, strict=True):
        # Names of all stages are in one dictionary; each takes its own.
        own, own_optimizer = get_state_dict(model, optimizer, options=OPTIONS)
        set_state_dict(
            model,
            optimizer,
            model_state_dict={name: state["model"][name] for name in own},
            optim_state_dict={name: state["optimizer"][name] for name in own_optimizer},
            options=OPTIONS,
        )
    return max(found)


def steps(folder: Path) -> list[int]:
    """Finished steps of the checkpoints of a run."""
    return [int(path.name.removeprefix("step-")) for path in folder.glob("step-*")]


def _state(models: Sequence[nn.Module], optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    state: dict[str, Any] = {"model": {}, "optimizer": {}}
    for model, optimizer in zip(models, optimizers, strict=True):
        weights, moments = get_state_dict(model, optimizer, options=OPTIONS)
        state["model"] |= weights
        state["optimizer"] |= moments
    return state
