"""The form of a lookup that a model of 0.15 M parameters can learn, over any text.

A name (a section's title, a function, a visit's code) is one token, as frequent words are in every
vocabulary: a capital, from A to M, bound to the name anew in each document; all other letters are
small. Where the name is defined, the text goes on behind it; where it is only mentioned, something
else follows. At the end of the document the names come again, and the model has to say the first
byte of what stands behind each name's definition. Knowing names by heart does not help.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from nsa_neuron.errors import InvalidArgument
from nsa_neuron.training import Batch

if TYPE_CHECKING:
    import re

NAMES = "ABCDEFGHIJKLM"
ASKED = 12  # names of a document
LEAST = 512  # bytes of a document
AROUND = 700  # bytes on both sides of an entry
SPARE = 2000  # bytes that tokens may save
MENTIONED = 0.5  # how many names of a training document are mentioned elsewhere, too


class Occurrence(NamedTuple):
    """Where a name stands in a text: `text[start:end]`; whether it is defined there."""

    start: int
    end: int
    name: str
    defines: bool


@dataclass(frozen=True)
class Entry:
    """A definition: what stands before its name, and what behind it, with the answer first."""

    before: str
    behind: str


@dataclass(frozen=True)
class Document:
    """A text with names, and the place of each one's definition: `text[place]` is the name."""

    text: bytes
    places: dict[str, int]


class Source(Protocol):
    """What documents are made of.

    Attributes:
        mention: how a text refers to a name, which is `%s`.
    """

    mention: str

    def entry(self, draw: random.Random) -> Entry:
        """A definition to train on, with 500 bytes and more on both sides if there are."""
        ...

    def whole(self, length: int, draw: random.Random) -> Document:
        """To be tested on: so many bytes in their own order, with up to `ASKED` names."""
        ...


def plain(text: str) -> str:
    """The text as the model reads it: ASCII without capitals."""
    return text.encode("ascii", "replace").decode().lower()


def entries(text: str, definition: re.Pattern[str]) -> list[Entry]:
    """What stands around each definition of a plain text."""
    return [
        Entry(text[max(0, m.start() - AROUND) : m.start()], text[m.end() : m.end() + AROUND])
        for m in definition.finditer(text)
    ]


def bound(
    text: str, found: Iterable[Occurrence], names: Sequence[str], draw: random.Random
) -> Document:
    """The text with a letter for each of the names, wherever it occurs.

    Args:
        text: plain.
        found: occurrences of names; those of others are left as they are.
        names: defined once each.
        draw: of the letters.
    """
    letters = dict(zip(names, draw.sample(NAMES, len(names)), strict=True))
    parts: list[str] = []
    places: dict[str, int] = {}
    size = done = 0
    for start, end, name, defines in sorted(found):
        if name in letters and start > done:  # a byte at least stands behind each name
            parts += [text[done:start], letters[name]]
            size += start - done
            if defines:
                places[letters[name]] = size
            size, done = size + 1, end
    return Document("".join([*parts, text[done:]]).encode(), places)


def defined_once(found: Sequence[Occurrence], length: int) -> list[str]:
    """Names that a text defines once, and within that many bytes."""
    times = Counter(o.name for o in found if o.defines)
    return [o.name for o in found if o.defines and times[o.name] == 1 and o.end < length]


def whole_text(
    text: str, found: Sequence[Occurrence], length: int, draw: random.Random
) -> Document:
    """`bound` with up to `ASKED` names that are defined once in the text, cut to a length.

    Names that are mentioned as well are taken first.
    """
    mentioned = {o.name for o in found if not o.defines}
    once = defined_once(found, length)
    draw.shuffle(once)
    once.sort(key=lambda name: name not in mentioned)
    if not once:
        raise InvalidArgument("whole_text", "text", "without definitions", "with one at least")
    document = bound(text, found, once[:ASKED], draw)
    return Document(document.text[:length], document.places)


def asked(document: Document, order: Sequence[str]) -> bytes:
    """The document with questions and answers behind it."""
    text = document.text
    pairs = [bytes([ord(name), text[document.places[name] + 1]]) for name in order]
    return text + b"".join(pairs)


@dataclass(frozen=True)
class Lookup:
    """The training task of a source; every name is asked for twice."""

    source: Source

    def batch(self, batch: int, length: int, generator: torch.Generator) -> Batch:
        if length < LEAST:
            raise InvalidArgument("Lookup", "length", length, f"at least {LEAST}")
        rows = [self._row(length, generator) for _ in range(batch)]
        counted = torch.zeros(batch, length, dtype=torch.bool)
        counted[:, length - 4 * ASKED + 1 :: 2] = True
        return Batch(torch.stack(rows), counted)

    held_out = batch  # names and letters are drawn anew each time

    def _row(self, length: int, generator: torch.Generator) -> Tensor:
        draw = random.Random(int(torch.randint(2**40, (), generator=generator)))
        document = training_document(self.source, length - 4 * ASKED, draw)
        order = [name for _ in range(2) for name in draw.sample(list(document.places), ASKED)]
        return torch.tensor(list(asked(document, order)))


def training_document(source: Source, length: int, draw: random.Random) -> Document:
    """Pieces around `ASKED` definitions, back to back, and a few mentions."""
    letters = draw.sample(NAMES, ASKED)
    text, places = "", {}
    for i, letter in enumerate(letters):
        entry = source.entry(draw)
        share = length * (i + 1) // ASKED - len(text)
        behind = draw.randint(8, share - 9)
        ahead = share - 1 - behind
        places[letter] = len(text) + ahead
        text += entry.before[-ahead:].rjust(ahead) + letter + entry.behind[:behind].ljust(behind)
    for letter in letters:
        if draw.random() < MENTIONED:
            text = _with_mention(text, source.mention % letter, draw)
    return Document(text.encode(), places)


def _with_mention(text: str, mention: str, draw: random.Random) -> str:
    """The text with a mention over some of its bytes, if that hides no name or its answer."""
    at = draw.randrange(len(text) - len(mention))
    end = at + len(mention)
    free = text[max(0, at - 8) : end + 1].islower()
    return text[:at] + mention + text[end:] if free else text
