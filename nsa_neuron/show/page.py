"""A `Look` as one self-contained web page: no script, no network.

The text stands there once. Radio buttons choose the query and the layer; style rules that depend on
them (`:has`, in every browser since 2023) shade the blocks and show that view's numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from string import Template
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nsa_neuron.show.record import Look, Passage, View

SHADED = 48  # blocks that were available, most important first, that get a shade
WHY = {
    "first": "always: the first",
    "own": "always: the query's own",
    "before": "always: just before",
    "importance": "by importance",
}
BRANCHES = ("compressed", "selected", "window")

PAGE = Template("""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>$title</title>
<style>
:root { color-scheme: light dark; --edge: #8884; --pick: 9 105 218; --near: 191 135 0 }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 90rem; padding: 1rem }
h1 { font-size: 1.3rem; margin: 0 } .quiet { opacity: .75 }
fieldset { border: 1px solid var(--edge); border-radius: .4rem; margin: .5rem 0 }
label { margin-right: 1rem; white-space: nowrap }
main { display: grid; grid-template-columns: minmax(0, 3fr) minmax(18rem, 2fr); gap: 1.2rem }
pre { font: 13px/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  margin: 0; max-height: 82vh; overflow: auto; border: 1px solid var(--edge); padding: .6rem }
pre b { font-weight: inherit } pre b:target { outline: 2px solid }
pre b:is(:hover, :target)::after { content: attr(data-n); position: fixed; left: .5rem;
  bottom: .5rem; max-height: 40vh; overflow: hidden; padding: .4rem .7rem; z-index: 1;
  white-space: pre; background: Canvas; color: CanvasText; border: 1px solid; border-radius: .4rem;
  font: .85rem/1.4 ui-monospace, monospace; text-decoration: none; pointer-events: none }
pre b:hover::after { z-index: 2 }
aside { display: none; max-height: 82vh; overflow: auto }
table { border-collapse: collapse; font-size: .88rem; width: 100% }
th, td { text-align: left; padding: .15rem .5rem; border-bottom: 1px solid var(--edge) }
td { overflow-wrap: anywhere }
td.n { font-variant-numeric: tabular-nums } svg { width: 100%; height: 3.2rem; display: block }
.map { height: 4rem; border-bottom: 1px solid var(--edge) } .map a { fill: rgb(var(--pick) / .55) }
.map a:hover, .map a:focus { fill: rgb(var(--pick)) } h2 { font-size: 1.05rem; margin: .2rem 0 }
h3 { font-size: .9rem; margin: .9rem 0 .2rem }
.ends { display: flex; justify-content: space-between }
.query { outline: 2px solid rgb(var(--near)) } pre:focus-visible { outline: 2px solid }
@media (max-width: 50rem) { main { grid-template-columns: minmax(0, 1fr) }
  pre { max-height: 45vh } aside { max-height: none } }
.key b { padding: .1rem .4rem; border-radius: .2rem; font-weight: normal }
.k1 { background: rgb(var(--pick) / .5); text-decoration: underline }
.k2 { background: rgb(var(--near) / .3) } .k3 { opacity: .3 }
$rules
</style>
<h1>$title</h1>
<p class="quiet">$about</p>
<p class="quiet">Point at a block, or follow a link to it, to see its importance in numbers. Tab and
the arrow keys choose queries, layers and links.</p>
<p class="key"><b class="k1">picked</b> <b class="k2">available, not picked: darker is more
important</b> <b class="k3">after the query: not visible</b> <b class="query">where the query
stands</b></p>
<fieldset><legend>Query</legend>$queries</fieldset>
<fieldset><legend>Layer and kv head</legend>$views</fieldset>
<main><pre tabindex="0" aria-label="the text">$text</pre><div>$panels</div></main>
</html>
""")


def html(found: Look, title: str, about: str = "") -> str:
    """The page.

    Args:
        found: what queries looked at.
        title: heading.
        about: a sentence about the model and the text.
    """
    per_query = len(found.views) // len(found.queries)
    first = found.views[:per_query]
    return PAGE.substitute(
        title=escape(title),
        about=escape(about),
        rules="\n".join(_rules(found, per_query)),
        queries=_radios("q", [_query_label(found, at) for at in found.queries]),
        views=_radios("v", [f"layer {view.layer}, head {view.kv_head}" for view in first]),
        text=_blocks(found),
        panels="\n".join(_panel(found, i, per_query) for i in range(len(found.views))),
    )


def readable(text: bytes) -> str:
    """Bytes as text; what is no UTF-8 or not printable as a dot, line ends kept."""
    raw = text.decode("utf-8", errors="replace")
    return "".join(c if c.isprintable() or c == "\n" else "·" for c in raw)


def _query_label(found: Look, at: int) -> str:
    before = readable(found.text[max(0, at - 23) : at + 1]).replace("\n", " ")
    return f"byte {at:,}: …{before}"


def _radios(group: str, labels: Sequence[str]) -> str:
    parts = [
        f'<label><input type="radio" name="{group}" id="{group}{i}"'
        f"{' checked' if i == 0 else ''}> {escape(label)}</label>"
        for i, label in enumerate(labels)
    ]
    return " ".join(parts)


def _rules(found: Look, per_query: int) -> list[str]:
    """Shades of blocks, by query and view; what a query cannot see; which panel is shown."""
    rules = [f"body:has(#q{i}:checked) .f{i} {{ opacity: .3 }}" for i in range(len(found.queries))]
    rules += [
        f"body:has(#q{i}:checked) #b{at // found.select_block} "
        "{ outline: 2px solid rgb(var(--near)) }"
        for i, at in enumerate(found.queries)
    ]
    for i, view in enumerate(found.views):
        chosen = f"body:has(#q{i // per_query}:checked):has(#v{i % per_query}:checked)"
        rules.append(f"{chosen} #p{i} {{ display: block }}")
        picked = {p.block: p.importance for p in view.picked}
        top = max([*view.importance, 1e-9])
        for block, importance in picked.items():
            shade = 0.3 + 0.5 * (importance / top) ** 0.5
            rules.append(
                f"{chosen} #b{block} {{ background: rgb(var(--pick) / {shade:.2f}); "
                "text-decoration: underline }"
            )
        others = [j for j in range(len(view.importance)) if j not in picked]
        for block in sorted(others, key=lambda j: -view.importance[j])[:SHADED]:
            shade = 0.4 * (view.importance[block] / top) ** 0.5
            if shade >= 0.01:
                rules.append(f"{chosen} #b{block} {{ background: rgb(var(--near) / {shade:.2f}) }}")
    return rules


def _blocks(found: Look) -> str:
    """The text in selection blocks; the one that is pointed at, or that a link went to, shows the
    numbers of every view."""
    size, parts = found.select_block, []
    for block, start in enumerate(range(0, len(found.text), size)):
        hidden = [f"f{i}" for i, at in enumerate(found.queries) if start > at]
        numbers = [
            f"byte {v.query} layer {v.layer} head {v.kv_head}: {v.importance[block]:.4f}"
            for v in found.views
            if block < len(v.importance)
        ]
        label = "\n".join([f"block {block}, bytes {start} …", *numbers])
        classes = f' class="{" ".join(hidden)}"' if hidden else ""
        body = escape(readable(found.text[start : start + size]))
        parts.append(f'<b id="b{block}"{classes} data-n="{escape(label)}">{body}</b>')
    return "".join(parts)


def _panel(found: Look, i: int, per_query: int) -> str:
    """The numbers of one view: where it looked first, then how."""
    view = found.views[i]
    gates = "".join(
        f"<tr><td>{head}</td>" + "".join(f'<td class="n">{g:.2f}</td>' for g in row) + "</tr>"
        for head, row in enumerate(view.gates)
    )
    share = sum(view.outputs) or 1.0
    shares = ", ".join(
        f"{name} {100 * x / share:.0f} %" for name, x in zip(BRANCHES, view.outputs, strict=True)
    )
    ranked = sorted(view.picked, key=lambda p: (p.why != "importance", -p.importance))
    rows = "".join(_passage(found, p) for p in ranked)
    heads = "".join(f"<th>{name}</th>" for name in BRANCHES)
    return (
        f'<aside id="p{i}"><h2>Layer {view.layer}, kv head {view.kv_head}, '
        f"byte {view.query:,}</h2>"
        f"<h3>Importance over the text; blue: picked</h3>{_map(view)}"
        f'<div class="ends quiet"><span>byte 0</span><span>{view.query:,}</span></div>'
        f"<h3>Picked blocks, most important first</h3><table><tr><th>block</th><th>bytes</th>"
        f"<th>importance</th><th>why</th><th>text</th></tr>{rows}</table>"
        f"<h3>Gates</h3><table><tr><th>head</th>{heads}</tr>{gates}</table>"
        f"<p>Length of what each branch adds: {shares}.</p>"
        f"<h3>Compressed attention ({found.block} bytes a block, every {found.stride}), mean of "
        f"the heads</h3>{_curve(view.compressed)}"
        f"<h3>Window attention, the last {len(view.window)} bytes</h3>{_curve(view.window)}</aside>"
    )


def _map(view: View, points: int = 400) -> str:
    """Importance of every block as bars, with the picked blocks as links into the text."""
    count = len(view.importance)
    wide = max(1.0, count / 150)  # so that a picked block of a long text can be hit
    links = "".join(
        f'<a href="#b{p.block}"><title>block {p.block}, bytes {p.first} to {p.last}: '
        f'{p.importance:.4f}</title><rect x="{max(0.0, p.block + 0.5 - wide / 2):.1f}" '
        f'width="{wide:.1f}" y="0" height="100"/></a>'
        for p in view.picked
    )
    step = -(-count // points)
    peaks = [max(view.importance[at : at + step]) for at in range(0, count, step)]
    top = max([*peaks, 1e-9])
    path = "".join(
        f"M{(i + 0.5) * step:.1f} 100V{100 - 100 * (y / top) ** 0.5:.1f}"
        for i, y in enumerate(peaks)
    )
    return (
        f'<svg class="map" viewBox="0 0 {count} 100" preserveAspectRatio="none">'
        f'<path d="{path}" stroke="currentColor" stroke-opacity=".5" fill="none" '
        f'stroke-width="{max(0.2, 0.6 * step):.1f}"/>{links}</svg>'
    )


def _passage(found: Look, p: Passage) -> str:
    text = readable(found.text[p.first : p.last + 1]).replace("\n", " ")
    return (
        f'<tr><td><a href="#b{p.block}">{p.block}</a></td><td class="n">{p.first}–{p.last}</td>'
        f'<td class="n">{p.importance:.4f}</td><td>{WHY[p.why]}</td><td>{escape(text)}</td></tr>'
    )


def _curve(values: Sequence[float], points: int = 400) -> str:
    """Bars of the largest value in each of at most `points` pieces."""
    if not values:
        return "<p>none yet</p>"
    step = -(-len(values) // points)
    peaks = [max(values[at : at + step]) for at in range(0, len(values), step)]
    top = max([*peaks, 1e-9])
    path = "".join(f"M{x + 0.5} 100V{100 - 100 * y / top:.1f}" for x, y in enumerate(peaks))
    return (
        f'<svg viewBox="0 0 {len(peaks)} 100" preserveAspectRatio="none" role="img" '
        f'aria-label="largest {top:.4f}"><title>largest {top:.4f}</title>'
        f'<path d="{path}" stroke="rgb(var(--pick))" stroke-width="1" fill="none"/></svg>'
    )
