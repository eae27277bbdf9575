"""What is trained: continuing text, and two recall tasks that no short window can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from nsa_neuron.errors import InvalidArgument
from nsa_neuron.fields import check_rules, check_types

if TYPE_CHECKING:
    from nsa_neuron.training.corpus import Corpus

_RECALL_KEYS = range(ord("A"), ord("M") + 1)
_RECALL_VALUES = range(ord("N"), ord("Z") + 1)
_FILLER = ord(".")


@dataclass(frozen=True)
class Batch:
    """Sequences, and which of their bytes count.

    Attributes:
        tokens: `[B, S]` int64.
        counted: `[B, S]` bool: bytes whose prediction from those before counts; None: all.
    """

    tokens: Tensor
    counted: Tensor | None = None


class Task(Protocol):
    """A source of batches."""

    def batch(self, batch: int, length: int, generator: torch.Generator) -> Batch:
        """To train on."""
        ...

    def held_out(self, batch: int, length: int, generator: torch.Generator) -> Batch:
        """To evaluate on."""
        ...


@dataclass(frozen=True)
class Text:
    """Continue real text."""

    corpus: Corpus

    def batch(self, batch: int, length: int, generator: torch.Generator) -> Batch:
        return Batch(self.corpus.sample(batch, length, generator))

    def held_out(self, batch: int, length: int, generator: torch.Generator) -> Batch:
        return Batch(self.corpus.held_out_pieces(batch, length))


@dataclass(frozen=True)
class MultiQueryRecall:
    """Multi-query associative recall (arXiv 2312.04927): pairs of letters, hidden; then the keys.

    Keys are different capitals from A to M, values capitals from N to Z. The pairs lie anywhere in
    filler, which is dots, or real text whose capitals have been made small.

    Attributes:
        pairs: keys with a value each.
        rounds: how often all keys are asked again at the end, in another order each time.
        near: bytes before the first question in which no pair lies.
        corpus: of the text that hides the pairs; None: dots.
    """

    pairs: int = 8
    rounds: int = 2
    near: int = 0
    corpus: Corpus | None = None

    def __post_init__(self) -> None:
        check_types(self)
        rules = (("rounds", self.rounds >= 1, "at least 1"), ("near", self.near >= 0, "at least 0"))
        check_rules(self, rules)

    def batch(self, batch: int, length: int, generator: torch.Generator) -> Batch:
        if self.corpus is None:
            return self.hide(torch.full((batch, length), _FILLER), generator)
        return self.hide(without_capitals(self.corpus.sample(batch, length, generator)), generator)

    def held_out(self, batch: int, length: int, generator: torch.Generator) -> Batch:
        if self.corpus is None:
            return self.batch(batch, length, generator)
        pieces = self.corpus.held_out_pieces(batch, length)
        return self.hide(without_capitals(pieces), generator)

    def hide(self, tokens: Tensor, generator: torch.Generator) -> Batch:
        """Writes pairs and questions into texts `[B, S]`; capitals in them mislead."""
        batch, length = tokens.shape
        asked = 2 * self.pairs * self.rounds
        room = (length - asked - self.near - 1) // 2  # pairs begin at odd places, too
        if not 1 <= self.pairs <= min(len(_RECALL_KEYS), room):
            least = asked + self.near + 2 * self.pairs + 1
            found = f"{self.pairs} with length {length}"
            expected = f"from 1 to {len(_RECALL_KEYS)}, with a length of at least {least}"
            raise InvalidArgument("MultiQueryRecall", "pairs", found, expected)
        keys = torch.tensor(_RECALL_KEYS)[_choices(batch, len(_RECALL_KEYS), self.pairs, generator)]
        values = torch.randint(
            _RECALL_VALUES.start, _RECALL_VALUES.stop, keys.shape, generator=generator
        )
        shift = torch.randint(2, (batch, 1), generator=generator)
        places = 2 * _choices(batch, room, self.pairs, generator) + shift
        tokens.scatter_(1, places, keys).scatter_(1, places + 1, values)
        again = [_choices(batch, self.pairs, self.pairs, generator) for _ in range(self.rounds)]
        order = torch.cat(again, 1)
        tokens[:, length - asked :: 2] = keys.gather(1, order)
        tokens[:, length - asked + 1 :: 2] = values.gather(1, order)
        counted = torch.zeros(batch, length, dtype=torch.bool)
        counted[:, length - asked + 1 :: 2] = True
        return Batch(tokens, counted)


def _choices(batch: int, count: int, chosen: int, generator: torch.Generator) -> Tensor:
    """`[batch, chosen]` different numbers below `count`, in random order."""
    return torch.rand(batch, count, generator=generator).argsort(1)[:, :chosen]


def without_capitals(text: Tensor) -> Tensor:
    """Bytes with small letters for capital ones."""
    return torch.where((text >= ord("A")) & (text <= ord("Z")), text + 32, text)
