"""Looking inside: captured numbers are the layers' own; the page holds them, nothing foreign."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from browser import Browser, needs_chromium
from tiny import MIXED, bytes_of, model

import nsa_neuron as nsa
from nsa_neuron.cli import main
from nsa_neuron.errors import InvalidArgument
from nsa_neuron.nn import NativeSparseAttention, capture
from nsa_neuron.nn.checkpoint import save_checkpoint
from nsa_neuron.show import html, look, picture

NET = model(MIXED, torch.float32)
TEXT = bytes(bytes_of(200).tolist())
TAGS = b"<script>alert('x')</script> & \"quotes\" \xff\x00 " * 6


@torch.no_grad()
def test_capture_gives_what_the_layer_computed():
    """Gates and branch outputs, put together again, are the layer's output."""
    tokens, at = bytes_of(2, 120), [0, 7, 63, 119]
    outputs = {}
    layers = {n: m for n, m in NET.named_modules() if isinstance(m, NativeSparseAttention)}
    hooks = [
        layer.register_forward_hook(lambda m, i, o, name=name: outputs.update({name: o}))
        for name, layer in layers.items()
    ]
    with capture(NET, at) as found:
        NET(tokens)
    for hook in hooks:
        hook.remove()
    assert [item.name for item in found] == list(layers)
    for item in found:
        for t, q in item.queries.items():
            parts = torch.stack([q.outputs[b] for b in ("cmp", "slc", "win")], -1)
            o = (parts * q.gates[..., None, :]).sum(-1).flatten(-2)
            torch.testing.assert_close(layers[item.name].out(o), outputs[item.name][:, t])
            assert q.window.shape[-1] == min(t + 1, 12)
            assert q.compressed.shape[-1] == max(0, (t + 1 - 8) // 4 + 1)
            torch.testing.assert_close(q.window.sum(-1), torch.ones(2, 4))
            own = t // 16
            for row in q.block_indices.flatten(0, 1).tolist():
                ids = [i for i in row if i >= 0]
                assert ids == sorted(set(ids)) and own in ids and 0 in ids and max(ids) == own


@torch.no_grad()
def test_selection_is_the_most_important_of_what_is_left():
    with capture(NET, [199]) as found:
        NET(bytes_of(1, 200))
    for item in found:
        q = item.queries[199]
        for ids, scores in zip(q.block_indices[0].tolist(), q.importance[0], strict=True):
            free = [j for j in range(1, 11)]
            best = max(free, key=lambda j: scores[j])
            assert set(ids) == {0, 11, 12, best}


def test_capture_leaves_no_trace_and_refuses_what_it_cannot_see():
    tokens = bytes_of(1, 20)
    with pytest.raises(InvalidArgument, match="below 20"), capture(NET, [20]):
        NET(tokens)
    with pytest.raises(InvalidArgument, match="one sequence per row"), capture(NET, [1]):
        NET(tokens, cu_seqlens=torch.tensor([0, 9, 20], dtype=torch.int32))
    with torch.no_grad(), capture(NET, [1]):
        cache = NET.new_cache(1, 64)
        with cache.step(20) as step:
            NET(tokens, step)
        with pytest.raises(InvalidArgument, match="while captured"), cache.step(1) as step:
            NET(tokens[:, :1], step)
    with pytest.raises(InvalidArgument, match="with at least one"), capture(model(("full",)), [1]):
        pass
    with pytest.raises(InvalidArgument, match="one or more positions"), capture(NET, []):
        pass
    assert all("observer" not in vars(m) for m in NET.modules())


class Reader(HTMLParser):
    """Ids, attributes and the text of the page's blocks."""

    def __init__(self):
        super().__init__()
        self.ids, self.tags, self.blocks, self.inside = [], [], {}, None

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append((tag, values))
        if "id" in values:
            self.ids.append(values["id"])
        if tag == "b" and "id" in values:
            self.inside = values["id"]
            self.blocks[self.inside] = ""

    def handle_endtag(self, tag):
        if tag == "b":
            self.inside = None

    def handle_data(self, data):
        if self.inside:
            self.blocks[self.inside] += data


def test_the_page_holds_the_text_and_every_view_and_nothing_foreign():
    text = TAGS + TEXT
    found = look(NET, text, [100, -1, 100])
    page = html(found, "A <title>", "about & more")
    reader = Reader()
    reader.feed(page)
    assert len(reader.ids) == len(set(reader.ids))
    assert not re.search(r"https?://|<script|javascript:| on\w+=", page)
    size = found.select_block
    assert list(reader.blocks) == [f"b{i}" for i in range(-(-len(text) // size))]
    assert reader.blocks["b0"] == text[:size].decode()
    assert found.queries == (100, len(text) - 1) and len(found.views) == 2 * 2 * 2
    radios = [v["id"] for tag, v in reader.tags if tag == "input"]
    assert radios == ["q0", "q1", "v0", "v1", "v2", "v3"]
    for i, view in enumerate(found.views):
        chosen = f"body:has(#q{i // 4}:checked):has(#v{i % 4}:checked)"
        assert f"{chosen} #p{i} {{ display: block }}" in page and f"p{i}" in reader.ids
        for p in view.picked:
            assert f"{chosen} #b{p.block} {{ background: rgb(var(--pick)" in page
            assert p.last <= view.query
    later = [v for tag, v in reader.tags if tag == "b" and "f0" in v.get("class", "").split()]
    assert [v["id"] for v in later] == [f"b{i}" for i in range(7, -(-len(text) // size))]


def test_look_says_why_blocks_were_picked():
    view = look(NET, TEXT, [199]).views[0]
    assert [p.why for p in view.picked] == ["first", "importance", "before", "own"]
    assert view.picked[-1].last == 199


@pytest.mark.parametrize("queries", [[], [200], [-201], [0, 200]], ids=str)
def test_bad_queries(queries):
    with pytest.raises(InvalidArgument, match="from -200 to 199" if queries else "one or more"):
        look(NET, TEXT, queries)


def test_the_command(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    save_checkpoint(NET, tmp_path / "m.safetensors")
    (tmp_path / "text.txt").write_bytes(TEXT)
    words = ["show", str(tmp_path / "text.txt"), str(tmp_path / "m.safetensors")]
    more = ["--ask", "Where?", "--ask", "-1", "--out", str(tmp_path / "p.html")]
    assert main([*words, *more, "--png", str(tmp_path / "p.png")]) == 0
    assert "most important passage" in capsys.readouterr().out
    assert "Where?" in (tmp_path / "p.html").read_text()
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    shipped = ["show", words[1], "--ask", "150", "--out", str(tmp_path / "own.html")]
    assert main(shipped) == 0
    assert "read by bytes-small.safetensors" in (tmp_path / "own.html").read_text()
    with pytest.raises(SystemExit, match="2"):
        main([*shipped[:-1], str(tmp_path / "no" / "such" / "folder.html")])
    assert main([*shipped, "--png", str(tmp_path / "png without a suffix")]) == 0
    assert (tmp_path / "png without a suffix").read_bytes().startswith(b"\x89PNG")
    assert main([*words, "--ask", "500"]) == 2
    assert main([*words, "--ask", "a?", "--ask", "b?"]) == 2
    assert main(["show", str(tmp_path / "none"), words[2]]) == 2


def test_a_picture_of_a_text_shorter_than_a_block(tmp_path):
    pytest.importorskip("matplotlib")
    picture(look(NET, b"abc", [0, 2]), tmp_path / "p.png")
    assert html(look(NET, b"abc", [0, 2]), "short").count("none yet") == 8
    assert nsa.NsaError


SHADE = "getComputedStyle(document.getElementById('b{}')).{}"


@needs_chromium
@pytest.mark.slow
def test_the_page_in_a_browser(tmp_path):
    """Shades, keys, links and the narrow layout, as a browser shows them."""
    found = look(NET, TEXT + TAGS, [100, -1])
    page = tmp_path / "p.html"
    page.write_text(html(found, "A page", "about"))
    first, last = found.views[0], found.views[-1]
    with Browser() as browser:
        browser.open(page)
        browser.screenshot(tmp_path / "wide.png")
        shown = "[...document.querySelectorAll('aside')].filter(e => e.offsetParent).map(e => e.id)"
        assert browser.run(shown) == ["p0"]
        picked = {p.block for p in first.picked}
        for block in range(100 // 16 + 1):
            style = browser.run(SHADE.format(block, "textDecorationLine"))
            assert (style == "underline") == (block in picked), block
        assert browser.run(SHADE.format(7, "opacity")) == "0.3"  # behind the query
        browser.point("#q0", click=True)
        browser.press("ArrowRight")
        browser.press("Tab")
        for _ in range(len(found.views) // 2 - 1):
            browser.press("ArrowRight")
        assert browser.run(shown) == [f"p{len(found.views) - 1}"]
        assert browser.run(SHADE.format(7, "opacity")) == "1"
        assert "underline" in browser.run(SHADE.format(last.picked[1].block, "textDecorationLine"))
        browser.point("aside[style], #p7 td a", click=True)
        assert browser.run("location.hash") == f"#b{ranked(last)[0].block}"
        check_numbers(browser, found, ranked(last)[0].block)
        browser.resize(420, 800)
        browser.screenshot(tmp_path / "narrow.png")
        wide = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        assert browser.run(wide)
        assert browser.problems == []


def check_numbers(browser, found, target):
    """The block that is pointed at shows its numbers, and so does the one that a link went to."""
    shown = "getComputedStyle(document.getElementById('b{}'), '::after').content"
    other = 1 if target != 1 else 2
    assert browser.run(shown.format(other)) == "none"
    browser.point(f"#b{other}")
    views = [v for v in found.views if other < len(v.importance)]
    for block in (other, target):
        text = browser.run(shown.format(block))
        for v in views if block == other else [found.views[-1]]:
            line = f"byte {v.query} layer {v.layer} head {v.kv_head}: {v.importance[block]:.4f}"
            assert line in text
    browser.run("document.querySelectorAll('#p7 td a')[1].focus()")
    browser.press("Enter")
    assert browser.run("location.hash") == f"#b{ranked(found.views[-1])[1].block}"


def ranked(view):
    """Picked blocks as the page lists them."""
    return sorted(view.picked, key=lambda p: (p.why != "importance", -p.importance))


def lengthened(found, text):
    """The views of a longer text: as many blocks and probabilities, picks spread over it."""
    times = len(text) // len(found.text)
    views = []
    for view in found.views:
        picked = tuple(
            replace(p, block=p.block * times, first=p.first * times, last=p.first * times + 15)
            for p in view.picked
        )
        more = {"importance": view.importance * times, "compressed": view.compressed * times}
        views.append(replace(view, query=len(text) - 1, picked=picked, **more))
    return replace(found, text=text, queries=(len(text) - 1,), views=tuple(views))


@needs_chromium
@pytest.mark.slow
def test_a_page_of_128_kilobytes_in_a_browser(tmp_path):
    """What a model looked at in the last kilobyte, as if the text before it were as long."""
    text = os.urandom(128 * 1024)
    page = tmp_path / "p.html"
    page.write_text(html(lengthened(look(NET, text[-1024:], [-1]), text), "long"))
    blocks = 128 * 1024 // 16
    assert page.stat().st_size < 4 * 2**20
    with Browser() as browser:
        browser.open(page)
        assert browser.run("document.querySelectorAll('pre b').length") == blocks
        browser.point("#p0 td a", click=True)
        assert browser.run("document.querySelector('pre').scrollTop") >= 0
        browser.screenshot(tmp_path / "long.png")
        assert browser.problems == []
