"""Forms of a report: matrix, table, JSON, HTML."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest

from nsa_neuron.conformance import Outcome, Place, Report, Status, html, text
from nsa_neuron.conformance.html import KINDS
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


S = Status
MIXES = [  # in the order of the run: the cell's status, its glyph, whether the report is ok
    ([S.PASS, S.PASS], S.PASS, "✓", True),
    ([S.PASS, S.FAIL], S.FAIL, "✗", False),
    ([S.FAIL, S.PASS], S.FAIL, "✗", False),
    ([S.PASS, S.PASS, S.PASS, S.FAIL], S.FAIL, "✗", False),
    ([S.GAP, S.FAIL], S.FAIL, "✗", False),
    ([S.UNSUPPORTED, S.FAIL], S.FAIL, "✗", False),
    ([S.PASS, S.GAP], S.GAP, "△", True),
    ([S.GAP, S.UNSUPPORTED], S.GAP, "△", True),
    ([S.PASS, S.UNSUPPORTED], S.PASS, "◐", True),
    ([S.UNSUPPORTED, S.UNSUPPORTED], S.UNSUPPORTED, "–", True),
    ([S.UNSUPPORTED, S.NOT_RUN], S.UNSUPPORTED, "–", True),
    ([S.NOT_RUN], S.NOT_RUN, "·", True),
]


@pytest.mark.parametrize(("statuses", "wanted", "mark", "ok"), MIXES, ids=str)
def test_a_cell_of_a_mix_never_looks_better_than_its_worst_case(statuses, wanted, mark, ok):
    """In every form that a report has: one failed case of many is no pass."""
    made = Report((FINE,))
    for i, status in enumerate(statuses):
        made.add(row(status, case=f"c{i}", detail=f"why {i}"))
    (cell,) = made.cells
    assert (cell.status, text.glyph(cell), made.ok) == (wanted, mark, ok)
    assert text.matrix(made).splitlines()[3].split() == ["attention", mark]
    assert made.to_dict()["ok"] is ok
    assert made.to_dict()["cells"][0]["status"] == wanted.value
    kind = "partial" if mark == "◐" else KINDS[wanted]
    assert f'<span class="cell {kind}" title="{wanted.value}' in html.page(made)
    assert ('<p class="verdict pass">' in html.page(made)) is ok
    if wanted is not S.PASS:
        first = next(i for i, status in enumerate(statuses) if status is wanted)
        assert cell.summary == f"c{first}: why {first}"


def test_cells_of_other_dtypes_ops_and_targets_keep_to_themselves():
    made = Report((FINE, ABSENT))
    for op, target, dtype, status in (
        ("attention", "fine:hw", "float32", S.PASS), ("attention", "fine:hw", "float16", S.FAIL),
        ("attention", "absent:hw", "float32", S.NOT_RUN), ("compress", "fine:hw", "float32", S.GAP),
    ):  # fmt: skip
        made.add(Outcome(op, target, dtype, "a", status))
    assert [cell.status for cell in made.cells] == [S.PASS, S.FAIL, S.NOT_RUN, S.GAP]


def test_adding_a_failure_reaches_cells_that_were_already_read():
    made = Report((FINE,), [row(S.PASS)])
    assert made.cells[0].status is S.PASS
    made.add(row(S.FAIL, case="b"))
    assert made.cells[0].status is S.FAIL and not made.ok


def test_the_share_of_a_budget():
    """Above 1 is too much; nothing compared is no share, an error without a budget all of it."""
    shares = [row(S.PASS, error=e, budget=b).share for e, b in ((1, 4), (6, 4), (0, 4), (0, 0))]
    assert shares == [0.25, 1.5, 0.0, 0.0]
    assert row(S.FAIL, error=1.0, budget=0.0).share == float("inf")
    assert row(S.UNSUPPORTED).share == 0.0


def test_ok_and_failures_follow_the_rows(report: Report) -> None:
    assert not report.ok and [x.op for x in report.failures] == ["gated_sum"]
    assert report.ran == 4
    assert "FAIL gated_sum on fine:hw fp32, case a: o: 3 NaN" in text.failures(report)


def test_matrix_has_a_glyph_per_cell(report: Report) -> None:
    lines = {line.split()[0]: line.split()[1:] for line in text.matrix(report).splitlines() if line}
    assert lines["attention"] == ["◐", "·"]
    assert lines["gated_sum"] == ["✗"] and lines["compress"] == ["△"]
    assert "absent:hw was not run: no <device>" in text.matrix(report)


def test_table_and_refusals_name_counts_and_reasons(report: Report) -> None:
    assert "2 pass, 1 unsupported" in text.cell_table(report)
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
    shown = html.page(report)
    page = _Page()
    page.feed(shown)
    assert not page.open and not page.links
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert "too &lt;wide&gt;" in shown and "too <wide>" not in shown
    assert "1 of 4 cases fail" in shown
