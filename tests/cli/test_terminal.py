"""Tables and progress, letter by letter; and who gets the records of simulated launches."""

from __future__ import annotations

import io
import sys

import pytest

from nsa_neuron import records, terminal


class Terminal(io.StringIO):
    """Shows what was flushed only: a line that has no end yet stays in the buffer otherwise."""

    shown = ""

    def isatty(self) -> bool:
        return True

    def flush(self) -> None:
        self.shown = self.getvalue()


def test_a_table_is_aligned_under_headers_of_several_lines() -> None:
    heads, rows = ["op", "cpu\nfp32", "x"], [["attention", "1", ""], ["a", "22222", "yes"]]
    assert terminal.table("title", heads, rows).split("\n") == [
        "title",
        "op         cpu    x",
        "           fp32",
        "---------  -----  ---",
        "attention  1",
        "a          22222  yes",
    ]
    assert terminal.table("", ["long head", "b"], []).split("\n") == [
        "long head  b",
        "---------  -",
    ]


def test_a_row_that_misses_a_cell_is_no_table() -> None:
    with pytest.raises((ValueError, IndexError)):
        terminal.table("", ["a", "b"], [["1"]])
    with pytest.raises(ValueError):
        terminal.table("", ["a"], [["1", "2"]])


def test_rows_have_their_own_colours_and_heads_none(monkeypatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    rows, styles = [["a"], ["b"], ["c"], ["d"], ["e"]], ["good", "", "bad", "warn", "dim"]
    plain = ["t", "h", "-", "a", "b", "c", "d", "e"]
    assert terminal.table("t", ["h"], rows, styles).split("\n") == plain, "a pipe"
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert terminal.table("t", ["h"], rows).split("\n") == plain, "no styles"
    assert terminal.table("t", ["h"], rows, styles).split("\n") == [
        "t", "h", "-", "\x1b[32ma\x1b[0m", "b", "\x1b[1;31mc\x1b[0m", "\x1b[33md\x1b[0m",
        "\x1b[90me\x1b[0m",
    ]  # fmt: skip
    with pytest.raises(ValueError):
        terminal.table("t", ["h"], rows, styles[1:])


def test_progress_counts_on_a_terminal_and_clears_its_line(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with terminal.progress("work", 3) as advance:
        assert sys.stderr.getvalue() == ""
        advance("one")
        assert sys.stderr.shown == "\r\x1b[Kwork 1/3 one"
        advance("two")
    assert sys.stderr.shown == "\r\x1b[Kwork 1/3 one\r\x1b[Kwork 2/3 two\r\x1b[K"


def test_progress_into_a_file_says_nothing(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with terminal.progress("work", 1) as advance:
        advance("one")
    assert sys.stderr.getvalue() == ""


def test_records_go_to_the_innermost_who_listens() -> None:
    records.note(["nobody listens"])
    with records.recording() as outer:
        records.note(["a"])
        with records.recording() as inner:
            records.note(["b", "c"])
        records.note(["d"])
        with pytest.raises(ZeroDivisionError), records.recording() as broken:
            records.note(["e"])
            raise ZeroDivisionError
        records.note(["f"])
    records.note(["nobody listens any more"])
    assert (outer, inner, broken) == (["a", "d", "f"], ["b", "c"], ["e"])
