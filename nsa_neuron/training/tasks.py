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
    """Numbers for names, hidden in real text and asked for at its end.

    To train on, some facts may be asked for more than once, so that there are easier questions,
    whose answers lie near; and the text around counts as well.

    Attributes:
        corpus: of the text around them.
        facts: how many at most, and how many questions.
        digits: of a number.
        near: bytes before the first question in which no fact lies.
    """

    corpus: Corpus
    facts: int = 4
    digits: int = 4
    near: int = 128

    def batch(self, batch: int, length: int, generator: torch.Generator) -> Batch:
        hidden = [
            int(torch.randint(1, self.facts + 1, (), generator=generator)) for _ in range(batch)
        ]
        text = self.corpus.sample(batch, length, generator)
        return self._hide(text, hidden, generator)

    def held_out(self, batch: int, length: int, generator: torch.Generator) -> Batch:
        text = self.corpus.held_out_pieces(batch, length)
        return self._hide(text, [self.facts] * batch, generator)

    def _hide(self, text: Tensor, hidden: list[int], generator: torch.Generator) -> Batch:
        counted = torch.zeros(text.shape, dtype=torch.bool)
        size, question = len(self._sentence(False)), len(self._sentence(True))
        asked = self.facts * question
        room = text.shape[1] - asked - self.near
        if room // size < self.facts:
            expected = f"at least {asked + self.near + self.facts * size}"
            raise InvalidArgument("Needle", "length", text.shape[1], expected)
        for row, flags, count in zip(text, counted, hidden, strict=True):
            facts = [self._fact(generator) for _ in range(count)]
            shift = int(torch.randint(room % size + 1, (), generator=generator))
            places = torch.randperm(room // size, generator=generator)[:count] * size + shift
            for at, fact in zip(places.tolist(), facts, strict=True):
                row[at : at + size] = torch.tensor(list(needle(*fact)))
            order = torch.randperm(self.facts, generator=generator) % count
            end = b"".join(needle(*facts[i], asked=True) for i in order.tolist())
            row[-asked:] = torch.tensor(list(end))
            for stop in range(text.shape[1], text.shape[1] - asked, -question):
                flags[stop - self.digits : stop] = True
        return Batch(text, counted, as_well=True)

    def _sentence(self, asked: bool) -> bytes:
        return needle(b"name", b"0" * self.digits, asked=asked)

    def _fact(self, generator: torch.Generator) -> tuple[bytes, bytes]:
        name = torch.randint(26, (4,), generator=generator) + 97
        number = torch.randint(10, (self.digits,), generator=generator) + 48
        return bytes(name.tolist()), bytes(number.tolist())


def needle(name: bytes, number: bytes, *, asked: bool = False) -> bytes:
    """The sentence that hides a number, or the question with its answer, which ends with it."""
    if asked:
        return b"\n\nQ: the code of " + name + b" is " + number
    return b"\nThe code of " + name + b" is " + number + b".\n"
