"""A profile as a picture: roofline, what engines do over time, memory over time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..cost import Cause
from ..machine.trn2 import machine_for
from .lines import Lines
from .memory import envelope, usage
from .report import critical_path
from .roofline import Roofline, roofline_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ..cost import Estimate, Timeline

    Floats = NDArray[np.float64]
    Layer = tuple[str, tuple[Floats, Floats]]  # colour, begins and ends

PIXELS = 1600  # about as wide as the time axis
BARS = 400  # intervals of a lane drawn one by one at most

# Okabe and Ito's palette, told apart by the colour-blind.
COLORS = {
    "tensor": "#D55E00",
    "vector": "#0072B2",
    "scalar": "#009E73",
    "gpsimd": "#CC79A7",
    "sync": "#7f7f7f",
    "dma": "#E69F00",
}
WAITS = {
    Cause.RAW: ("#d9d9d9", "waits for data"),
    Cause.WAR: ("#fdd0a2", "waits for a buffer"),
    Cause.WAW: ("#fdd0a2", "waits for a buffer"),
    Cause.SPACE: ("#fdd0a2", "waits for a buffer"),
    Cause.EDGE: ("#c6dbef", "waits: ordered"),
    Cause.BANK: ("#fcbba1", "waits for a PSUM bank"),
    Cause.TRIGGER: ("#dadaeb", "waits for the trigger"),
}


def save(found: Estimate, path: str | Path) -> None:
    """Draw an estimate of a run.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the picture needs matplotlib: pip install nsa-neuron[plot]") from error
    t = found.central
    run, cores = t.run, t.run.lnc
    lanes = [_lanes(t, core) for core in range(cores)]
    rows = sum(map(len, lanes))
    figure = Figure(figsize=(13, 4.6 + 0.34 * rows + 1.5 * cores), layout="constrained")
    heights = [3.4]
    for names in lanes:
        heights += [0.5 + 0.34 * len(names), 1.4]
    grid = figure.add_gridspec(1 + 2 * cores, 2, height_ratios=heights, width_ratios=(1, 1))
    band = found.band
    figure.suptitle(
        f"{run.kernel} on {run.target}: {band.central / 1e3:.1f} µs modelled "
        f"({band.low / 1e3:.1f} to {band.high / 1e3:.1f}), not measured",
        fontsize=13,
    )
    _draw_roofline(figure.add_subplot(grid[0, 0]), roofline_of(t))
    _draw_lines(figure.add_subplot(grid[0, 1]), t)
    shared = None
    for core, names in enumerate(lanes):
        axes = figure.add_subplot(grid[1 + 2 * core, :], sharex=shared)
        shared = shared or axes
        _draw_engines(axes, t, core, names)
        below = figure.add_subplot(grid[2 + 2 * core, :], sharex=shared)
        _draw_memory(below, t, core)
    below.set_xlabel("µs, modelled")
    figure.savefig(path, dpi=130)


def _lanes(t: Timeline, core: int) -> list[str]:
    return [lane for lane in dict.fromkeys(t.lanes) if len(t.members(lane, core))]


def _draw_roofline(axes: Any, r: Roofline) -> None:
    """A kernel with matrix products under its roof; one without beside its two bandwidths."""
    axes.set_title("Roofline", loc="left")
    axes.set_axisbelow(True)
    _bare(axes)
    if r.flops and np.isfinite(r.intensity):
        _draw_roof(axes, r)
    else:
        _draw_bandwidths(axes, r)


def _draw_roof(axes: Any, r: Roofline) -> None:
    """Both axes logarithmic; the kernel is a dot under its roof."""
    at = r.intensity
    low, high = min(at, r.ridge) / 8, max(at, r.ridge) * 8
    x = np.geomspace(low, high, 200)
    roof = np.minimum(r.peak, x * r.bandwidth) / 1e3
    bottom = min(r.achieved / 1e3, roof.min()) / 3
    axes.loglog(x, roof, color="#333333", lw=2)
    axes.fill_between(x, roof, bottom, color="#f2f2f2", lw=0)
    for name, rate in (("HBM", r.hbm), ("DMA engines", r.dma)):
        limit = np.minimum(r.peak, x * rate) / 1e3
        axes.plot(x, limit, color="#333333" if rate == r.bandwidth else "#999999", lw=1, ls="--")
        above = rate > r.bandwidth
        axes.annotate(
            f"{name} {rate:.0f} GB/s",
            (low, low * rate / 1e3),
            xytext=(6, 26) if above else (22, 6),
            textcoords="offset points",
            va="top",
            color="#999999" if above else "#333333",
        )
    color = COLORS["tensor"] if r.bound == "compute" else COLORS["dma"]
    axes.plot([at, at], [r.achieved / 1e3, r.ceiling / 1e3], ":", color=color, lw=1.5)
    axes.plot(at, r.achieved / 1e3, "o", color=color, ms=10, zorder=3)
    text = (
        f"{r.achieved / 1e3:.2f} Tflop/s at {r.intensity:.1f} flop/B\n"
        f"{r.share:.0%} of the roof of {r.bound}"
    )
    axes.text(0.98, 0.06, text, transform=axes.transAxes, ha="right")
    top = r.peak / 1e3
    axes.text(high, top * 1.12, f"{top:.3g} Tflop/s", ha="right", color="#333333")
    axes.set_ylim(bottom, top * 2.5)
    axes.set_xlim(low, high)
    axes.set_xlabel("arithmetic intensity, flop per needed HBM byte")
    axes.set_ylabel("Tflop/s")
    axes.grid(which="major", color="#e5e5e5", lw=0.6)


def _draw_bandwidths(axes: Any, r: Roofline) -> None:
    """Bars: the rate of needed bytes, of moved ones, and the two ceilings."""
    needed = r.needed_bytes / r.total if r.total else 0.0
    bars = {
        "HBM at most": (r.hbm, "#333333"),
        "DMA engines at most": (r.dma, "#7f7f7f"),
        "moved": (r.achieved_bandwidth, "#f5d08a"),
        "needed": (needed, COLORS["dma"]),
    }
    drawn = axes.barh(
        range(4), [v for v, _ in bars.values()], color=[c for _, c in bars.values()], height=0.55
    )
    axes.bar_label(drawn, [f" {v:.0f} GB/s" for v, _ in bars.values()])
    axes.set_yticks(range(4), list(bars))
    axes.set_xlim(0, 1.2 * max(r.hbm, r.dma))
    axes.set_xlabel("HBM bytes, GB/s")
    if r.share is None:
        text = "no HBM traffic"
    elif r.flops:
        text = f"{r.share:.0%} of {r.peak / 1e3:.3g} Tflop/s, no HBM traffic"
    else:
        text = f"no matrix products: {r.share:.0%} of the bandwidth"
    axes.text(0.98, 0.06, text, transform=axes.transAxes, ha="right")


def _draw_lines(axes: Any, t: Timeline) -> None:
    """Bars: source lines by their time on the critical path."""
    rows = [r for r in critical_path(t, Lines())["lines"][:7] if r["share"] >= 0.005]
    names, times, colors = [], [], []
    for row in rows[::-1]:
        place = f"{Path(row['file']).name}:{row['line']}"
        names.append(f"{place}\n{_shortened(row['text'], 44)}")
        times.append(row["time_us"])
        colors.append(COLORS[row["what"].split()[0].split("-")[0]])
    bars = axes.barh(range(len(rows)), times, color=colors, height=0.62)
    labels = [f" {row['time_us']:.1f} µs, {row['share']:.0%}" for row in rows[::-1]]
    axes.bar_label(bars, labels, fontsize=9)
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.set_xlim(0, max(times, default=1.0) * 1.25)
    axes.set_title("Critical path by source line", loc="left")
    axes.set_xlabel("µs, modelled")
    _bare(axes)


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _draw_engines(axes: Any, t: Timeline, core: int, names: list[str]) -> None:
    """A row per lane: coloured while it executes, pale by cause while it is stalled.

    Where bars would be narrower than a pixel, the height of a colour is its share of the time.
    """
    legend: dict[str, str] = {}
    shares = False
    for row, name in enumerate(names):
        members = t.members(name, core)
        stalled = members[t.stall[members] > 0]
        layers = [(COLORS[name.split("-")[0]], _union(t.begin[members], t.end[members]))]
        for cause, (color, label) in WAITS.items():
            chosen = stalled[t.cause[stalled] == cause]
            if len(chosen):
                legend[label] = color
                layers.append((color, _union(t.start[chosen], t.issue[chosen])))
        dense = max(len(since) for _, (since, _) in layers) > BARS
        shares |= dense
        (_shares if dense else _bars)(axes, t.total, row, layers)
        busy = t.busy(name, core) / t.total if t.total else 0.0
        axes.text(t.total / 1e3 * 1.005, row, f"{busy:.0%} busy", va="center", fontsize=9)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, (t.total or 1.0) / 1e3 * 1.07)
    note = " (dense rows: height is share of time)" if shares else ""
    axes.set_title(f"Core {core}: engines and DMA queues{note}", loc="left")
    axes.tick_params(labelbottom=False)
    _bare(axes)
    if legend:
        from matplotlib.patches import Patch

        axes.legend(
            handles=[Patch(color=c, label=label) for label, c in legend.items()],
            loc="lower right",
            bbox_to_anchor=(1, 1),
            ncols=len(legend),
            frameon=False,
            fontsize=9,
            borderaxespad=0.1,
        )


def _union(since: Floats, until: Floats) -> tuple[Floats, Floats]:
    """Begins and ends of the maximal intervals that the given ones cover."""
    order = np.argsort(since, kind="stable")
    since, until = since[order], np.maximum.accumulate(until[order])
    first = np.ones(len(since), bool)
    first[1:] = since[1:] > until[:-1]
    return since[first], until[np.append(first[1:], True)]


def _bars(axes: Any, total: float, row: int, layers: Sequence[Layer]) -> None:
    """One bar per interval, waits below; the busy ones at least a pixel wide."""
    for number, (color, (since, until)) in reversed(list(enumerate(layers))):
        width = np.maximum(until - since, 0.0 if number else total / PIXELS) / 1e3
        height = 0.66 if number else 0.44
        axes.broken_barh(
            list(zip(since / 1e3, width, strict=True)),
            (row - height / 2, height),
            facecolors=color,
            linewidth=0,
            snap=False,
        )


def _shares(axes: Any, total: float, row: int, layers: Sequence[Layer]) -> None:
    """Stacked from below: the share of each bin's time, busy first."""
    edges = np.linspace(0.0, total, BARS + 1)
    level = np.zeros(BARS)
    for color, (since, until) in layers:
        ends = np.stack([since, until], axis=1).ravel()
        done = np.stack([np.zeros_like(since), until - since], axis=1).ravel().cumsum()
        share = np.diff(np.interp(edges, ends, done)) / (total / BARS)
        above = np.minimum(level + share, 1.0)
        low, high = (np.append(row + 0.33 - 0.66 * x, 0.0) for x in (level, above))
        low[-1], high[-1] = low[-2], high[-2]
        axes.fill_between(edges / 1e3, low, high, step="post", color=color, lw=0)
        level = above


def _draw_memory(axes: Any, t: Timeline, core: int) -> None:
    """SBUF and PSUM in use, as shares of what there is."""
    machine = machine_for(t.run.target)
    limits = {"sbuf": machine.sbuf_bytes, "psum": machine.psum_bytes}
    for (buffer, (at, used)), color in zip(
        usage(t, core, machine).items(), ("#56B4E9", "#D55E00"), strict=True
    ):
        times, most = envelope(at, used, t.total, BARS)
        share = most / limits[buffer]
        label = f"{buffer.upper()}, peak {used.max() / 1024:.0f} of {limits[buffer] / 1024:.0f} KiB"
        axes.step(times / 1e3, share, where="post", color=color, lw=1.3, label=label)
        axes.fill_between(times / 1e3, share, step="post", color=color, alpha=0.15, lw=0)
    axes.set_ylim(0, 1.05)
    axes.set_yticks((0, 0.5, 1), ("0", "50 %", "100 %"))
    axes.set_title(f"Core {core}: memory in use per partition", loc="left")
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=2,
        frameon=False,
        fontsize=9,
        borderaxespad=0.1,
    )
    _bare(axes)


def _bare(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
