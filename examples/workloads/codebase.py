"""A code base: from a call to the called function's definition, over the standard library's source.

The document is source files one behind the other. A name is a function's; `name(` is one token in
calls, and in definitions with a `self` or `cls` behind it, so that the answer is the first letter
of the first parameter that says something. Training uses other files than tests.
"""

from __future__ import annotations

import re
from functools import cached_property
from typing import TYPE_CHECKING

from lookup import SPARE, Document, Entry, Occurrence, defined_once, entries, plain, whole_text

from nsa_neuron.training import python_corpus

if TYPE_CHECKING:
    import random

DEFINITION = re.compile(r"(?<=\bdef )(\w{4,})\((?:(?:self|cls),\s*)?(?!self|cls)(?=[a-z])")
CALL = re.compile(r"(?<!def )\b(\w{4,})\(")
DRAWS = 64  # stretches of source that are looked at for one that defines something


class CodeBase:
    """The standard library's source."""

    mention = "= %s"

    @cached_property
    def _entries(self) -> list[Entry]:
        source = python_corpus().parts["source"].numpy().tobytes()
        return entries(_text(source), DEFINITION)

    @cached_property
    def _held_out(self) -> str:
        """From the last of the held-out help topics on: source only."""
        text = python_corpus().held_out.numpy().tobytes()
        return _text(text[text.index(b"\nimport ") :])

    def entry(self, draw: random.Random) -> Entry:
        return draw.choice(self._entries)

    def whole(self, length: int, draw: random.Random) -> Document:
        for _ in range(DRAWS):
            text = self._held_out
            start = draw.randrange(len(text) - 2 * length - SPARE)
            text = text[start : start + length + length // 8 + SPARE]
            found = [Occurrence(m.start(), m.end(), m[1], True) for m in DEFINITION.finditer(text)]
            if defined_once(found, length):
                break  # else a stretch of tables, of which some Pythons have more than others
        found += [Occurrence(m.start(), m.end(), m[1], False) for m in CALL.finditer(text)]
        return whole_text(text, found, length, draw)


def _text(source: bytes) -> str:
    return plain(source.decode("utf-8", "replace"))
