"""A profile as a picture: roofline, what engines do over time, memory over time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..cost import Cause
from ..machine import machine_for
from .memory import usage
from .roofline import Roofline, roofline_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from ..cost import Timeline
    from .profiled import Profile

PIXELS = 1600  # bars closer than total / PIXELS are drawn as one

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


def save(found: Profile, path: str | Path) -> None:
    """Draw a profile.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the picture needs matplotlib: pip install nsa-neuron[plot]") from error
    t, cores = found.timeline, found.run.lnc
    lanes = [_lanes(t, core) for core in range(cores)]
    rows = sum(map(len, lanes))
    figure = Figure(figsize=(13, 4.6 + 0.34 * rows + 1.5 * cores), layout="constrained")
    heights = [3.4]
    for names in lanes:
        heights += [0.5 + 0.34 * len(names), 1.4]
    grid = figure.add_gridspec(1 + 2 * cores, 2, height_ratios=heights, width_ratios=(1, 1))
    band = found.time
    figure.suptitle(
        f"{found.run.kernel} on {found.run.target}: {band.central / 1e3:.1f} µs modelled "
        f"({band.low / 1e3:.1f} to {band.high / 1e3:.1f}), not measured",
        fontsize=13,
    )
    _draw_roofline(figure.add_subplot(grid[0, 0]), roofline_of(t))
    _draw_lines(figure.add_subplot(grid[0, 1]), found)
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
    """Both axes logarithmic; the kernel is a dot under its roof, if it computes and uses HBM."""
    unit = r.unit
    placed = r.work > 0 and np.isfinite(r.intensity)
    at = r.intensity if placed else r.ridge
    low, high = min(at, r.ridge) / 8, max(at, r.ridge) * 8
    x = np.geomspace(low, high, 200)
    roof = np.minimum(r.roof, x * r.bandwidth) / 1e3
    bottom = min(r.achieved / 1e3 if placed else roof.min(), roof.min()) / 3
    axes.loglog(x, roof, color="#333333", lw=2)
    axes.fill_between(x, roof, bottom, color="#f2f2f2", lw=0)
    if placed:
        color = COLORS["tensor"] if r.bound == "compute" else COLORS["dma"]
        axes.plot([at, at], [r.achieved / 1e3, r.ceiling / 1e3], ":", color=color, lw=1.5)
        axes.plot(at, r.achieved / 1e3, "o", color=color, ms=10, zorder=3)
        first = f"{r.achieved / 1e3:.2f} T{unit}/s at {r.intensity:.1f} {unit}/B"
    else:
        first = f"{r.achieved / 1e3:.2f} T{unit}/s without HBM" if r.work else "no arithmetic"
    second = f"{r.share:.0%} of the roof, {r.bound}-bound"
    axes.text(0.98, 0.06, f"{first}\n{second}", transform=axes.transAxes, ha="right")
    top = r.roof / 1e3
    axes.text(high, top * 1.12, f"{top:.3g} T{unit}/s", ha="right", color="#333333")
    axes.annotate(
        f"HBM {r.bandwidth:.0f} GB/s",
        (low, low * r.bandwidth / 1e3),
        xytext=(22, 6),
        textcoords="offset points",
        va="top",
        color="#333333",
    )
    axes.set_ylim(bottom, top * 2.5)
    axes.set_xlim(low, high)
    axes.set_xlabel(f"arithmetic intensity, {unit} per HBM byte")
    axes.set_ylabel(f"T{unit}/s")
    axes.set_title("Roofline", loc="left")
    axes.grid(which="major", color="#e5e5e5", lw=0.6)
    axes.set_axisbelow(True)
    _bare(axes)


def _draw_lines(axes: Any, found: Profile) -> None:
    """Bars: source lines by their time on the critical path."""
    rows = [r for r in found.to_dict()["critical_path"]["lines"][:7] if r["share"] >= 0.005]
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
    """A row per lane: coloured while it executes, pale by cause while it is stalled."""
    legend: dict[str, str] = {}
    gap = t.total / PIXELS
    for row, name in enumerate(names):
        members = t.members(name, core)
        stalled = members[t.stall[members] > 0]
        for cause, (color, label) in WAITS.items():
            chosen = stalled[t.cause[stalled] == cause]
            if len(chosen):
                legend[label] = color
                bars = _merged(t.start[chosen], t.issue[chosen], gap)
                _bars(axes, bars, row, 0.66, color, 0.0)
        bars = _merged(t.begin[members], t.end[members], gap)
        _bars(axes, bars, row, 0.44, COLORS[name.split("-")[0]], gap)
        share = t.busy(name, core) / t.total if t.total else 0.0
        axes.text(t.total / 1e3 * 1.005, row, f"{share:.0%} busy", va="center", fontsize=9)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, (t.total or 1.0) / 1e3 * 1.07)
    axes.set_title(f"Core {core}: engines and DMA queues", loc="left")
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


def _merged(
    since: NDArray[np.float64], until: NDArray[np.float64], gap: float
) -> list[tuple[float, float]]:
    """Intervals with those nearer than `gap` joined, so that a million bars stay drawable."""
    merged: list[list[float]] = []
    order = np.argsort(since, kind="stable")
    for a, b in zip(since[order].tolist(), until[order].tolist(), strict=True):
        if merged and a - merged[-1][1] <= gap:
            merged[-1][1] = max(b, merged[-1][1])
        else:
            merged.append([a, b])
    return [(a, b) for a, b in merged]


def _bars(
    axes: Any,
    spans: Iterable[tuple[float, float]],
    row: int,
    height: float,
    c: str,
    narrowest: float,
) -> None:
    places = [(a / 1e3, max(b - a, narrowest) / 1e3) for a, b in spans]
    axes.broken_barh(places, (row - height / 2, height), facecolors=c, linewidth=0, snap=False)


def _draw_memory(axes: Any, t: Timeline, core: int) -> None:
    """SBUF and PSUM in use, as shares of what there is."""
    machine = machine_for(t.run.target)
    limits = {"sbuf": machine.sbuf_bytes, "psum": machine.psum_bytes}
    for (buffer, (at, used)), color in zip(
        usage(t, core, machine).items(), ("#56B4E9", "#D55E00"), strict=True
    ):
        times = np.append(at, t.total) / 1e3
        share = np.append(used, used[-1]) / limits[buffer]
        label = f"{buffer.upper()}, peak {used.max() / 1024:.0f} of {limits[buffer] / 1024:.0f} KiB"
        axes.step(times, share, where="post", color=color, lw=1.3, label=label)
        axes.fill_between(times, share, step="post", color=color, alpha=0.15, lw=0)
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
