"""A report as text and as a web page, letter by letter: `report.txt` and `report.html`.

Both hold every status, three targets, two dtypes, letters that HTML must not take for its own, and
earlier reports. After a change that is wanted: `python tests/conformance/test_report_pages.py`
writes them again, and a person reads what changed.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from nsa_neuron import environment
from nsa_neuron.conformance import Outcome, Place, Report, Status, history, html, text
from nsa_neuron.conformance.between import Apart
from nsa_neuron.conformance.history import Past
from nsa_neuron.registry import Target

FOLDER = Path(__file__).parent
S = Status
PLACES = (
    Place(Target("a", "x"), "", "cpu"),
    Place(Target("b", "y"), "", "cpu"),
    Place(Target("c", "hw"), "no <device>", "cuda"),
)
ROWS = [
    Outcome("attention", "a:x", "float32", "s<1>", S.PASS, "", "o", 1.0, 4.0, 0.125),
    Outcome("attention", "a:x", "float32", "s2", S.PASS, "", "lse", 3.0, 4.0, 1.0),
    Outcome("attention", "a:x", "float32", "s3", S.UNSUPPORTED, "dims: <wide>"),
    Outcome("attention", "a:x", "bfloat16", "s<1>", S.FAIL, "o: 3 > <2>", "o", 3.0, 2.0, 2.5),
    Outcome("attention", "b:y", "float32", "s<1>", S.GAP, "known <gap>", "o", 9.0, 2.0),
    Outcome("attention", "c:hw", "float32", "", S.NOT_RUN, "no <device>"),
    Outcome("decode", "a:x", "float32", "s2", S.UNSUPPORTED, "dims: <wide>"),
    Outcome("decode", "a:x", "float32", "s4", S.UNSUPPORTED, "dims: <wide>"),
    Outcome("decode", "b:y", "float32", "s2", S.PASS),
]
APART = [
    Apart("attention", "float32", "s2", "a:x", "b:y", "lse", 1.0, 4.0),
    Apart("decode", "float16", "s<3>", "a:x", "b:y", "o", 2.0, 4.0),
    Apart("attention", "float64", "s2", "a:x", "c:hw", "o", 0.0, 4.0),
]
PAST = [
    Past(
        "r1", "2026-01-02T03:04:05",
        {("attention", "a:x", "float32"): "fail", ("attention", "b:y", "float32"): "known gap"},
        {"a:x": {"fail": 2}, "z<z": {"pass": 1}},
    ),
    Past("", "", {("attention", "a:x", "float32"): "pass"}, {"a:x": {"pass": 3, "known gap": 1}}),
]  # fmt: skip
HERE = {"cpu": "a <cpu>", "accelerator": "", "python": "3", "revision": ""}


def report() -> Report:
    return Report(PLACES, list(ROWS), list(APART))


def shown_as_text() -> str:
    forms = (text.matrix, text.cell_table, text.failures, text.between, text.refusals)
    return "\n\n".join(form(report()) for form in forms) + "\n"


def shown_as_html() -> str:
    """Without the styles, and without the time of now."""
    head, body = html.page(report(), PAST, "op <x>").split("</style>")
    assert head.startswith("<!doctype html>\n") and "<title>nsa-neuron conformance</title>" in head
    when = history.of(report().to_dict()).when[:16].replace("T", " ")
    return body.replace(when, "NOW")


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    made: dict[str, Any] = dict(HERE)
    monkeypatch.setattr(environment, "describe", lambda: made)
    monkeypatch.setattr(environment, "versions", lambda: {"torch": "9", "numpy": "8"})
    return made


def test_a_report_as_text() -> None:
    assert shown_as_text() == (FOLDER / "report.txt").read_text(encoding="utf-8")


def test_rows_of_a_report_are_coloured_by_their_status(monkeypatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)

    def colours(shown: str) -> list[str]:
        """Of the lines of a table's body."""
        lines = shown[shown.index("---") :].splitlines()[1:]
        found = [re.match("\x1b\\[([0-9;]+)m", line) for line in lines]
        return [x[1] if x else "" for x in found]

    assert colours(text.matrix(report()))[:2] == ["1;31", ""], "an op that fails somewhere"
    good, bad, warn, dim = "32", "1;31", "33", "90"
    assert colours(text.cell_table(report())) == [good, bad, warn, dim, good]


def test_a_report_as_a_page() -> None:
    assert shown_as_html() == (FOLDER / "report.html").read_text(encoding="utf-8")


def test_a_page_of_a_report_without_faults_says_nothing_of_what_there_is_not(here) -> None:
    here.update(accelerator="an H200", revision="abc+changes")
    shown = html.page(Report(PLACES[:2], [ROWS[0], ROWS[4]]))
    assert '<p class="verdict pass">2 cases, no fail</p>' in shown
    assert "<p>Every case of every op. Each case is judged" in shown
    setting = "a &lt;cpu&gt; · an H200 · Python 3 · torch 9 · numpy 8 · revision abc+changes"
    assert f'<p class="quiet">{setting}</p>' in shown
    middle = shown.split("</tbody></table></div>")[1].split("<h2>Cells</h2>")[0]
    assert middle.strip() == "", "no hindrance, failure, pair or history"


def test_texts_of_little_are_empty() -> None:
    made = Report(PLACES[:1], [ROWS[0]])
    assert (text.failures(made), text.between(made), text.refusals(made)) == ("", "", "")
    assert text.matrix(made).splitlines()[-1] == text.LEGEND


def test_data_of_a_report_is_whole(here) -> None:
    data = report().to_dict()
    assert data["schema"] == 1 and data["ok"] is False and data["environment"] == here
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", data["when"])
    assert data["targets"] == [
        {"target": "a:x", "device": "cpu", "hindrance": ""},
        {"target": "b:y", "device": "cpu", "hindrance": ""},
        {"target": "c:hw", "device": "cuda", "hindrance": "no <device>"},
    ]
    assert data["cells"][0] == {
        "op": "attention", "target": "a:x", "dtype": "float32", "status": "pass",
        "cases": {"pass": 2, "unsupported": 1}, "summary": "3 of 4 (lse, s2)",
        "unsupported": ["dims: <wide>"],
    }  # fmt: skip
    assert data["cells"][4]["unsupported"] == ["dims: <wide>"], "once, of two cases"
    assert data["between"] == [vars(APART[1]), vars(APART[2])]
    assert data["rows"] == [{**vars(row), "status": row.status.value} for row in ROWS]
    assert json.loads(report().to_json())["rows"] == data["rows"]
    assert report().to_json().startswith('{\n "schema": 1,\n')


def test_what_was_compared_with_no_budget_shows_no_share() -> None:
    made = Report(PLACES[:1], [Outcome("attention", "a:x", "float32", "s", S.PASS, error=1.0)])
    assert made.cells[0].summary == "" and 'class="bar"' not in html.page(made)
    made = Report(PLACES[:1], [Outcome("attention", "a:x", "float32", "s", S.PASS, budget=1.0)])
    assert made.cells[0].summary == "" and 'class="bar"' not in html.page(made)


def test_reasons_of_refusals_are_sorted() -> None:
    rows = [Outcome("attention", "a:x", "float32", c, S.UNSUPPORTED, c) for c in "dbeacf"]
    assert Report(PLACES[:1], rows).to_dict()["cells"][0]["unsupported"] == [*"abcdef"]


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -float("inf")])
def test_json_has_text_for_what_is_no_number(value: float) -> None:
    """In errors, budgets and differences."""
    row = Outcome("attention", "a:x", "float32", "s", S.FAIL, error=value, budget=value)
    apart = Apart("attention", "float32", "s", "a:x", "b:y", "o", value, 4.0)
    data = json.loads(Report(PLACES, [row], [apart]).to_json(), parse_constant=pytest.fail)
    assert data["rows"][0]["error"] == data["rows"][0]["budget"] == str(value)
    assert data["between"][0]["difference"] == str(value)


# ---- earlier reports


def test_reports_are_read_back_oldest_first(tmp_path: Path) -> None:
    files = []
    for i, when in enumerate(("2026-03-01T00:00:00", "", "2026-01-01T00:00:00")):
        data = {**report().to_dict(), "when": when}
        if not when:
            del data["when"]
        files.append(tmp_path / f"{i}.json")
        files[-1].write_text(json.dumps(data), encoding="utf-8")
    found = history.load(files)
    assert [past.when for past in found] == ["", "2026-01-01T00:00:00", "2026-03-01T00:00:00"]
    assert found[0].counts == {
        "a:x": {"pass": 2, "unsupported": 3, "fail": 1}, "b:y": {"known gap": 1, "pass": 1},
        "c:hw": {"not run": 1},
    }  # fmt: skip
    assert found[0].cells["attention", "a:x", "bfloat16"] == "fail" and len(found[0].cells) == 6
    assert found[1].name == "unknown revision 2026-01-01 00:00"


def test_a_glyph_stands_under_its_dtype_where_an_op_lacks_another() -> None:
    """`b` was not asked in the first dtype of its target."""
    rows = [
        Outcome("a", "a:x", "float32", "s", S.PASS), Outcome("a", "a:x", "bfloat16", "s", S.FAIL),
        Outcome("b", "a:x", "bfloat16", "s", S.GAP, "known"),
    ]  # fmt: skip
    lines = text.matrix(Report(PLACES[:1], rows, [])).splitlines()
    (head,) = (line for line in lines if "fp32 bf16" in line)
    one, other = (next(line for line in lines if line.split()[:1] == [op]) for op in "ab")
    at = head.index("fp32")
    assert one[at:].split() == [text.GLYPHS[S.PASS], text.GLYPHS[S.FAIL]]
    assert one[at + 5] == text.GLYPHS[S.FAIL] and one[at] == text.GLYPHS[S.PASS]
    assert other[at:].rstrip() == "     " + text.GLYPHS[S.GAP]


if __name__ == "__main__":
    environment.describe, environment.versions = (
        lambda: dict(HERE),
        lambda: {"torch": "9", "numpy": "8"},
    )
    (FOLDER / "report.txt").write_text(shown_as_text(), encoding="utf-8")
    (FOLDER / "report.html").write_text(shown_as_html(), encoding="utf-8")
