"""A few steps of training on every kind of mesh: losses and norms are those of one rank."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from nsa_neuron.distributed.checkpoint import steps
from nsa_neuron.distributed.parallelism import Parallelism
from nsa_neuron.distributed.training import How, train
from nsa_neuron.errors import InvalidArgument, StateMismatch
from nsa_neuron.nn import NsaConfig
from nsa_neuron.training.corpus import corpus_of
from nsa_neuron.training.tasks import Text

CONFIG = NsaConfig(
    dim=16, heads=4, kv_heads=2, dk=8, dv=6, block=8, stride=4, select_block=16, num_selected=4,
    window=12,
)  # fmt: skip
KINDS = ("nsa", "window", "full")  # a stage of two layers beside one of one
HOW = How(steps=3, batch=4, length=64, rate=1e-2, microbatches=2)  # saved at its end
TASK = Text(corpus_of(text=[bytes(range(256)) * 4] * 3))


def run(folder, shape, changes=None, sizes=None, kinds=KINDS):
    """Loss and norm of the whole gradient of each step. (Losses alone tell no wrong norm: AdamW
    does not mind gradients that are all too small by one factor.)"""
    norms, clip = [], torch.nn.utils.clip_grads_with_norm_

    def clipped(parameters, most, norm):
        norms.append(float(norm))
        clip(parameters, most, norm)

    with patch("torch.nn.utils.clip_grads_with_norm_", clipped):
        losses = train(
            dataclasses.replace(CONFIG, **(sizes or {})),
            kinds,
            TASK,
            Parallelism(*shape),
            dataclasses.replace(HOW, **(changes or {})),
            Path(folder),
        )
    return list(zip(losses, norms, strict=True))


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Losses and norms of one rank, in this process."""
    store = tmp_path_factory.mktemp("one")
    dist.init_process_group("gloo", init_method=f"file://{store}/s", rank=0, world_size=1)
    try:
        yield run(store / "run", (1, 1, 1, 1), {"save_every": 2}), store / "run"
    finally:
        dist.destroy_process_group()


def near(got, want, tolerance=2e-5):
    for steps_ in got:
        torch.testing.assert_close(
            torch.tensor(steps_), torch.tensor(want), rtol=tolerance, atol=tolerance
        )


TWO = {
    "pp": (2, 1, 1, 1), "dp": (1, 2, 1, 1), "cp": (1, 1, 2, 1), "tp": (1, 1, 1, 2),
}  # fmt: skip
FOUR = {
    "pp_dp": (2, 2, 1, 1), "pp_cp": (2, 1, 2, 1), "pp_tp": (2, 1, 1, 2), "dp_cp": (1, 2, 2, 1),
    "dp_tp": (1, 2, 1, 2), "cp_tp": (1, 1, 2, 2), "tp": (1, 1, 1, 4), "cp": (1, 1, 4, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", TWO)
def test_two_ranks_lose_as_one(two, expected, tmp_path, name):
    near(two(run, tmp_path, TWO[name]), expected[0])


@pytest.mark.parametrize("name", FOUR)
def test_four_ranks_lose_as_one(four, expected, tmp_path, name):
    near(four(run, tmp_path, FOUR[name]), expected[0])


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ((1, 1, 2, 1), {"replay": True}),
        ((1, 1, 2, 1), {"fetch": "blocks"}),
        ((2, 1, 1, 1), {"schedule": "gpipe"}),
        ((1, 1, 1, 2), {"sequence": False}),
        ((1, 1, 1, 2), {"replay": True}),
    ],
    ids=str,
)
def test_options_change_no_loss(two, expected, tmp_path, shape, changes):
    near(two(run, tmp_path, shape, changes), expected[0])


def test_stages_there_and_back(two, expected, tmp_path):
    """Zero-bubble V: each of two ranks has the first or second stage, and the fourth or third."""
    kinds = ("nsa", "window", "nsa", "full")
    alone = run(tmp_path / "one", (1, 1, 1, 1), None, None, kinds)
    near(two(run, tmp_path / "two", (2, 1, 1, 1), {"schedule": "zbv"}, None, kinds), alone)


def test_more_ranks_than_kv_heads_beside_fsdp(four, expected, tmp_path):
    sizes = {"kv_heads": 1, "phi": "linear"}
    alone = run(tmp_path / "one", (1, 1, 1, 1), None, sizes)
    near(four(run, tmp_path / "four", (1, 1, 2, 2), None, sizes), alone)


def test_bfloat16_is_near(two, expected, tmp_path):
    near(two(run, tmp_path, (1, 2, 1, 1), {"dtype": "bfloat16"}), expected[0], 0.03)


@pytest.mark.parametrize("shape", [(1, 1, 2, 1), (2, 1, 1, 1)], ids=str)
def test_another_mesh_goes_on(two, four, expected, tmp_path, shape):
    """Two steps on four ranks, the third on two: the losses of one rank throughout."""
    first = four(run, tmp_path, (1, 2, 1, 2), {"steps": 2})
    second = two(run, tmp_path, shape, {"steps": 3})
    near([a + b for a, b in zip(first, second, strict=False)], expected[0])
    assert sorted(steps(tmp_path)) == [2, 3]


def test_two_ranks_go_on_from_one(two, expected, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(expected[1], folder)
    shutil.rmtree(folder / "step-3")
    near(two(run, folder, (1, 1, 1, 2)), expected[0][2:])


def refused(folder, shape, changes, error, match):
    with pytest.raises(error, match=match):
        run(folder, shape, changes)


@pytest.mark.parametrize(
    ("shape", "changes", "error", "match"),
    [
        ((1, 1, 3, 1), {"length": 63}, InvalidArgument, "as many as run"),
        ((1, 1, 2, 1), {"length": 63}, InvalidArgument, "multiple of cp"),
        ((1, 1, 1, 2), {"length": 63}, InvalidArgument, r"multiple of cp \* tp = 2, or sequence"),
        ((1, 2, 1, 1), {"batch": 3}, InvalidArgument, "a multiple of 2 parts"),
        ((2, 1, 1, 1), {"schedule": "fast"}, InvalidArgument, "one of gpipe"),
    ],
)
def test_meshes_that_do_not_fit_are_refused_on_every_rank(
    two, tmp_path, shape, changes, error, match
):
    two(refused, tmp_path, shape, changes, error, match)


def test_a_run_of_another_model_is_refused(two, expected, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(expected[1], folder)
    two(refused, folder, (1, 2, 1, 1), {"seed": 1}, StateMismatch, "seed differ")
