"""What is trained: continuing text, and two recall tasks that no short window can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from nsa_neuron.errors import InvalidArgument

if TYPE_CHECKING:
    from nsa_neuron.training.corpus import Corpus

_RECALL_KEYS = range(ord("A"), ord("Z") + 1)
_RECALL_VALUES = range(ord("a"), ord("z") + 1)
_FILLER = ord(".")


@dataclass(frozen=True)
class Batch:
    """Sequences, and which of their bytes count.

    Attributes:
        tokens: `[B, S]` int64.
        counted: `[B, S]` bool: bytes whose prediction from those before counts; None: all.
        as_well: train on all bytes as well, with as much weight as on those that count.
    """

    tokens: Tensor
    counted: Tensor | None = None
    as_well: bool = False


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
    """Multi-query associative recall (arXiv 2312.04927): pairs of letters in filler, then the keys.

    Attributes:
        pairs: keys with a value each, anywhere in the filler (".").
        rounds: how often all keys are asked again at the end, in another order each time.
        near: bytes before the first question in which no pair lies.
    """

    pairs: int = 8
    rounds: int = 2
    near: int = 0

    def batch(self, batch: int, length: int, generator: torch.Generator) -> Batch:
        asked = 2 * self.pairs * self.rounds
        room = (length - asked - self.near) // 2
        if not 1 <= self.pairs <= min(len(_RECALL_KEYS), room):
            least = asked + self.near + 2 * self.pairs
            found = f"{self.pairs} with length {length}"
            expected = f"from 1 to {len(_RECALL_KEYS)}, with a length of at least {least}"
            raise InvalidArgument("MultiQueryRecall", "pairs", found, expected)
        keys = torch.tensor(_RECALL_KEYS)[_choices(batch, len(_RECALL_KEYS), self.pairs, generator)]
        values = torch.randint(
            _RECALL_VALUES.start, _RECALL_VALUES.stop, keys.shape, generator=generator
        )
        places = 2 * _choices(batch, room, self.pairs, generator)
        tokens = torch.full((batch, length), _FILLER)
        tokens.scatter_(1, places, keys).scatter_(1, places + 1, values)
        again = [_choices(batch, self.pairs, self.pairs, generator) for _ in range(self.rounds)]
        order = torch.cat(again, 1)
        tokens[:, length - asked :: 2] = keys.gather(1, order)
        tokens[:, length - asked + 1 :: 2] = values.gather(1, order)
        counted = torch.zeros(batch, length, dtype=torch.bool)
        counted[:, length - asked + 1 :: 2] = True
        return Batch(tokens, counted)

    held_out = batch


def _choices(batch: int, count: int, chosen: int, generator: torch.Generator) -> Tensor:
    """`[batch, chosen]` different numbers below `count`, in random order."""
    return torch.rand(batch, count, generator=generator).argsort(1)[:, :chosen]


@dataclass(frozen=True)
class Needle:
    """Assignments (`K=w`, a line each) hidden in real text, whose values are asked at its end.

    Attributes:
        corpus: of the text around them.
        facts: how many; their names are different capital letters.
        rounds: how often all names are asked for at the end, in another order each time.
        letters: of a value, any small ones.
        near: bytes before the first question in which no fact lies.
        as_well: the text around counts as well, in training.
    """

    corpus: Corpus
    facts: int = 8
    rounds: int = 2
    letters: int = 1
    near: int = 0
    as_well: bool = False

    def batch(self, batch: int, length: int, generator: torch.Generator) -> Batch:
        text = self.corpus.sample(batch, length, generator)
        return self._hide(text, generator)

    def held_out(self, batch: int, length: int, generator: torch.Generator) -> Batch:
        return self._hide(self.corpus.held_out_pieces(batch, length), generator)

    def _hide(self, text: Tensor, generator: torch.Generator) -> Batch:
        batch, length = text.shape
        size, question = self.letters + 4, self.letters + 3
        asked = self.facts * self.rounds * question
        room = length - asked - self.near
        if not 1 <= self.facts <= min(len(_RECALL_KEYS), room // size):
            least = asked + self.near + self.facts * size
            found = f"{self.facts} with length {length}"
            expected = f"from 1 to {len(_RECALL_KEYS)}, with a length of at least {least}"
            raise InvalidArgument("Needle", "facts", found, expected)
        names = _choices(batch, len(_RECALL_KEYS), self.facts, generator)
        values = torch.randint(
            _RECALL_VALUES.start,
            _RECALL_VALUES.stop,
            (*names.shape, self.letters),
            generator=generator,
        )
        places = size * _choices(batch, room // size, self.facts, generator)
        counted = torch.zeros(text.shape, dtype=torch.bool)
        for i, (row, flags) in enumerate(zip(text, counted, strict=True)):
            facts = [
                assignment(_RECALL_KEYS[name], bytes(value))
                for name, value in zip(names[i].tolist(), values[i].tolist(), strict=True)
            ]
            shift = int(torch.randint(room % size + 1, (), generator=generator))
            for at, fact in zip(places[i].tolist(), facts, strict=True):
                row[at + shift : at + shift + size] = torch.tensor(list(fact + b"\n"))
            order = [torch.randperm(self.facts, generator=generator) for _ in range(self.rounds)]
            end = b"".join(facts[j] for j in torch.cat(order).tolist())
            row[-asked:] = torch.tensor(list(end))
            for stop in range(length, length - asked, -question):
                flags[stop - self.letters : stop] = True
        return Batch(text, counted, self.as_well)


def assignment(name: int, value: bytes) -> bytes:
    """A line that says or asks what a letter stands for; only a fact has a line end behind it."""
    return b"\n%c=%s" % (name, value)
