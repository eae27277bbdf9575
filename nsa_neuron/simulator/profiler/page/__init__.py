"""A profile as one self-contained web page: no network, nothing to install.

`data` collects what the page shows; `page.html`, `page.css` and `page.js` show it. The page zooms
through every instruction, so it holds them all: 40 bytes each, as arrays in base64.
"""

from __future__ import annotations

import json
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from .data import collect

if TYPE_CHECKING:
    from ...cost import Timeline

MOST = 500_000  # instructions of a page


def render(t: Timeline, facts: dict[str, Any]) -> str:
    """The page of a timeline and its report.

    Raises:
        ValueError: more instructions than a browser would show at ease.
    """
    if len(t.instructions) > MOST:
        raise ValueError(
            f"{len(t.instructions):,} instructions: a page holds {MOST:,} at most; run fewer "
            "iterations of the loops (--iterations 8), or open a --trace in ui.perfetto.dev"
        )
    parts = files(__package__)
    text, style, script = (
        parts.joinpath(f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")
    )
    held = json.dumps(collect(t, facts), separators=(",", ":")).replace("</", "<\\/")
    title = f"{facts['kernel']} on {facts['target']}, modelled"
    for name, value in (
        ("title", escape(title)),
        ("style", style),
        ("script", script),
        ("data", held),
    ):
        text = text.replace(f"<!--{name}-->", value, 1)
    return text
