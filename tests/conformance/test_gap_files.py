"""Known-gap files name what exists and give reasons."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import nsa_neuron
from nsa_neuron.conformance import Gap, known_gaps, problems
from nsa_neuron.conformance.gaps import load_gaps
from nsa_neuron.errors import NsaError
from nsa_neuron.registry import BUILT_IN

FILES = sorted(Path(nsa_neuron.__file__).parent.glob("known_gaps/*.json"))


def test_each_file_belongs_to_a_backend_and_each_backend_has_one() -> None:
    assert {file.stem for file in FILES} == set(BUILT_IN)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_gap_covers_some_case(file: Path) -> None:
    known = [(p.op, p.dtype_name, p.label) for p in problems()]
    for gap in known_gaps(file.stem):
        assert any(gap.covers(op, gap.mode, dtype, case) for op, dtype, case in known), gap


def test_gaps_are_read_from_a_file_with_where_they_stand(tmp_path: Path) -> None:
    row = {"op": "a*", "mode": "sim", "dtype": "*", "case": "x", "reason": "why"}
    file = tmp_path / "gaps.json"
    file.write_text(json.dumps({"gaps": [row]}))
    (gap,) = load_gaps(file)
    assert gap == Gap(**row, source=str(file))
    assert gap.covers("attention", "sim", "float16", "x")
    assert not gap.covers("attention", "hw", "float16", "x")


@pytest.mark.parametrize("change", [{"reason": " "}, {"typo": "x"}])
def test_gaps_without_reason_or_with_other_keys_are_refused(
    tmp_path: Path, change: dict[str, str]
) -> None:
    row = {"op": "*", "mode": "*", "dtype": "*", "case": "*", "reason": "why", **change}
    file = tmp_path / "gaps.json"
    file.write_text(json.dumps({"gaps": [row]}))
    with pytest.raises(NsaError, match="gap 0"):
        load_gaps(file)


@pytest.mark.parametrize("field", ["op", "mode", "dtype", "case"])
def test_a_gap_covers_nothing_that_differs_in_one_field(field: str) -> None:
    case = {"op": "attention", "mode": "sim", "dtype": "float32", "case": "one_token"}
    gap = Gap(**case, reason="why")
    assert gap.covers(**case)
    assert not gap.covers(**{**case, field: case[field] + "_"})
    assert not gap.covers(**{**case, field: case[field][:-1]})
    assert Gap(**{**case, field: "*"}, reason="why").covers(**{**case, field: "anything"})
