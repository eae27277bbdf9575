"""A byte model as the stages of a pipeline, under torch's own schedules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleZBVZeroBubble,
)

from nsa_neuron.errors import InvalidArgument
from nsa_neuron.nn.model import ByteLanguageModel, run_block

if TYPE_CHECKING:
    import torch.distributed as dist

SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B, "zbv": ScheduleZBVZeroBubble}
VOCABULARY = ByteLanguageModel.VOCABULARY
TWO_STAGES = ("zbv",)  # schedules with two stages on each rank


class Stage(nn.Module):
    """Some blocks of a model, with its embedding in front or its head behind.

    Parameters have the names that they have in the whole model, so that a checkpoint does not
    depend on how a model was cut.

    Args:
        model: the whole; what is not in the stage is not kept.
        index: of the stage. count: of all stages.

    Raises:
        InvalidArgument: fewer blocks than stages.
    """

    def __init__(self, model: ByteLanguageModel, index: int, count: int) -> None:
        super().__init__()
        blocks = len(model.blocks)
        if blocks < count:
            expected = f"at most the {blocks} blocks of the model"
            raise InvalidArgument("Stage", "count", f"{count} stages", expected)
        self.config, self.run_block = model.config, run_block
        own = range(blocks * index // count, blocks * (index + 1) // count)
        self.embedding = model.embedding if index == 0 else None
        self.blocks = nn.ModuleDict({str(i): model.blocks[i] for i in own})
        last = index == count - 1
        self.norm = model.norm if last else None
        self.head = model.head if last else None

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `[B, S]` or states `[B, S, dim]` -> states, or logits `[B, S, 256]`."""
        if self.embedding is not None:
            x = self.embedding(x)
        for block in self.blocks.values():
            x = self.run_block(block, x, None, None)
        if self.head is not None and self.norm is not None:
            x = self.head(self.norm(x))
        return x


def stage_indices(schedule: str, rank: int, ranks: int) -> list[int]:
    """Stages that a rank of the pipeline holds.

    Raises:
        InvalidArgument: no schedule of that name.
    """
    if schedule not in SCHEDULES:
        expected = f"one of {', '.join(SCHEDULES)}"
        raise InvalidArgument("pipeline", "schedule", repr(schedule), expected)
    return [rank, 2 * ranks - 1 - rank] if schedule in TWO_STAGES else [rank]


def pipeline(
    stages: Sequence[nn.Module],
    schedule: str,
    group: dist.ProcessGroup,
    example: tuple[int, int],
    microbatches: int,
    loss: Callable[[Tensor, Tensor], Tensor],
    dtype: torch.dtype = torch.float32,
    shares: tuple[int, int] = (1, 1),
) -> Any:
    """torch's schedule of this rank's stages; see `torch.distributed.pipelining`.

    Args:
        stages: this rank's, of `stage_indices`, parallelized already.
        schedule: one of `SCHEDULES`.
        group: of the ranks of the pipeline.
        example: sequences of a microbatch, and own tokens of each.
        microbatches: of a step.
        loss: of logits and targets of a microbatch.
        dtype: of the states between stages.
        shares: ranks that share the tokens of a state, and the vocabulary of logits: tensor
            parallelism's `sequence` and `whole_logits=False`.
    """
    indices = stage_indices(schedule, group.rank(), group.size())
    count = len(indices) * group.size()
    device = next(stages[0].parameters()).device
    made = []
    for index, stage in zip(indices, stages, strict=True):
        config: Any = stage.config
        # Without requires_grad the stages would expect no gradients from each other.
        own = (example[0], example[1] // shares[0], config.dim)
        states = torch.empty(own, dtype=dtype, device="meta", requires_grad=True)
        tokens = torch.empty(*example, dtype=torch.int64, device="meta")
        vocabulary = (*example, VOCABULARY // shares[1])
        logits = torch.empty(vocabulary, dtype=dtype, device="meta", requires_grad=True)
        made.append(
            PipelineStage(
                stage, index, count, device,
                input_args=(tokens if index == 0 else states,),
                output_args=(logits if index == count - 1 else states,),
                group=group,
            )
        )  # fmt: skip
    kind = SCHEDULES[schedule]
    given: Any = made if schedule in TWO_STAGES else made[0]
    return kind(given, n_microbatches=microbatches, loss_fn=loss)
