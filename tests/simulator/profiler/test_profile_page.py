"""The page of `nsa profile --html`: what it holds, and what a browser makes of it."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import rowwise
from browser import Browser, needs_chromium
from profile_helpers import example, hbm, matmuls, profile_of, shapes
from profile_helpers import two_cores as copies

from nsa_neuron.simulator.profiler import page
from nsa_neuron.simulator.profiler.page.data import collect

FRAMES = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
INPUTS = shapes((512, 2048), (1, 2048), dtype="bfloat16")
KERNELS = {
    "row-wise": lambda: profile_of(rowwise.rms_norm, *INPUTS),
    "two cores": lambda: profile_of(copies, *shapes((128, 512)), lnc=2),
    "example": lambda: example("loaded_once", 256, 512, 256),
    "many": lambda: profile_of(matmuls, *shapes((2048, 128), (2048, 40960), dtype="bfloat16")),
    "empty": lambda: profile_of(lambda: hbm((1, 1))),
}


def held(text):
    """The data of a page: JSON without a space too many, and no end of a script in it."""
    data = re.search(r'id="data">(.*?)</script>', text, re.DOTALL).group(1)
    found = json.loads(data)
    assert data == json.dumps(found, separators=(",", ":")).replace("</", "<\\/")
    return found


@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != "many"])
def test_a_page_is_one_file_and_holds_the_report(kernel, tmp_path):
    found = KERNELS[kernel]()
    found.html(tmp_path / "p.html")
    text = (tmp_path / "p.html").read_text()
    assert held(text)["facts"] == json.loads(json.dumps(found.to_dict()))
    assert not re.search(r"(?:src|href)=|@import|url\(|fetch\(|XMLHttp", text)
    assert "default-src 'none'" in text and not re.search("<!--(title|style|script|data)-->", text)


def test_times_per_line_add_up_to_the_total():
    found = KERNELS["row-wise"]()
    data = collect(found.timeline, found.to_dict())
    assert sum(line["path_us"] for line in data["lines"]) == pytest.approx(found.time.central / 1e3)
    shown = {
        (file["path"], piece["first"] + k): text
        for file in data["files"]
        for piece in file["pieces"]
        for k, text in enumerate(piece["text"])
    }
    told = {(r["file"], r["line"]): r for r in found.to_dict()["critical_path"]["lines"]}
    for line in data["lines"]:
        row = told[line["file"], line["line"]]
        assert line["path_us"] == pytest.approx(row["time_us"])
        assert shown[line["file"], line["line"]].strip() == row["text"]


def test_source_that_ends_a_script_stays_source(tmp_path):
    found = KERNELS["two cores"]()
    data = {**found.to_dict(), "kernel": "</script><b>"}
    text = page.render(found.timeline, data)
    assert text.count("</script>") == 2 and held(text)["facts"]["kernel"] == "</script><b>"


def test_a_page_that_would_be_too_long_is_refused():
    t = KERNELS["two cores"]().timeline
    long = replace(t, instructions=t.instructions * (page.MOST // 4 + 1))
    with pytest.raises(ValueError, match=r"500,004 instructions: a page holds 500,000 at most"):
        page.render(long, {})


@pytest.fixture(scope="module")
def browser():
    with Browser(1440, 1000) as found:
        yield found


@needs_chromium
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_browser_shows_it_without_an_error(kernel, tmp_path, browser):
    image = pytest.importorskip("PIL.Image")
    found = KERNELS[kernel]()
    found.html(tmp_path / "p.html")
    browser.open(tmp_path / "p.html")
    browser.screenshot(tmp_path / "p.png")
    assert browser.problems == []
    picture = image.open(tmp_path / "p.png").convert("RGB")
    assert picture.size == (1440, 1000)
    assert len(picture.getcolors(1 << 20)) > 50
    words = browser.run("document.body.innerText")
    assert "modelled" in words and "not measured" in words
    for a in found.advice:
        assert a.rule in words and a.message in " ".join(words.split())
    if kernel != "empty":
        timeline = browser.run(
            "(() => { const c = document.getElementById('timeline'), g = c.getContext('2d');"
            " return new Set(new Uint32Array(g.getImageData(0, 0, c.width, c.height).data.buffer))"
            ".size; })()"
        )
        assert timeline > 8


@needs_chromium
def test_keys_zoom_and_a_click_on_advice_shows_its_line(tmp_path, browser):
    found = KERNELS["row-wise"]()
    found.html(tmp_path / "p.html")
    browser.open(tmp_path / "p.html")
    assert browser.run("range.textContent").startswith("all of ")
    browser.run("timeline.focus()")
    for key in ("ArrowUp", "ArrowUp", "ArrowRight", "+"):
        browser.press(key)
    browser.run(FRAMES)
    width = browser.run("view.to - view.from")
    assert width == pytest.approx(found.time.central * 0.6**3)
    assert browser.run("view.from") > (found.time.central - width) / 2
    assert " to " in browser.run("document.getElementById('range').textContent")
    browser.press("0")
    browser.run(FRAMES)
    assert browser.run("view.to - view.from") == pytest.approx(found.time.central)
    browser.point(".piece", click=True)
    browser.run(FRAMES)
    first = found.advice[0]
    assert browser.run("document.querySelector('.l.on .n').textContent") == str(first.line)
    browser.run(
        "(() => { const k = rows[0].members[2], box = canvas.getBoundingClientRect();"
        " const x = LEFT + (I.begin[k] + I.until[k]) / 2 * scale(canvas.clientWidth);"
        " canvas.dispatchEvent(new PointerEvent('pointermove',"
        " {clientX: box.x + x, clientY: box.y + tops[0] + 9, bubbles: true})); })()"
    )
    browser.run(FRAMES)
    assert browser.run("!document.getElementById('tip').hidden")
    assert "rowwise.py:" in browser.run("document.getElementById('tip').innerText")
    assert browser.problems == []
