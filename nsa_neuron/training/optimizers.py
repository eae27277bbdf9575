"""The optimizer: Muon for the blocks' matrices, AdamW for everything else.

Muon (K. Jordan 2024, `torch.optim.Muon`) makes each matrix's update orthogonal. On the recall tasks
here it needs a fraction of AdamW's steps, whatever the attention (docs/training.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

BETAS, MOMENTUM = (0.9, 0.95), 0.95


def optimizers_of(model: nn.Module, rate: float, muon: float, decay: float) -> list[Optimizer]:
    """AdamW, and Muon.

    Args:
        model: whose blocks are called `blocks`.
        rate: of AdamW.
        muon: rate of Muon; 0: AdamW trains everything.
        decay: weight decay of matrices.
    """
    named = list(model.named_parameters())
    matrices = [p for name, p in named if muon and _is_a_block_s_matrix(name, p)]
    taken = set(map(id, matrices))
    rest = [p for _, p in named if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in rest if p.dim() <= 1], "weight_decay": 0.0},
    ]
    found: list[Optimizer] = [torch.optim.AdamW(groups, lr=rate, betas=BETAS)]
    if matrices:
        found.append(torch.optim.Muon(matrices, lr=muon, weight_decay=decay, momentum=MOMENTUM))
    return found


def _is_a_block_s_matrix(name: str, p: Tensor) -> bool:
    return p.dim() == 2 and name.startswith("blocks.") and ".phi_" not in name
