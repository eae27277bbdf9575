"""Linear layers and embeddings that know how they start.

Code that builds a model on the meta device initialises it by calling `reset_parameters` of every
module, in any order; so each parameter's distribution belongs to the module that holds it.
"""

from __future__ import annotations

import math

from torch import nn

INIT_STD = 0.02  # as GPT-2's


class Linear(nn.Linear):
    """A linear layer with normal weights of standard deviation `std` and a zero bias."""

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool = False, std: float = INIT_STD
    ) -> None:
        self.std = std
        super().__init__(inputs, outputs, bias=bias)

    def reset_parameters(self) -> None:
        """Starts again."""
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """An embedding with normal rows of standard deviation `std`."""

    def __init__(self, count: int, dim: int, *, std: float = INIT_STD) -> None:
        self.std = std
        super().__init__(count, dim)
        self.norm_type = 2  # not 2.0: see `AttentionLayer.rope_base`; without max_norm it is unused

    def reset_parameters(self) -> None:
        """Starts again."""
        nn.init.normal_(self.weight, std=self.std)


def residual_std(layers: int) -> float:
    """Of what is added to the stream of a model, twice in each of its layers (GPT-2's rule)."""
    return INIT_STD / math.sqrt(2 * layers)


def reset(module: nn.Module) -> None:
    """Every child of a module starts again."""
    for child in module.children():
        again = getattr(child, "reset_parameters", None)
        if callable(again):
            again()
        else:
            reset(child)
