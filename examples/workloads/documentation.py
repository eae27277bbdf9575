"""A documentation set: from a section's title to the section, over Python's own documentation.

The document is `pydoc_data.topics` in an order of its own. A name is a section's title; where the
section begins, the text behind the title is its first sentence (articles and quotes at its start
belong to the title's token). Other sections mention it: "see section ...".
"""

from __future__ import annotations

import re
from functools import cached_property
from typing import TYPE_CHECKING

from lookup import SPARE, Document, Entry, Occurrence, entries, plain, whole_text

from nsa_neuron.training.corpus import help_topics

if TYPE_CHECKING:
    import random

TITLE = re.compile(
    r"^(\S[^\n]{2,70})\n[*=~^-]{4,}\n+(?:\s|the |a |an |[\"'*(\[>])*(?=[a-z])", re.MULTILINE
)


class Documentation:
    """Python's help topics."""

    mention = 'see section "%s"'

    @cached_property
    def topics(self) -> list[str]:
        """Each as the model reads it, followed by empty lines."""
        return [plain(topic.decode()) + "\n\n" for topic in help_topics()]

    @cached_property
    def _entries(self) -> list[Entry]:
        return entries("".join(self.topics), TITLE)

    def entry(self, draw: random.Random) -> Entry:
        return draw.choice(self._entries)

    def whole(self, length: int, draw: random.Random) -> Document:
        text = "".join(draw.sample(self.topics, len(self.topics)))[: length + length // 8 + SPARE]
        found = [Occurrence(m.start(), m.end(), m[1], True) for m in TITLE.finditer(text)]
        titles = sorted({o.name for o in found}, key=len, reverse=True)
        defined = {o.start for o in found}
        anywhere = re.compile("|".join(rf"(?<!\w){re.escape(title)}(?!\w)" for title in titles))
        found += [
            Occurrence(m.start(), m.end(), m[0], False)
            for m in anywhere.finditer(text)
            if m.start() not in defined
        ]
        return whole_text(text, found, length, draw)
