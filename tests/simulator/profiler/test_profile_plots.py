"""The picture: made for every kind of kernel, says what it shows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from profile_helpers import example, hbm, matmuls, pipeline, profile_of, shapes
from profile_helpers import two_cores as copies

from nsa_neuron.simulator.profiler import plots
from nsa_neuron.simulator.profiler.memory import envelope

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
