"""The picture: made for every kind of kernel, says what it shows."""

from __future__ import annotations

import pytest
from profile_helpers import example, hbm, matmuls, pipeline, profile_of, shapes
from profile_helpers import two_cores as copies

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
