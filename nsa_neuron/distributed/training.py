"""Training the byte model on any mesh: the same losses, whatever the mesh.

A run is a folder: `step-<n>` checkpoints, and `log.jsonl`, written by rank 0. Started again, with
the same mesh or another, it goes on behind the newest checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nsa_neuron.distributed.checkpoint import load, save
from nsa_neuron.distributed.context import FETCHES
from nsa_neuron.distributed.context_parallel import shard, sharded_loss
from nsa_neuron.distributed.exchange import counting
from nsa_neuron.distributed.parallelism import AXES, Parallelism, parallelize
from nsa_neuron.distributed.pipeline import SCHEDULES, Stage, pipeline, stage_indices
from nsa_neuron.errors import InvalidArgument, NsaError
from nsa_neuron.fields import check_rules, check_types
from nsa_neuron.nn.model import ByteLanguageModel
from nsa_neuron.training.loop import generator_of, run_rules

if TYPE_CHECKING:
    from pathlib import Path

    from nsa_neuron.nn.config import NsaConfig
    from nsa_neuron.training.tasks import Task

LOG = "log.jsonl"
DTYPES = ("", "float32", "float16", "bfloat16", "float64")


@dataclass(frozen=True)
class How:
    """How a model is trained.

    Attributes:
        steps: optimizer steps.
        batch: sequences of a step, of all data-parallel ranks together. length: bytes of each.
        rate: learning rate. clip: largest norm of the gradient.
        seed: of weights and batches.
        save_every: steps between two checkpoints.
        fetch: of context parallelism. replay: activation checkpointing.
        dtype: that parameters are cast to for computing, by name; "": their own.
        schedule: of a pipeline. microbatches: of a pipeline's step.
        sequence: tensor parallelism spreads the states between layers by tokens.

    Raises:
        InvalidArgument, InvalidType: a value that no run could use.
    """

    steps: int = 100
    batch: int = 4
    length: int = 256
    rate: float = 3e-3
    clip: float = 1.0
    seed: int = 0
    save_every: int = 50
    fetch: str = "auto"
    replay: bool = False
    dtype: str = ""
    schedule: str = "1f1b"
    microbatches: int = 4
    sequence: bool = True

    def __post_init__(self) -> None:
        check_types(self)
        rules = (
            *run_rules(self),
            ("fetch", self.fetch in FETCHES, f"one of {', '.join(FETCHES)}"),
            ("dtype", self.dtype in DTYPES, f"one of {', '.join(DTYPES[1:])}, or empty"),
            ("schedule", self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
            ("microbatches", self.microbatches >= 1, "at least 1"),
        )
        check_rules(self, rules)


def train(
    config: NsaConfig,
    kinds: tuple[str, ...],
    task: Task,
    mesh_of: Parallelism,
    how: How,
    folder: Path,
    device: str = "cpu",
    report: Callable[[dict[str, Any]], None] | None = None,
) -> list[float]:
    """Trains a model, or goes on with what is in the folder; every rank calls this.

    Args:
        config, kinds: of the model.
        task: gives the batches, which depend on seed and step only.
        mesh_of: how the ranks are used.
        how: the schedule.
        folder: of the run, seen by all ranks.
        device: type of the ranks' devices.
        report: on rank 0, is told each step's row of the log.

    Returns:
        Losses of the steps that were taken, in nats, the same on every rank.

    Raises:
        InvalidArgument: the mesh does not divide the batch, a sequence or the model.
        StateMismatch: the folder holds a run of another model.
    """
    run = _Run(config, kinds, mesh_of, how, device)
    about = json.loads(json.dumps({"config": config.to_dict(), "kinds": kinds, "seed": how.seed}))
    start = load(folder, run.models, run.optimizers, about)
    if dist.get_rank() == 0:
        _cut_log(folder / LOG, start)
    losses = []
    for step in range(start, how.steps):
        tokens = task.batch(how.batch, how.length, generator_of(how.seed, step)).tokens
        began = time.perf_counter()
        with counting() as sent:
            loss = run.step(tokens.to(device))
        losses.append(loss)
        row = {
            "step": step, "loss": loss, "seconds": round(time.perf_counter() - began, 4),
            "bytes": how.batch * how.length, "context bytes sent": sum(sent.values()),
            "mesh": dataclasses.asdict(mesh_of),
        }  # fmt: skip
        if (step + 1) % how.save_every == 0 or step + 1 == how.steps:
            save(folder, step + 1, run.models, run.optimizers, about)
        if dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / LOG).open("a") as log:
                log.write(json.dumps(row) + "\n")
            if report is not None:
                report(row)
    return losses


class _Run:
    """Model, optimizers and one step of them."""

    def __init__(
        self,
        config: NsaConfig,
        kinds: tuple[str, ...],
        mesh_of: Parallelism,
        how: How,
        device: str,
    ) -> None:
        _check(mesh_of, how)
        self.how, self.mesh_of, self.mesh = how, mesh_of, mesh_of.mesh(device)
        torch.manual_seed(how.seed)
        whole = ByteLanguageModel(config, kinds).to(device)
        self.models: list[nn.Module] = [whole]
        if mesh_of.pp > 1:
            place = stage_indices(how.schedule, self.mesh["pp"].get_local_rank(), mesh_of.pp)
            count = len(place) * mesh_of.pp
            self.models = [Stage(whole, index, count) for index in place]
        del whole
        dtype = getattr(torch, how.dtype) if how.dtype else None
        for model in self.models:
            parallelize(
                model, self.mesh, fetch=how.fetch, replay=how.replay, dtype=dtype,
                sequence=how.sequence, whole_logits=False,
            )  # fmt: skip
        self.optimizers = [
            torch.optim.AdamW(model.parameters(), lr=how.rate, betas=(0.9, 0.95))
            for model in self.models
        ]
        # Targets of all data and context parallel ranks; the last token of a sequence has none.
        self.counted = how.batch * (how.length - 1)
        self.schedule = self._schedule(dtype) if mesh_of.pp > 1 else None

    def _schedule(self, dtype: torch.dtype | None) -> Any:
        m, how = self.mesh_of, self.how
        example = (how.batch // m.dp // how.microbatches, how.length // m.cp)
        count = self.counted // how.microbatches
        tp = self.mesh["tp"]

        def loss(logits: Tensor, targets: Tensor) -> Tensor:
            return sharded_loss(logits, targets, m.averaging, count, tp)

        group = self.mesh["pp"].get_group()
        sharded = m.averaging > 1
        return pipeline(
            self.models, how.schedule, group, example, how.microbatches, loss,
            dtype if dtype is not None and sharded else torch.float32,
            (m.tp if how.sequence else 1, m.tp),
        )  # fmt: skip

    def step(self, tokens: Tensor) -> float:
        """One optimizer step; the loss of the whole batch in nats."""
        targets = F.pad(tokens[:, 1:], (0, 1), value=-100)
        own, wanted = (
            shard(shard(x, self.mesh["dp"], 0), self.mesh["cp"]) for x in (tokens, targets)
        )
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss = self._forward_backward(own.contiguous(), wanted.contiguous())
        total = self._over(loss, ("dp", "cp")) / self.mesh_of.averaging
        if not total.isfinite():
            raise NsaError(f"the loss is {total.item()}: lower the learning rate")
        self._clip()
        for optimizer in self.optimizers:
            optimizer.step()
        return float(total)

    def _forward_backward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        if self.schedule is None:
            logits = self.models[0](tokens)
            shares = self.mesh_of.averaging
            loss = sharded_loss(logits, targets, shares, self.counted, self.mesh["tp"])
            loss.backward()
            return loss.detach()
        losses: list[Tensor] = []
        indices = stage_indices(
            self.how.schedule, self.mesh["pp"].get_local_rank(), self.mesh_of.pp
        )
        last = len(indices) * self.mesh_of.pp - 1
        given = (tokens,) if 0 in indices else ()
        self.schedule.step(*given, target=targets if last in indices else None, losses=losses)
        mean = (
            torch.stack(losses).mean().detach() if losses else torch.zeros((), device=tokens.device)
        )
        return self._over(mean, ("pp",))

    def _over(self, x: Tensor, axes: tuple[str, ...]) -> Tensor:
        """The sum over dimensions of the mesh."""
        total = x.clone()
        for axis in axes:
            if self.mesh[axis].size() > 1:
                dist.all_reduce(total, group=self.mesh[axis].get_group())
        return total

    def _clip(self) -> None:
        """Gradients of all stages and ranks together have at most the norm `clip`."""
        parameters = [p for model in self.models for p in model.parameters()]
        squares = [_own_squares(p.grad) for p in parameters if p.grad is not None]
        norm = self._over(torch.stack(squares).sum(), AXES).sqrt()
        nn.utils.clip_grads_with_norm_(parameters, self.how.clip, norm)


def _own_squares(grad: Tensor) -> Tensor:
    """This rank's part of the sum of squares; what several ranks hold counts once."""
    if not isinstance(grad, DTensor):
        return grad.float().square().sum()
    sizes = zip(grad.placements, grad.device_mesh.shape, strict=True)
    copies = math.prod(size for placement, size in sizes if placement.is_replicate())
    return grad.to_local().float().square().sum() / copies


def _cut_log(path: Path, steps: int) -> None:
    """Drops the lines of steps that were taken after the last checkpoint."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if json.loads(line)["step"] < steps))


def _check(m: Parallelism, how: How) -> None:
    """The mesh divides batch and sequences.

    Raises:
        InvalidArgument: it does not.
    """
    parts = m.dp * (how.microbatches if m.pp > 1 else 1)
    if how.batch % parts:
        raise InvalidArgument("train", "batch", how.batch, f"a multiple of {parts} parts")
    if how.length % m.cp:
        raise InvalidArgument("train", "length", how.length, f"a multiple of cp = {m.cp}")
    if how.sequence and how.length % (m.cp * m.tp):
        expected = f"a multiple of cp * tp = {m.cp * m.tp}, or sequence off"
        raise InvalidArgument("train", "length", how.length, expected)
