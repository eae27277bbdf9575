"""What is trained: continuing text, and two recall tasks that no short window can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from nsa_neuron.errors import InvalidArgument

if TYPE_CHECKING:
    from nsa_neuron.training.corpus import Corpus

_RECALL_KEYS = range(65, 65 + 58)  # letters, and what lies between Z and a
_RECALL_VALUES = range(128, 256)
_FILLER = 46  # "."


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
    """Multi-query associative recall (arXiv 2312.04927): pairs of bytes, filler, then the keys.

    Attributes:
        pairs: keys with a value each, at the start of the sequence; asked again, in another order,
            at its end. Everything between is filler, so recall has to cross it.
    """

    pairs: int = 8

    def batch(self, batch: int, length: int, generator: torch.Generator) -> Batch:
        if not 1 <= self.pairs <= len(_RECALL_KEYS) or length < 4 * self.pairs:
            found = f"{self.pairs} with length {length}"
            expected = f"from 1 to {min(len(_RECALL_KEYS), length // 4)}"
            raise InvalidArgument("MultiQueryRecall", "pairs", found, expected)
        tokens = torch.full((batch, length), _FILLER)
        counted = torch.zeros(batch, length, dtype=torch.bool)
        ends = length - 2 * self.pairs
        for row, flags in zip(tokens, counted, strict=True):
            order = torch.randperm(len(_RECALL_KEYS), generator=generator)[: self.pairs]
            keys = torch.tensor(_RECALL_KEYS)[order]
            values = torch.randint(
                _RECALL_VALUES.start, _RECALL_VALUES.stop, keys.shape, generator=generator
            )
            row[: 2 * self.pairs] = torch.stack([keys, values], 1).flatten()
            again = torch.randperm(self.pairs, generator=generator)
            row[ends:] = torch.stack([keys[again], values[again]], 1).flatten()
            flags[ends + 1 :: 2] = True
        return Batch(tokens, counted)

    held_out = batch


@dataclass(frozen=True)
class Needle:
    """A number for a name, hidden in real text and asked for at its end.

    Attributes:
        corpus: of the text around it.
        digits: of the number.
        near: bytes at the end in which the needle never lies.
    """

    corpus: Corpus
    digits: int = 4
    near: int = 256

    def batch(self, batch: int, length: int, generator: torch.Generator) -> Batch:
        text = self.corpus.sample(batch, length, generator)
        return self._hide(text, generator)

    def held_out(self, batch: int, length: int, generator: torch.Generator) -> Batch:
        return self._hide(self.corpus.held_out_pieces(batch, length), generator)

    def _hide(self, text: Tensor, generator: torch.Generator) -> Batch:
        counted = torch.zeros(text.shape, dtype=torch.bool)
        length = text.shape[1]
        for row, flags in zip(text, counted, strict=True):
            name = bytes((torch.randint(26, (4,), generator=generator) + 97).tolist())
            number = bytes((torch.randint(10, (self.digits,), generator=generator) + 48).tolist())
            fact, question = needle(name, number), needle(name, number, asked=True)
            room = length - self.near - len(fact) - len(question)
            if room < 1:
                expected = f"at least {length - room + 1}"
                raise InvalidArgument("Needle", "length", length, expected)
            at = int(torch.randint(room, (), generator=generator))
            row[at : at + len(fact)] = torch.tensor(list(fact))
            row[-len(question) :] = torch.tensor(list(question))
            flags[-self.digits :] = True
        return Batch(text, counted)


def needle(name: bytes, number: bytes, *, asked: bool = False) -> bytes:
    """The sentence that hides a number, or the question with its answer, which ends with it."""
    if asked:
        return b"\n\nQ: the code of " + name + b" is " + number
    return b"\nThe code of " + name + b" is " + number + b".\n"
