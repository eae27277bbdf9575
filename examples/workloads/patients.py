"""A long record: a patient's visits over 30 years, made from a seed, and the visits that matter.

A line is a visit. Four problems matter, with three visits each (found, confirmed, treated): these
visits carry a code, which is a name, and behind it the finding, whose first letter is the answer.
Later visits mention the codes. Hundreds to thousands of other visits say nothing of interest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lookup import ASKED, NAMES, Document, Entry

if TYPE_CHECKING:
    import random

FINDINGS = tuple(
    "asthma bronchitis cataract diabetes eczema fracture gout hepatitis ischaemia jaundice "
    "kidney-stone lesion migraine nodule oedema pneumonia quinsy rash sciatica tumour ulcer "
    "vertigo wart xerosis yaws zoster".split()
)
COMPLAINTS = (
    "headache", "back pain", "cough", "fatigue", "a bruise on the left arm", "no complaints",
    "dizziness when standing", "shortness of breath on stairs", "poor sleep", "a sprained ankle",
)  # fmt: skip
ADVICE = ("rest", "physiotherapy", "ibuprofen 400 mg", "a blood test", "see again in two weeks",
          "no change of medication", "more walking", "a chest x-ray")  # fmt: skip
YEARS, FIRST = 30, 1995
CODED = "visit, code "  # stands before the name
TOGETHER = 3  # visits of a problem


class Patients:
    """Synthetic histories."""

    mention = "as for %s"

    def entry(self, draw: random.Random) -> Entry:
        before = "".join(_line(draw, draw.random()) for _ in range(6))
        date, rest = _visit(draw, draw.random())
        behind = draw.choice(FINDINGS) + rest
        behind += "".join(_line(draw, draw.random()) for _ in range(6))
        return Entry(f"{before}{date} {CODED}", behind)

    def whole(self, length: int, draw: random.Random) -> Document:
        """Letters in the order of the problems: three and three belong together."""
        letters = draw.sample(NAMES, ASKED)
        typical = len(_line(draw, 0.5))
        visits = length // typical
        coded = dict(zip(sorted(draw.sample(range(visits * 9 // 10), ASKED)), letters, strict=True))
        text, places, known = "", {}, []
        for i in range(visits * 2):
            date, rest = _visit(draw, min(1.0, i / visits))
            if i in coded:
                places[coded[i]] = len(text) + len(f"{date} {CODED}")
                known.append(coded[i])
                text += f"{date} {CODED}{coded[i]}{draw.choice(FINDINGS)}{rest}"
            elif known and draw.random() < ASKED / visits:
                text += f"{date} visit: {self.mention % draw.choice(known)}, no news{rest}"
            else:
                text += f"{date} visit: {draw.choice(COMPLAINTS)}{rest}"
            if len(text) > length:
                break
        return Document(text[:length].encode(), {letter: places[letter] for letter in letters})


def _visit(draw: random.Random, share: float) -> tuple[str, str]:
    """Date, at a share of the 30 years, and what stands behind complaint or finding."""
    day = int(share * YEARS * 360)
    date = f"{FIRST + day // 360}-{day % 360 // 30 + 1:02}-{day % 30 + 1:02}"
    rest = (
        f"; blood pressure {draw.randint(105, 160)}/{draw.randint(60, 100)}, pulse "
        f"{draw.randint(52, 98)}, weight {draw.uniform(68, 92):.1f} kg. "
        f"advice: {draw.choice(ADVICE)}.\n"
    )
    return date, rest


def _line(draw: random.Random, share: float) -> str:
    date, rest = _visit(draw, share)
    return f"{date} visit: {draw.choice(COMPLAINTS)}{rest}"
