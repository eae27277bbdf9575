"""The training loop: the same for every attention, resumable to the bit, with a log of every step.

A run is a folder: `training.safetensors` (weights, optimizer and step in one file, so that they
never disagree), `log.jsonl`, and `model.safetensors`, which `load_checkpoint` reads.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_neuron.errors import InvalidType, NsaError, StateMismatch
from nsa_neuron.fields import SEEDS, check_int, check_rules, check_types
from nsa_neuron.nn.checkpoint import load_checkpoint, read_tensors, save_checkpoint, write_tensors
from nsa_neuron.nn.model import ByteLanguageModel
from nsa_neuron.training.optimizers import optimizers_of
from nsa_neuron.training.tasks import Batch, Task

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from nsa_neuron.nn.config import NsaConfig

STATE, LOG, MODEL = "training.safetensors", "log.jsonl", "model.safetensors"


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained.

    Attributes:
        steps: optimizer steps.
        batch, length: sequences of a step and their bytes.
        growth: from which share of the steps on sequences have how many bytes; a step takes as
            many bytes as before, in fewer sequences.
        rate: largest learning rate; it rises over `warm_up` steps and falls to a tenth (cosine).
        muon: the same for the blocks' matrices, which Muon trains; 0: AdamW trains them, too.
        decay: weight decay of matrices.
        clip: largest norm of the gradient.
        seed: of weights and batches.
        save_every: steps between two states on disk.
    """

    steps: int = 600
    batch: int = 8
    length: int = 512
    growth: tuple[tuple[float, int], ...] = ((0.8, 4096),)
    rate: float = 3e-3
    muon: float = 0.02
    warm_up: int = 30
    decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    save_every: int = 50

    def __post_init__(self) -> None:
        check_types(self)
        expected = "shares from 0 on, rising, each with a length of at least 1"
        rules = (
            *run_rules(self),
            ("warm_up", self.warm_up >= 1, "at least 1"),
            ("muon", 0 <= self.muon < math.inf, "finite, at least 0"),
            ("decay", 0 <= self.decay < math.inf, "finite, at least 0"),
            ("growth", _is_growth(self.growth), expected),
        )
        check_rules(self, rules)

    def share_at(self, step: int) -> float:
        """What part of the largest learning rates a step has, counted from 0."""
        rise = min(1.0, (step + 1) / self.warm_up)
        fall = 0.55 + 0.45 * math.cos(math.pi * step / self.steps)
        return rise * fall

    def shape_at(self, step: int) -> tuple[int, int]:
        """Sequences and bytes of each at a step."""
        length = self.length
        for share, longer in self.growth:
            length = max(length, longer) if step >= self.steps * share else length
        return max(1, self.batch * self.length // length), length


def run_rules(how: Any) -> tuple[tuple[str, bool, str], ...]:
    """Rules of what every training run has, on one rank or several, for `check_rules`.

    Args:
        how: a `TrainConfig`, or what has these fields of it.
    """
    return (
        *((name, getattr(how, name) >= 1, "at least 1") for name in ("steps", "batch")),
        ("length", how.length >= 2, "at least 2: a byte and the next, which is asked for"),
        ("save_every", how.save_every >= 1, "at least 1"),
        ("seed", how.seed in SEEDS, "a 64-bit number"),
        *(
            (name, 0 < getattr(how, name) < math.inf, "finite, above 0")
            for name in ("rate", "clip")
        ),
    )


def _is_growth(growth: Any) -> bool:
    try:
        shares, lengths = [share for share, _ in growth], [length for _, length in growth]
        whole = all(isinstance(length, int) and length >= 1 for length in lengths)
        return whole and shares == sorted(shares) and min([*shares, 0]) >= 0
    except (TypeError, ValueError):  # no pairs, or no numbers
        return False


Report = Callable[[int, float], None]


def train(
    config: NsaConfig,
    kinds: tuple[str, ...],
    task: Task,
    how: TrainConfig,
    folder: str | Path,
    report: Report | None = None,
    until: int | None = None,
    begin_with: str | Path | None = None,
) -> ByteLanguageModel:
    """Trains a model, or goes on with what is in the folder.

    Args:
        config, kinds: of the model.
        task: gives the batches; those of a step depend on seed and step only.
        how: the schedule.
        folder: of the run.
        report: is told each finished step and its loss.
        until: stop before this step (it is resumed by calling again); default: all steps.
        begin_with: a checkpoint whose weights a new run begins with; default: random ones.

    Raises:
        StateMismatch: the folder holds a run of another model or schedule, or the checkpoint to
            begin with is of another model.
    """
    if not isinstance(how, TrainConfig):
        raise InvalidType("train", "how", type(how).__name__, "a TrainConfig")
    if until is not None:
        check_int("train", "until", until, 0)
    folder = Path(folder)
    torch.manual_seed(how.seed)
    model = ByteLanguageModel(config, kinds).train()
    optimizers = optimizers_of(model, how.rate, how.muon, how.decay)
    what = _plain({"config": config.to_dict(), "kinds": kinds, "how": dataclasses.asdict(how)})
    if begin_with is not None:
        first, notes = load_checkpoint(begin_with)
        model.load_state_dict(first.state_dict())
        what["begun_with"] = notes
    start = _resume(folder / STATE, model, optimizers, what)
    stop = how.steps if until is None else min(until, how.steps)
    folder.mkdir(parents=True, exist_ok=True)
    _cut_log(folder / LOG, start)
    with (folder / LOG).open("a", buffering=1) as log:
        for step in range(start, stop):
            began = time.process_time()
            loss = _step(model, optimizers, task, how, step)
            shape = how.shape_at(step)
            row = {
                "step": step, "loss": round(loss, 5), "bytes": shape[0] * shape[1],
                "cpu_seconds": round(time.process_time() - began, 3),
            }  # fmt: skip
            log.write(json.dumps(row) + "\n")
            if report is not None:
                report(step, loss)
            if (step + 1) % how.save_every == 0 or step + 1 == stop:
                _save(folder, model, optimizers, step + 1, what)
    return model.eval()


def generator_of(seed: int, step: int) -> torch.Generator:
    """The random numbers of a step's batch; steps and neighbouring seeds have different ones."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**64)


def loss_of(logits: Tensor, batch: Batch) -> Tensor:
    """Mean cross-entropy in nats of the bytes that count."""
    targets = batch.tokens[:, 1:]
    if batch.counted is not None:
        targets = targets.masked_fill(~batch.counted[:, 1:], -100)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())


@torch.no_grad()
def evaluate(
    model: ByteLanguageModel, task: Task, batch: int, length: int, seed: int = 10_000
) -> dict[str, float]:
    """Loss in nats per counted byte, and how many of them are the likeliest one (accuracy)."""
    for name, value, least in (("batch", batch, 1), ("length", length, 2)):
        check_int("evaluate", name, value, least)
    check_int("evaluate", "seed", seed, SEEDS[0], SEEDS[-1])
    given = task.held_out(batch, length, torch.Generator().manual_seed(seed))
    losses, right, total = 0.0, 0, 0
    for i in range(batch):
        counted = None if given.counted is None else given.counted[i : i + 1]
        one = Batch(given.tokens[i : i + 1], counted)
        logits = model(one.tokens)
        losses += loss_of(logits, one).item() / batch
        hits = logits[:, :-1].argmax(-1) == one.tokens[:, 1:]
        flags = torch.ones_like(hits) if counted is None else counted[:, 1:]
        right, total = right + int((hits & flags).sum()), total + int(flags.sum())
    return {"loss": losses, "accuracy": right / total}


def _step(
    model: ByteLanguageModel,
    optimizers: Sequence[Optimizer],
    task: Task,
    how: TrainConfig,
    step: int,
) -> float:
    for optimizer, rate in zip(optimizers, (how.rate, how.muon), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = rate * how.share_at(step)
    generator = generator_of(how.seed, step)
    batch = task.batch(*how.shape_at(step), generator)
    loss = loss_of(model(batch.tokens), batch)
    if not loss.isfinite():
        raise NsaError(f"the loss of step {step} is {loss.item()}: lower the learning rate")
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), how.clip)
    for optimizer in optimizers:
        optimizer.step()
    return loss.item()


def _save(
    folder: Path,
    model: ByteLanguageModel,
    optimizers: Sequence[Optimizer],
    step: int,
    what: dict[str, Any],
) -> None:
    names = {id(p): name for name, p in model.named_parameters()}
    tensors = {f"model.{name}": p for name, p in model.state_dict().items()}
    for optimizer in optimizers:
        for p, state in optimizer.state.items():
            tensors |= {f"optimizer.{names[id(p)]}.{key}": value for key, value in state.items()}
    write_tensors(folder / STATE, tensors, {"step": step, **what})
    notes: dict[str, Any] = {key: what[key] for key in ("how", "begun_with") if key in what}
    done = sum(json.loads(line)["bytes"] for line in (folder / LOG).open())
    before = what.get("begun_with", {}).get("trained_bytes", 0)
    notes |= {"finished_steps": step, "trained_bytes": before + done}
    save_checkpoint(model, folder / MODEL, notes)


def _resume(
    path: Path,
    model: ByteLanguageModel,
    optimizers: Sequence[Optimizer],
    what: dict[str, Any],
) -> int:
    """Loads a run's state; the number of its finished steps, 0 if there is none."""
    if not path.exists():
        return 0
    tensors, about = read_tensors(path)
    step = int(about.pop("step"))
    if about != what:
        wrong = [key for key in what if about.get(key) != what[key]]
        raise StateMismatch(
            f"{path} belongs to another run: its {' and '.join(wrong)} differ; use another folder"
        )
    model.load_state_dict(_behind("model.", tensors))
    names = {id(p): name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        for p in [p for group in optimizer.param_groups for p in group["params"]]:
            optimizer.state[p] = _behind(f"optimizer.{names[id(p)]}.", tensors)
    return step


def _behind(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}


def _cut_log(path: Path, steps: int) -> None:
    """Drops the lines of steps that were taken after the last save."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if json.loads(line)["step"] < steps))


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(value))
