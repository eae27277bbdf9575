"""Forms of a report: matrix, table, JSON, HTML."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest

from nsa_neuron.conformance import Outcome, Place, Report, Status, text
from nsa_neuron.registry import Target

FINE = Place(Target("fine", "hw"), "", "cpu")
ABSENT = Place(Target("absent", "hw"), "no <device>", "cuda")


def row(status: Status, op: str = "attention", case: str = "a", **facts: object) -> Outcome:
    return Outcome(op, "fine:hw", "float32", case, status, **facts)  # type: ignore[arg-type]


@pytest.fixture
def report() -> Report:
    made = Report((FINE, ABSENT))
    made.add(row(Status.PASS, result="o", error=1e-6, budget=4e-6))
    made.add(row(Status.PASS, case="b", result="lse", error=3e-6, budget=4e-6))
    made.add(row(Status.UNSUPPORTED, case="c", detail="dims: too <wide>"))
    made.add(row(Status.FAIL, "gated_sum", detail="o: 3 NaN", error=float("inf"), budget=0.0))
    made.add(row(Status.GAP, "compress", detail="known"))
    made.add(Outcome("attention", "absent:hw", "float32", "a", Status.NOT_RUN, "no <device>"))
    return made


def test_cells_show_the_most_telling_status_and_the_worst_case(report: Report) -> None:
    cells = {(cell.op, cell.target): cell for cell in report.cells}
    cell = cells["attention", "fine:hw"]
    assert cell.status is Status.PASS and cell.partial
    assert cell.summary == "3e-06 of 4e-06 (lse, b)"
    assert cells["gated_sum", "fine:hw"].status is Status.FAIL
    assert cells["attention", "absent:hw"].status is Status.NOT_RUN


def test_ok_and_failures_follow_the_rows(report: Report) -> None:
    assert not report.ok and [x.op for x in report.failures] == ["gated_sum"]
    assert report.ran == 4
    assert "FAIL gated_sum on fine:hw fp32, case a: o: 3 NaN" in text.failures(report)


def test_matrix_has_a_glyph_per_cell(report: Report) -> None:
    lines = {line.split()[0]: line.split()[1:] for line in report.matrix.splitlines() if line}
    assert lines["attention"] == ["◐", "·"]
    assert lines["gated_sum"] == ["✗"] and lines["compress"] == ["△"]
    assert "absent:hw was not run: no <device>" in report.matrix


def test_table_and_refusals_name_counts_and_reasons(report: Report) -> None:
    assert "2 pass, 1 unsupported" in report.table
    assert "too <wide>" in text.refusals(report)


def test_json_is_valid_and_complete(report: Report) -> None:
    read = json.loads(report.to_json(), parse_constant=pytest.fail)
    assert read["ok"] is False and len(read["rows"]) == 6
    assert [place["hindrance"] for place in read["targets"]] == ["", "no <device>"]
    failed = next(x for x in read["rows"] if x["status"] == "fail")
    assert failed["error"] == "inf"
    assert read["environment"]["versions"]["torch"]


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag in ("table", "details", "tr", "td", "div"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("table", "details", "tr", "td", "div"):
            assert self.open.pop() == tag


def test_html_is_one_balanced_page_that_needs_nothing_else(report: Report) -> None:
    html = report.to_html()
    page = _Page()
    page.feed(html)
    assert not page.open and not page.links
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert "too &lt;wide&gt;" in html and "too <wide>" not in html
    assert "1 of 4 cases fail" in html
