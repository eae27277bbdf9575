"""A `Look` as a PNG: importance of every block, by layer and kv head, and what was picked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nsa_neuron.errors import BackendUnavailable

if TYPE_CHECKING:
    from pathlib import Path

    from nsa_neuron.show.record import Look


def picture(found: Look, path: str | Path, title: str = "") -> None:
    """Writes the picture: a panel per query, a row per layer and kv head, darker: more important.

    Raises:
        BackendUnavailable: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise BackendUnavailable(
            "a picture needs matplotlib: pip install 'nsa-neuron[plot]'"
        ) from None
    per_query = len(found.views) // len(found.queries)
    size = (11, 1.2 + len(found.queries) * (0.7 + 0.28 * per_query))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(found.queries), 1, squeeze=False)[:, 0]
    for i, (panel, at) in enumerate(zip(panels, found.queries, strict=True)):
        views = found.views[i * per_query : (i + 1) * per_query]
        top = max(max([*view.importance, 1e-9]) for view in views)
        shades = [[(x / top) ** 0.5 for x in view.importance] for view in views]
        panel.imshow(shades, aspect="auto", cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
        for row, view in enumerate(views):
            blocks = [p.block for p in view.picked]
            panel.scatter(blocks, [row] * len(blocks), marker="|", s=60, color="#0969da")
        panel.set_yticks(range(per_query), [f"layer {v.layer}, head {v.kv_head}" for v in views])
        panel.set_title(f"byte {at:,}", loc="left", fontsize=10)
        panel.set_xlabel(f"block of {found.select_block} bytes (blue: picked)")
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110, format="png")  # whatever the name ends with
