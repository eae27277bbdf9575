"""The browser that judges pages sees what it must: text, keys, errors of every kind."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from browser import Browser, needs_chromium

if TYPE_CHECKING:
    from pathlib import Path

GOOD = """<!doctype html><title>t</title><p id=a>one</p><button id=b>press</button><script>
addEventListener('keydown', e => document.getElementById('a').textContent += ' ' + e.key);
document.getElementById('b').onclick = () => { document.title = 'clicked'; };
</script>"""
FAULTS = {
    "an exception": "<script>missing.call()</script>",
    "a console error": "<script>console.error('bad')</script>",
    "a file that is not there": "<img src='nowhere.png'>",
}


@needs_chromium
@pytest.mark.slow
def test_the_browser_shows_and_acts(tmp_path: Path) -> None:
    page, picture = tmp_path / "good.html", tmp_path / "good.png"
    page.write_text(GOOD)
    with Browser() as browser:
        browser.open(page)
        browser.press("ArrowRight")
        browser.press("n")
        assert browser.run("document.getElementById('a').textContent") == "one ArrowRight n"
        browser.point("#b", click=True)
        assert browser.run("document.title") == "clicked"
        browser.screenshot(picture)
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert browser.problems == []
        for what, fault in FAULTS.items():
            page.write_text("<!doctype html>" + fault)
            browser.open(page)
            assert browser.problems, what
            browser.problems.clear()
