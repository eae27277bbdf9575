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
from nsa_neuron.simulator.profiler import plots
from nsa_neuron.simulator.profiler.memory import _steps, envelope
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
    titles = {a.get_title(loc="left"): a for a in figure.axes}
    for number, core in enumerate(found.to_dict()["cores"]):
        axes = titles[f"Core {number}: engines and DMA queues"]
        assert [label.get_text() for label in axes.get_yticklabels()] == list(core["engines"])
        assert f"Core {number}: memory in use per partition" in titles


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
