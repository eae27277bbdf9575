"""The picture: made for every kind of kernel, says what it shows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from profile_helpers import example, hbm, matmuls, pipeline, profile_of, shapes
from profile_helpers import two_cores as copies

from nsa_neuron.simulator.cost import Cause
from nsa_neuron.simulator.machine.trn2 import TRN2
from nsa_neuron.simulator.profiler import plots
from nsa_neuron.simulator.profiler.memory import _steps, envelope, usage
from nsa_neuron.simulator.profiler.roofline import Roofline

matplotlib = pytest.importorskip("matplotlib")
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.image import imread  # noqa: E402


@pytest.mark.parametrize(
    "make",
    [
        lambda: profile_of(pipeline, *shapes((128, 2048))),
        lambda: profile_of(matmuls, *shapes((256, 128), (256, 1024))),
        lambda: profile_of(copies, *shapes((128, 512)), lnc=2),
        lambda: example("fresh_buffers", 256, 512, 256),
        lambda: profile_of(lambda: hbm((1, 1))),
    ],
    ids=["elementwise", "matmul", "two cores", "example", "empty"],
)
def test_picture_shows_every_lane_and_says_modelled(make, tmp_path, monkeypatch):
    drawn = []
    saved = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (drawn.append(f), saved(f, *a, **k)))
    found = make()
    found.png(tmp_path / "out.png")
    height, width, _ = imread(tmp_path / "out.png").shape
    assert width > 1200 and height > 700
    (figure,) = drawn
    assert "modelled" in figure.get_suptitle() and "not measured" in figure.get_suptitle()
    low, central, high = (x / 1e3 for x in (found.time.low, found.time.central, found.time.high))
    assert (
        f"on trn2: {central:.1f} µs modelled ({low:.1f} to {high:.1f}), " in figure.get_suptitle()
    )
    end = central or 1e-3
    titles = {a.get_title(loc="left"): a for a in figure.axes}
    assert {"Roofline", "Critical path by source line"} < set(titles)
    for number, core in enumerate(found.to_dict()["cores"]):
        axes = titles[f"Core {number}: engines and DMA queues"]
        assert [label.get_text() for label in axes.get_yticklabels()] == list(core["engines"])
        below = titles[f"Core {number}: memory in use per partition"]
        # Times stand below the last axes; all have the same, and end a little after it.
        assert axes.get_xlim() == below.get_xlim() == (0, end * 1.07)
        assert not any(label.get_visible() for label in axes.get_xticklabels())
        assert below.get_xlabel() == ("µs, modelled" if below is figure.axes[-1] else "")
    below.set_xlim(1, 2)
    assert all(a.get_xlim() == (1, 2) for title, a in titles.items() if "Core" in title)
    assert all(not a.spines[side].get_visible() for a in figure.axes for side in ("top", "right"))


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(1, 20)), min_size=1, max_size=60))
def test_union_covers_what_the_intervals_cover(pieces):
    since = np.array([float(a) for a, _ in pieces])
    until = since + [length for _, length in pieces]
    begins, ends = plots._union(since, until)
    middles = np.arange(230) + 0.5
    covered = ((since[:, None] <= middles) & (middles < until[:, None])).any(axis=0)
    drawn = ((begins[:, None] <= middles) & (middles < ends[:, None])).sum(axis=0)
    assert (drawn == covered).all()
    assert (begins[1:] > ends[:-1]).all()


def test_room_is_nothing_until_it_is_first_taken():
    at, used = _steps([(5.0, 8), (9.0, -8), (7.0, 2.5), (9.0, -2.5), (7.0, 1)])
    assert at.tolist() == [0.0, 5.0, 7.0, 9.0] and used.tolist() == [0, 8, 12, 1]
    at, used = _steps([(0.0, 3), (2.0, -3)])
    assert at.tolist() == [0.0, 2.0] and used.tolist() == [3, 0]
    at, used = _steps([])
    assert at.tolist() == [0.0] and used.tolist() == [0]


@given(st.integers(2, 5000), st.integers(0, 2**32 - 1))
def test_envelope_keeps_the_most_in_use(count, seed):
    rng = np.random.default_rng(seed)
    at = np.concatenate([[0.0], np.sort(rng.uniform(0, 100, count - 1))])
    used = rng.integers(0, 1000, count)
    edges, most = envelope(at, used, 100.0, plots.BARS)
    assert most.max() == used.max()
    assert len(edges) <= 2 * plots.BARS
    for time in rng.uniform(0, 100, 20):
        exact = used[np.searchsorted(at, time, side="right") - 1]
        drawn = most[np.searchsorted(edges, time, side="right") - 1]
        assert drawn >= exact
        if count < plots.BARS:
            assert drawn == exact


def test_rows_with_many_bars_show_shares(tmp_path):
    """Half of the time of a row of 1000 intervals is half of its height."""
    since = np.arange(1000.0)
    axes = Figure().subplots()
    plots._shares(axes, 1000.0, 0, [("#000000", plots._union(since, since + 0.5))])
    (filled,) = axes.collections
    heights = filled.get_paths()[0].vertices[:, 1]
    assert heights.max() == pytest.approx(0.33)
    assert heights.min() == pytest.approx(0.33 - 0.66 * 0.5, abs=0.66 * 0.2)


GREY = ("#333333", "#999999", "#7f7f7f", "#f5d08a")
AT = Roofline(8_000_000, 8_000_000, 100_000, 200_000, 1e3, 80_000.0, 400.0, 200.0)
ROOFS = {
    "below the ridge": (AT, [
        ("HBM 400 GB/s", (10, 4), "left", GREY[1]),
        ("DMA engines 200 GB/s", (10, 2), "left", GREY[0]),
        ("8.00 Tflop/s at 80.0 flop/B\n50% of the roof of DMA engines", (0.98, 0.06), "right",
         "black"),
        ("80 Tflop/s", (3200, 89.6), "right", GREY[0]),
    ], (10, 3200), (2 / 3, 200)),
    "above it": (replace(AT, needed_bytes=10_000, hbm=100.0), [
        ("HBM 100 GB/s", (100, 10), "left", GREY[0]),
        ("DMA engines 200 GB/s", (100, 20), "left", GREY[1]),
        ("8.00 Tflop/s at 800.0 flop/B\n10% of the roof of compute", (0.98, 0.06), "right",
         "black"),
        ("80 Tflop/s", (6400, 89.6), "right", GREY[0]),
    ], (100, 6400), (8 / 3, 200)),
    "no products": (replace(AT, flops=0, peak=0.0), [
        (" 400 GB/s", (400, 0), "left", "black"), (" 200 GB/s", (200, 1), "left", "black"),
        (" 200 GB/s", (200, 2), "left", "black"), (" 100 GB/s", (100, 3), "left", "black"),
        ("no matrix products: 50% of the bandwidth", (0.98, 0.06), "right", "black"),
    ], (0, 480), (-0.4525, 3.4525)),
    "no traffic": (replace(AT, needed_bytes=0), [
        (" 400 GB/s", (400, 0), "left", "black"), (" 200 GB/s", (200, 1), "left", "black"),
        (" 200 GB/s", (200, 2), "left", "black"), (" 0 GB/s", (0, 3), "left", "black"),
        ("10% of 80 Tflop/s, no HBM traffic", (0.98, 0.06), "right", "black"),
    ], (0, 480), (-0.4525, 3.4525)),
}  # fmt: skip


@pytest.mark.parametrize("name", ROOFS)
def test_a_roof_is_drawn_where_it_is(name):
    """Rates in GB/s and Tflop/s; the dot, its distance to the roof, both dashed ceilings."""
    r, texts, across, up = ROOFS[name]
    axes = Figure().subplots()
    plots._draw_roofline(axes, r)
    said = [
        (x.get_text(), tuple(np.round(x.xy if hasattr(x, "xy") else x.get_position(), 9)),
         x.get_ha(), x.get_color()) for x in axes.texts
    ]  # fmt: skip
    assert said == texts and axes.get_axisbelow() is True
    np.testing.assert_allclose([*axes.get_xlim(), *axes.get_ylim()], [*across, *up])
    if not axes.lines:
        bars = [(b.get_width(), matplotlib.colors.to_hex(b.get_facecolor())) for b in axes.patches]
        needed = r.needed_bytes / 1e3
        colors = [GREY[0], GREY[2], GREY[3], plots.COLORS["dma"].lower()]
        assert bars == list(zip((400.0, 200.0, 200.0, needed), colors, strict=True))
        assert [x.get_text() for x in axes.get_yticklabels()] == [
            "HBM at most", "DMA engines at most", "moved", "needed",
        ]  # fmt: skip
        assert axes.get_xlabel() == "HBM bytes, GB/s"
        return
    roof, hbm, dma, gap, dot = axes.lines
    x = roof.get_xdata()
    np.testing.assert_allclose([x[0], x[-1]], across)
    np.testing.assert_allclose(roof.get_ydata(), np.minimum(80.0, x * min(r.hbm, r.dma) / 1e3))
    for line, rate in ((hbm, r.hbm), (dma, r.dma)):
        np.testing.assert_allclose(line.get_ydata(), np.minimum(80.0, x * rate / 1e3))
        assert line.get_color() == GREY[0 if rate == min(r.hbm, r.dma) else 1]
        assert line.get_linestyle() == "--"
    np.testing.assert_allclose(
        gap.get_xydata(), [(r.intensity, 8.0), (r.intensity, r.ceiling / 1e3)]
    )
    np.testing.assert_allclose(dot.get_xydata(), [(r.intensity, 8.0)])
    bound = plots.COLORS["tensor" if r.bound == "compute" else "dma"]
    assert gap.get_color() == dot.get_color() == bound
    assert axes.get_xlabel() == "arithmetic intensity, flop per needed HBM byte"
    assert axes.get_ylabel() == "Tflop/s"
    assert axes.get_xscale() == axes.get_yscale() == "log"


class Lane:
    """Two instructions of one lane: the second waited for data, then for a buffer."""

    total, start = 2000.0, np.array([0.0, 400.0, 1200.0])
    issue, begin = np.array([0.0, 800.0, 1300.0]), np.array([0.0, 800.0, 1400.0])
    end, stall = np.array([400.0, 1200.0, 1900.0]), np.array([0.0, 400.0, 100.0])
    cause = np.array([Cause.LANE, Cause.RAW, Cause.WAR])

    def members(self, name, core):
        return np.array([0, 1, 2]) if (name, core) == ("vector", 1) else np.array([0])

    def busy(self, name, core):
        return 1300.0 if (name, core) == ("vector", 1) else 400.0


def test_lanes_are_drawn_in_microseconds_with_their_waits():
    axes = Figure().subplots()
    plots._draw_engines(axes, Lane(), 1, ["tensor", "vector"])
    said = [(x.get_text(), x.get_position(), x.get_va()) for x in axes.texts]
    assert said == [("20% busy", (2.01, 0), "center"), ("65% busy", (2.01, 1), "center")]
    assert (axes.get_xlim(), axes.get_ylim()) == ((0, 2.14), (1.6, -0.6))
    drawn = [
        (matplotlib.colors.to_hex(c.get_facecolor()[0]),
         [np.round([*p.vertices.min(0), *p.vertices.max(0)], 6).tolist() for p in c.get_paths()])
        for c in axes.collections
    ]  # fmt: skip
    assert drawn == [
        ("#d55e00", [[0.0, -0.22, 0.4, 0.22]]),
        ("#fdd0a2", [[1.2, 0.67, 1.3, 1.33]]),
        ("#d9d9d9", [[0.4, 0.67, 0.8, 1.33]]),
        ("#0072b2", [[0.0, 0.78, 0.4, 1.22], [0.8, 0.78, 1.2, 1.22], [1.4, 0.78, 1.9, 1.22]]),
    ]
    legend = [x.get_text() for x in axes.get_legend().get_texts()]
    assert legend == ["waits for data", "waits for a buffer"]
    assert axes.get_title(loc="left") == "Core 1: engines and DMA queues"


class Path:
    """Lines of a critical path as a report has them; the last takes less than half a percent."""

    lines = (
        ("/some/where/k.py", 12, "nisa.dma_copy(tile, a)", "dma-load dma_copy", 6.0, 0.6),
        ("/some/where/k.py", 7, "x" * 44, "tensor nc_matmul", 3.96, 0.396),
        ("other.py", 3, "y" * 45, "vector tensor_copy", 0.05, 0.005),
        ("other.py", 4, "z", "scalar activation", 0.04, 0.0049),
    )

    def __init__(self, *more):
        names = ("file", "line", "text", "what", "time_us", "share")
        rows = [*self.lines[:3], *more, self.lines[3]]
        self.found = {"lines": [dict(zip(names, row, strict=True)) for row in rows]}


def test_lines_of_the_critical_path_are_bars_the_longest_on_top(monkeypatch):
    monkeypatch.setattr(plots, "critical_path", lambda t, lines: Path().found)
    axes = Figure().subplots()
    plots._draw_lines(axes, None)
    bars = [(b.get_width(), matplotlib.colors.to_hex(b.get_facecolor())) for b in axes.patches]
    assert bars == [(0.05, "#0072b2"), (3.96, "#d55e00"), (6.0, "#e69f00")]
    assert [round(b.get_y() + b.get_height() / 2, 9) for b in axes.patches] == [0, 1, 2]
    said = [(x.get_text(), round(x.xy[0], 9), x.xy[1]) for x in axes.texts]
    assert said == [(" 0.1 µs, 0%", 0.05, 0), (" 4.0 µs, 40%", 3.96, 1), (" 6.0 µs, 60%", 6.0, 2)]
    assert [x.get_text() for x in axes.get_yticklabels()] == [
        "other.py:3\n" + "y" * 43 + "…", "k.py:7\n" + "x" * 44, "k.py:12\nnisa.dma_copy(tile, a)",
    ]  # fmt: skip
    assert axes.get_xlim() == (0, 7.5) and axes.get_xlabel() == "µs, modelled"
    assert axes.get_title(loc="left") == "Critical path by source line"


def test_seven_lines_of_the_critical_path_are_drawn(monkeypatch):
    more = [("k.py", k, "w", "gpsimd iota", 0.05, 0.005) for k in range(9)]
    monkeypatch.setattr(plots, "critical_path", lambda t, lines: Path(*more).found)
    axes = Figure().subplots()
    plots._draw_lines(axes, None)
    assert len(axes.patches) == 7 and len(axes.texts) == 7


def test_memory_is_drawn_as_filled_steps_with_its_peak():
    t = profile_of(pipeline, *shapes((128, 2048))).timeline
    axes = Figure().subplots()
    plots._draw_memory(axes, t, 0)
    for line, area, color, (buffer, limit) in zip(
        axes.lines, axes.collections, ("#56b4e9", "#d55e00"),
        (("sbuf", 212_984), ("psum", 16_384)), strict=True,
    ):  # fmt: skip
        at, used = usage(t, 0, TRN2)[buffer]
        at, share = np.append(at, t.total) / 1e3, np.append(used, used[-1]) / limit
        np.testing.assert_allclose(line.get_xydata(), np.stack([at, share], axis=1))
        assert line.get_drawstyle() == "steps-post"
        assert matplotlib.colors.to_hex(line.get_color()) == color
        assert matplotlib.colors.to_hex(area.get_facecolor()[0]) == color
        assert area.get_alpha() < 0.5 and area.get_paths()[0].vertices[:, 1].max() == share.max()
        top = f"{used.max() / 1024:.0f} of {limit / 1024:.0f} KiB"
        assert line.get_label() == f"{buffer.upper()}, peak {top}"
    assert axes.get_ylim() == (0, 1.05)
    assert [x.get_text() for x in axes.get_yticklabels()] == ["0", "50 %", "100 %"]
    assert len(axes.get_legend().get_texts()) == 2


def test_only_lanes_of_many_bars_are_drawn_as_shares_and_the_title_says_so():
    class Dense(Lane):
        """Lane "vector" has more intervals than are drawn one by one; "tensor" has one."""

        begin = start = issue = np.arange(0.0, 2000.0, 4.0)
        end, stall = begin + 1.0, np.zeros(500)

        def members(self, name, core):
            return np.arange(500) if name == "vector" else np.array([0])

    axes = Figure().subplots()
    plots._draw_engines(axes, Dense(), 1, ["vector", "tensor"])
    dense, single = axes.collections
    assert np.ptp(dense.get_paths()[0].vertices[:, 0]) == pytest.approx(2.0)  # of all the time
    assert np.ptp(single.get_paths()[0].vertices[:, 0]) == pytest.approx(2.0 / 1600)  # a pixel
    title = axes.get_title(loc="left")
    assert title.endswith("DMA queues (dense rows: height is share of time)")
    assert axes.get_legend() is None


def test_a_bar_is_a_pixel_wide_at_least_and_a_wait_as_long_as_it_is():
    axes = Figure().subplots()
    short = (np.array([1600.0]), np.array([1600.5]))
    plots._bars(axes, 3200.0, 0, [("#000000", short), ("#ff0000", short)])
    wide = [np.ptp(c.get_paths()[0].vertices[:, 0]) for c in axes.collections]
    np.testing.assert_allclose(wide, [0.0005, 0.002])


def test_shares_of_a_row_are_stacked_from_its_lower_edge():
    since = np.arange(0.0, 1000.0, 2.5)
    axes = Figure().subplots()
    layers = [("#000000", (since, since + 1.0)), ("#ff0000", (since + 1.0, since + 2.5))]
    plots._shares(axes, 1000.0, 3, layers)
    for filled, (low, high) in zip(axes.collections, ((3.066, 3.33), (2.67, 3.066)), strict=True):
        corners = filled.get_paths()[0].vertices
        np.testing.assert_allclose([corners[:, 1].min(), corners[:, 1].max()], [low, high])
        np.testing.assert_allclose([corners[:, 0].min(), corners[:, 0].max()], [0.0, 1.0])
