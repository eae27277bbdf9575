"""Facts planted in a document: does a model find them, and where does it look for them?

A fact is what `nsa train --task needle` hides: a capital from A to M with one from N to Z behind
it, anywhere in a real text without other capitals. At the end of the text each first letter is
written again, in another order; the model's next byte is its answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from nsa_neuron.errors import InvalidArgument, InvalidType
from nsa_neuron.fields import SEEDS, check_int
from nsa_neuron.show import Look, look
from nsa_neuron.training import MultiQueryRecall
from nsa_neuron.training.tasks import without_capitals

if TYPE_CHECKING:
    from nsa_neuron.nn import ByteLanguageModel
    from nsa_neuron.show.record import Passage, View


@dataclass(frozen=True)
class Answer:
    """What one question brought.

    Attributes:
        asked: position of the question, the letter that is asked for.
        place: position of the fact.
        fact: its two letters.
        said: the model's answer, a byte.
        seen: what picked the fact's block by importance: layer and kv head, and the block.
    """

    asked: int
    place: int
    fact: bytes
    said: bytes
    seen: tuple[tuple[View, Passage], ...]

    @property
    def right(self) -> bool:
        """Whether it is the fact's second letter."""
        return self.said == self.fact[1:]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        picked = [
            {"layer": view.layer, "kv_head": view.kv_head, "first": p.first, "last": p.last}
            for view, p in self.seen
        ]
        return {
            "asked": self.asked, "place": self.place, "fact": self.fact.decode(),
            "said": self.said.decode(errors="replace"), "right": self.right, "picked_by": picked,
        }  # fmt: skip


@dataclass(frozen=True)
class Planted:
    """A document with facts, and the answers.

    Attributes:
        text: the document, its capitals made small, with facts and questions.
        answers: farthest fact first.
        look: what every question looked at; None where nobody asked.
    """

    text: bytes
    answers: tuple[Answer, ...]
    look: Look | None

    @property
    def right(self) -> int:
        """How many answers are right."""
        return sum(answer.right for answer in self.answers)


@torch.no_grad()
def plant(
    model: ByteLanguageModel, document: bytes, facts: int = 8, seed: int = 0, looking: bool = True
) -> Planted:
    """Plants facts in a document, asks for all of them, and looks where the model looks.

    Args:
        model: trained on the needle task.
        document: its last bytes give way to the questions.
        facts: how many. They lie before what the windows of all layers can hand on.
        seed: of letters and places.
        looking: whether to look, which needs NSA layers.

    Raises:
        InvalidArgument: the document is too short for the facts.
    """
    if not isinstance(document, (bytes, bytearray)):
        raise InvalidType("plant", "document", f"of type {type(document).__name__}", "bytes")
    if not document:
        raise InvalidArgument("plant", "document", "empty", "at least one byte")
    check_int("plant", "facts", facts, 1)
    check_int("plant", "seed", seed, SEEDS[0], SEEDS[-1])
    plain = torch.frombuffer(bytearray(document), dtype=torch.uint8).long()[None]
    near = len(model.kinds) * model.config.window
    task = MultiQueryRecall(facts, rounds=1, near=near)
    made = task.hide(without_capitals(plain), torch.Generator().manual_seed(seed))
    text = bytes(made.tokens[0].tolist())
    said = model(made.tokens, last=2 * facts)[0].argmax(-1).tolist()
    questions = range(len(text) - 2 * facts, len(text), 2)
    found = look(model, text, questions) if looking else None
    answers = [
        _answer(text, asked, letter, found)
        for asked, letter in zip(questions, said[::2], strict=True)
    ]
    return Planted(text, tuple(sorted(answers, key=lambda a: a.place)), found)


def _answer(text: bytes, asked: int, said: int, found: Look | None) -> Answer:
    fact = text[asked : asked + 2]
    place = text.index(fact)
    seen = tuple(
        (view, p)
        for view in (found.views if found else ())
        if view.query == asked
        for p in view.picked
        if p.why == "importance" and p.first <= place <= p.last
    )
    return Answer(asked, place, fact, bytes([said]), seen)


def report(planted: Planted) -> str:
    """The answers for people."""
    text, answers = planted.text, planted.answers
    far = answers[0]
    lines = [
        f"planted    {len(answers)} facts, two capitals each, in {len(text):,} bytes",
        f"found      {planted.right} of {len(answers)} when asked for at the end",
        f"farthest   {far.fact.decode()} at byte {far.place:,}, asked for "
        f"{far.asked - far.place:,} bytes later: answered {far.said.decode(errors='replace')}, "
        f"{'right' if far.right else 'wrong'}",
    ]
    for view, p in far.seen[:1]:
        passage = text[max(0, p.first - 30) : p.last + 31].decode(errors="replace")
        flat = "".join(c if c.isprintable() else "·" for c in passage)
        lines.append(
            f"passage    picked by layer {view.layer}, kv head {view.kv_head}, "
            f"bytes {p.first} to {p.last}: … {flat} …"
        )
    if not far.seen:
        lines.append("passage    no layer picked its block: it was seen in compressed form only")
    return "\n".join(lines)
