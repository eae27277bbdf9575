"""A case's name means the same problem in every revision.

Reports of `nsa conform`, saved runs and result files name cases, and are compared over revisions
and machines. `problems.txt` records what each name stands for: tags, scalar arguments,
options, shapes, lengths, and how many elements are NaN, infinite or no index; nothing that depends
on how torch draws numbers. Whoever changes a problem on purpose writes the file anew:
`python tests/conformance/test_problems.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from torch import Tensor

from nsa_neuron.ops import OPS

if TYPE_CHECKING:
    from nsa_neuron.cases import Case
    from nsa_neuron.spec import OpSpec

RECORD = Path(__file__).with_name("problems.txt")


def shown(name: str, value: object) -> str:
    """An argument in short, such as `lse=1x40x4 (28 absent)`; lengths by their contents."""
    if not isinstance(value, Tensor):
        return f"{name}={value}"
    if "seqlens" in name:
        return f"{name}={value.tolist()}"
    absent = ~value.isfinite() if value.is_floating_point() else value < 0
    shape = "x".join(map(str, value.shape))
    return f"{name}={shape}" + (f" ({int(absent.sum())} absent)" if absent.any() else "")


def line(spec: OpSpec, case: Case) -> str:
    """One problem; the large ones that are only timed by their sizes."""
    parts: dict[str, Any] = {**case.scalars, **case.options}
    if "bench" in case.tags:
        parts |= case.sizes
    else:
        made = spec.inputs(case, case.generator())
        parts |= {name: made[name] for name in spec.names if name in made}
    told = (shown(name, value) for name, value in parts.items() if value is not None)
    return f"{case.name} [{' '.join(case.tags)}] " + ", ".join(told)


def problems() -> Iterator[tuple[str, str]]:
    """What every op's section of the record says."""
    for spec in OPS:
        yield spec.name, "\n".join(line(spec, case) for case in spec.cases)


def recorded() -> dict[str, str]:
    sections = RECORD.read_text(encoding="utf-8").strip().split("\n\n")
    return {head.rstrip(":"): text for head, text in (part.split("\n", 1) for part in sections)}


def test_every_op_has_a_record() -> None:
    assert list(recorded()) == [spec.name for spec in OPS]


@pytest.mark.parametrize("spec", OPS, ids=[spec.name for spec in OPS])
def test_a_name_means_the_recorded_problem(spec: OpSpec) -> None:
    now = [line(spec, case) for case in spec.cases]
    assert now == recorded()[spec.name].splitlines()


if __name__ == "__main__":
    RECORD.write_text("\n\n".join(f"{op}:\n{text}" for op, text in problems()) + "\n", "utf-8")
