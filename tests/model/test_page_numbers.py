"""The page and the picture of a look made by hand: every number that they show, worked out."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from nsa_neuron.show import Look, html, picture
from nsa_neuron.show.page import SHADED
from nsa_neuron.show.record import Passage, View

TEXT = b"once upon a <b> time & again, in a far land\nlived"  # 49 bytes: 7 blocks of 8
OWN = Passage(4, 32, 38, 0.01, "own")
CHOSEN = Passage(1, 8, 15, 0.64, "importance")
LESS = Passage(2, 16, 23, 0.16, "importance")
FIRST = Passage(0, 0, 7, 0.04, "first")


def view(query=38, layer=0, kv_head=0, **changes):
    made = View(
        query, layer, "blocks.0.attention", kv_head, (FIRST, CHOSEN, LESS, OWN),
        (0.04, 0.64, 0.16, 0.0016, 0.01), ((0.25, 0.5, 0.754), (1.0, 0.0, 0.126)),
        (0.2, 0.8, 0.1), (0.5, 0.25), (1.0, 2.0, 5.0),
    )  # fmt: skip
    return replace(made, **changes)


EARLY = {
    "query": 9, "picked": (Passage(0, 0, 7, 0.5, "before"), Passage(1, 8, 9, 1.0, "own")),
    "importance": (0.5, 1.0), "compressed": (),
}  # fmt: skip
LOOK = Look(
    TEXT, 8, 4, 2, (38, 9),
    (view(), view(layer=3, kv_head=1), view(**EARLY), view(**EARLY, layer=3, kv_head=1)),
)  # fmt: skip
PAGE = html(LOOK, "A & B", "about <it>")


def panel(i: int, page: str = PAGE) -> str:
    return re.search(rf'<aside id="p{i}">.*?</aside>', page, re.DOTALL)[0]


def cells(part: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", part, re.DOTALL)
    return [re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL) for row in rows]


def test_a_panel_tells_the_numbers_of_its_view() -> None:
    part = panel(0)
    assert "<h2>Layer 0, kv head 0, byte 38</h2>" in part
    assert "<span>byte 0</span><span>38</span>" in part
    assert "compressed 12 %, selected 25 %, window 62 %" in part  # 1, 2 and 5 of 8
    assert "(4 bytes a block, every 2)" in part and "the last 2 bytes" in part
    chosen, gates = part.split("<h3>Gates</h3>")
    assert cells(gates) == [[], ["0", "0.25", "0.50", "0.75"], ["1", "1.00", "0.00", "0.13"]]
    assert re.findall(r"<th>(.*?)</th>", gates) == ["head", "compressed", "selected", "window"]
    # What importance picked comes first, the most important before the others.
    assert [[re.sub("<.*?>", "", cell) for cell in row] for row in cells(chosen)[1:]] == [
        ["1", "8–15", "0.6400", "by importance", "n a &lt;b&gt; "],
        ["2", "16–23", "0.1600", "by importance", "time &amp; a"],
        ["0", "0–7", "0.0400", "always: the first", "once upo"],
        ["4", "32–38", "0.0100", "always: the query's own", " a far "],
    ]
    assert "<h2>Layer 3, kv head 1, byte 38</h2>" in panel(1)
    assert "always: just before" in panel(2) and "<p>none yet</p>" in panel(2)


def test_shares_of_nothing_are_nothing() -> None:
    page = html(replace(LOOK, views=(view(outputs=(0.0, 0.0, 0.0)),), queries=(38,)), "t")
    assert "compressed 0 %, selected 0 %, window 0 %" in page


@pytest.mark.parametrize("values", [(0.2, 0.8, 0.1), (0.0, 0.0, 0.0)])
def test_curves_are_bars_as_high_as_their_share_of_the_largest(values) -> None:
    part = panel(0, html(replace(LOOK, views=(view(compressed=values),), queries=(38,)), "t"))
    top = max(values)
    path = "M0.5 100V75.0M1.5 100V0.0M2.5 100V87.5" if top else "M0.5 100V100.0M1.5 100V100.0"
    assert '<svg viewBox="0 0 3 100" preserveAspectRatio="none" role="img" ' in part
    assert path in part and f'aria-label="largest {0.8 if top else 0.0:.4f}"' in part
    assert 'd="M0.5 100V0.0M1.5 100V50.0"' in part  # the window's


def test_long_curves_keep_the_largest_of_every_piece() -> None:
    """1,000 values are 334 pieces of 3, each as high as its largest."""
    values = [0.1] * 1000
    values[4] = values[999] = 0.2
    part = panel(0, html(replace(LOOK, views=(view(window=tuple(values)),), queries=(38,)), "t"))
    assert '<svg viewBox="0 0 334 100"' in part
    bars = re.findall(r"M([\d.]+) 100V([\d.]+)", part.rpartition("<svg")[2])
    assert len(bars) == 334 and [x for x, y in bars if y == "0.0"] == ["1.5", "333.5"]


def test_the_map_has_a_bar_for_each_block_and_links_where_picked_ones_stand() -> None:
    """Heights are roots of shares of the largest, 0.64: 0.04, 0.16 and 0.01 are 4, 2 and 8 times
    lower than its 0.8."""
    part = panel(0)
    assert 'viewBox="0 0 5 100"' in part and 'stroke-width="0.6"' in part
    bars = re.findall(r"M([\d.]+) 100V([\d.]+)", part.partition("</svg>")[0])
    assert bars == [("0.5", "75.0"), ("1.5", "0.0"), ("2.5", "50.0"), ("3.5", "95.0"),
                    ("4.5", "87.5")]  # fmt: skip
    links = re.findall(r'<a href="#b(\d)"><title>(.*?)</title><rect x="([\d.]+)" width="([\d.]+)"',
                       part)  # fmt: skip
    assert links == [
        ("0", "block 0, bytes 0 to 7: 0.0400", "0.0", "1.0"),
        ("1", "block 1, bytes 8 to 15: 0.6400", "1.0", "1.0"),
        ("2", "block 2, bytes 16 to 23: 0.1600", "2.0", "1.0"),
        ("4", "block 4, bytes 32 to 38: 0.0100", "4.0", "1.0"),
    ]


def test_the_map_of_many_blocks_is_coarse_and_its_links_wide_enough() -> None:
    """900 blocks: pieces of 3, and a link is 900 / 150 = 6 blocks wide about its block."""
    importance = [0.01] * 900
    importance[301] = 0.04
    picked = tuple(Passage(b, 8 * b, 8 * b + 7, 0.01, "importance") for b in (1, 301))
    page = html(replace(LOOK, queries=(38,), views=(view(picked=picked, importance=tuple(importance)),)), "t")  # fmt: skip # noqa: E501
    part = panel(0, page)
    bars = re.findall(r"M([\d.]+) 100V([\d.]+)", part.partition("</svg>")[0])
    assert len(bars) == 300 and [x for x, y in bars if y == "0.0"] == ["301.5"]
    assert {y for _, y in bars} == {"0.0", "50.0"} and 'stroke-width="1.8"' in part
    assert re.findall(r'<rect x="([\d.]+)" width="([\d.]+)"', part) == [
        ("0.0", "6.0"), ("298.5", "6.0")
    ]  # fmt: skip


def rules(page: str, chosen: str) -> dict[str, str]:
    """Shades of blocks by id, for a query and a view."""
    return dict(re.findall(rf"^body:has\({chosen} (#b\d+) \{{ background: (.*?)[;}} ]*(?:text-decoration: underline \}})?$", page, re.M))  # fmt: skip # noqa: E501


def test_shades_say_how_important_a_block_is_and_which_were_picked() -> None:
    """0.3 + 0.5 of the root of its share; half as much and less for what was not picked."""
    found = rules(PAGE, r"#q0:checked\):has\(#v1:checked\)")
    pick, near = "rgb(var(--pick) / {})", "rgb(var(--near) / {})"
    assert found == {
        "#b0": pick.format("0.42"), "#b1": pick.format("0.80"), "#b2": pick.format("0.55"),
        "#b4": pick.format("0.36"), "#b3": near.format("0.02"),
    }  # fmt: skip
    assert rules(PAGE, r"#q1:checked\):has\(#v0:checked\)") == {
        "#b0": pick.format("0.65"), "#b1": pick.format("0.80")
    }  # fmt: skip
    for i, (query, shown) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        rule = f"body:has(#q{query}:checked):has(#v{shown}:checked) #p{i} {{ display: block }}"
        assert rule in PAGE


def test_only_the_most_important_of_the_others_are_shaded() -> None:
    importance = tuple(float(1 + i % 7 * 10 + i / 100) for i in range(60))
    one = html(replace(LOOK, queries=(38,), views=(view(picked=(), importance=importance),)), "t")
    found = rules(one, r"#q0:checked\):has\(#v0:checked\)")
    best = sorted(range(60), key=lambda j: -importance[j])[:48]
    assert SHADED == 48 and set(found) == {f"#b{j}" for j in best}
    faint = html(replace(LOOK, queries=(38,), views=(view(picked=(), importance=(1.0, 6e-4, 1.5e-4)),)), "t")  # fmt: skip # noqa: E501
    assert set(rules(faint, r"#q0:checked\):has\(#v0:checked\)")) == {"#b0"}  # 0.4 * root < 0.01


def test_the_text_shows_where_queries_stand_and_what_they_cannot_see() -> None:
    stands = re.findall(r"has\(#q(\d):checked\) #b(\d+) \{ outline", PAGE)
    assert stands == [("0", "4"), ("1", "1")]
    blocks = re.findall(r'<b id="b(\d)"(?: class="(.*?)")? data-n="(.*?)">(.*?)</b>', PAGE, re.DOTALL)  # fmt: skip # noqa: E501
    assert [b[0] for b in blocks] == list("0123456")
    assert [b[1] for b in blocks] == ["", "", "f1", "f1", "f1", "f0 f1", "f0 f1"]
    assert blocks[1][2].split("\n") == [
        "block 1, bytes 8 …", "byte 38 layer 0 head 0: 0.6400", "byte 38 layer 3 head 1: 0.6400",
        "byte 9 layer 0 head 0: 1.0000", "byte 9 layer 3 head 1: 1.0000",
    ]  # fmt: skip
    assert blocks[2][2].split("\n")[1:] == [
        "byte 38 layer 0 head 0: 0.1600", "byte 38 layer 3 head 1: 0.1600",
    ]  # fmt: skip
    assert blocks[1][3] == "n a &lt;b&gt; " and blocks[5][3] == "and\nlive"


def test_radios_name_queries_by_what_leads_to_them() -> None:
    labels = re.findall(r'<input type="radio" name="(\w)" id="(\w\d)"( checked)?> (.*?)</label>', PAGE)  # fmt: skip # noqa: E501
    assert labels == [
        ("q", "q0", " checked", "byte 38: … time &amp; again, in a far "),
        ("q", "q1", "", "byte 9: …once upon "),
        ("v", "v0", " checked", "layer 0, head 0"), ("v", "v1", "", "layer 3, head 1"),
    ]  # fmt: skip
    assert "<title>A &amp; B</title>" in PAGE and "about &lt;it&gt;" in PAGE


def test_a_picture_shows_every_view_of_every_query(tmp_path, monkeypatch) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    seen = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda f, *a, **k: seen.append((f, a, k)))
    picture(LOOK, tmp_path / "p", "a title")
    ((made, (path,), saved),) = seen
    assert saved == {"dpi": 110, "format": "png"}
    rows = 2 * (0.7 + 2 * 0.28)  # of two queries, each with two views
    assert made.get_size_inches().tolist() == pytest.approx([11, 1.2 + rows])
    assert path == tmp_path / "p" and made.get_suptitle() == "a title" and len(made.axes) == 2
    for panel_, title, roots in zip(
        made.axes, ("byte 38", "byte 9"), ([0.25, 1.0, 0.5, 0.05, 0.125], [0.5**0.5, 1.0]),
        strict=True,
    ):  # fmt: skip
        assert panel_.get_title(loc="left") == title
        assert "block of 8 bytes" in panel_.get_xlabel()
        names = [t.get_text() for t in panel_.get_yticklabels()]
        assert names == ["layer 0, head 0", "layer 3, head 1"]
        (image,) = panel_.images
        assert image.get_clim() == (0, 1) and image.get_cmap().name == "Greys"
        assert image.get_interpolation() == "nearest" and panel_.get_aspect() == "auto"
        assert [pytest.approx(roots)] * 2 == image.get_array().tolist()
        blocks = [0, 1, 2, 4] if len(roots) == 5 else [0, 1]
        for row, marks in enumerate(panel_.collections):
            assert marks.get_offsets().tolist() == [[b, row] for b in blocks]
            assert marks.get_sizes().tolist() == [60] and marks.get_edgecolor()[0, 2] > 0.8  # blue
        assert row == 1
