"""Refusals of layers, caches, checkpoints and looks that no other file's tests meet."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from tiny import bytes_of, fed, model

from nsa_neuron import model_bench
from nsa_neuron.errors import BackendUnavailable, InvalidArgument, StateMismatch
from nsa_neuron.nn import NativeSparseAttention, capture
from nsa_neuron.nn.checkpoint import (
    FORMAT,
    load_checkpoint,
    read_tensors,
    save_checkpoint,
    write_tensors,
)
from nsa_neuron.nn.packing import pack, unpack
from nsa_neuron.show import look, picture
from nsa_neuron.training.presets import CONFIGS, LAYERS, SCHEDULES, kinds_of, task_of


def test_a_cache_that_was_reset_is_a_new_one():
    for change in ({}, {"paged": True}, {"paged": True, "slack": 0}):
        net = model(("nsa", "window"))
        cache, tokens = net.new_cache(2, 90, **change), bytes_of(2, 80)
        fed(net, tokens[:, 40:], [39, 1], cache)
        cache.reset()
        assert cache.lengths == [0, 0]
        if change:
            assert all(t.free == len(t.users) for t in cache.books.tables.values())
        with torch.no_grad():
            torch.testing.assert_close(
                fed(net, tokens, [79, 1], cache), net(tokens), rtol=1e-9, atol=1e-9
            )


def test_a_step_takes_tokens_of_its_cache_s_device():
    net = model(("nsa",))
    with net.new_cache(1, 9).step(2) as step, pytest.raises(InvalidArgument, match="on meta"):
        step.layers[0].check(torch.zeros(1, 2, 16, device="meta"))


@pytest.mark.parametrize("other", ["step", "cu_seqlens"])
def test_a_mask_stands_alone(other):
    net, mask = model(("nsa",)), torch.ones(1, 3, dtype=torch.bool)
    with net.new_cache(1, 9).step(3) as step:
        given = {"step": step, "cu_seqlens": torch.tensor([0, 3], dtype=torch.int32)}
        with pytest.raises(InvalidArgument, match=f"'mask' is given with {other}; it must be None"):
            net(bytes_of(1, 3), mask=mask, **{other: given[other]})


def test_a_step_of_another_kind_is_told_as_such():
    with pytest.raises(ValueError, match="'step' is int; it must be a Step of a cache"):
        model(("nsa",))(bytes_of(1, 3), 5)


def test_layers_whose_tokens_are_spread_cannot_be_captured():
    net = model(("nsa",))
    layer = next(m for m in net.modules() if isinstance(m, NativeSparseAttention))
    layer.parallel = SimpleNamespace(positions=lambda n, *_: torch.arange(n))
    with pytest.raises(InvalidArgument, match="parallel layers cannot"), capture(net, [1]):
        net(bytes_of(1, 9))
    with (
        pytest.raises(InvalidArgument, match="'queries' is -1; it must be at least 0"),
        capture(net, [0, -1]),
    ):
        pass


def test_old_files_load_where_the_order_of_heads_is_the_same(tmp_path):
    """Format 1 had rows by set: it matters where there are several heads and several sets."""
    for changes, loads in (({}, False), ({"kv_heads": 1}, True), ({"shared_kv": True}, True)):
        net = model(("nsa", "window"), torch.float32, **changes)
        path = tmp_path / "m.safetensors"
        save_checkpoint(net, path)
        tensors, about = read_tensors(path)
        assert about["format"] == FORMAT == 2 and about["notes"] == {}
        for number in (0, 3, "1"):
            write_tensors(path, tensors, {**about, "format": number})
            with pytest.raises(StateMismatch, match="expected"):
                load_checkpoint(path)
        write_tensors(path, tensors, {**about, "model": "Other"})
        with pytest.raises(StateMismatch, match="Other"):
            load_checkpoint(path)
        write_tensors(path, tensors, {**about, "format": 1})
        if not loads:
            with pytest.raises(StateMismatch, match="another order of heads"):
                load_checkpoint(path)
            continue
        again, notes = load_checkpoint(path)
        assert notes == {} and not again.training
        assert all(torch.equal(a, net.state_dict()[n]) for n, a in again.state_dict().items())


def test_a_state_dict_with_names_too_many_loads_nothing():
    net, other = model(), model(seed=5)
    before = {n: x.clone() for n, x in net.state_dict().items()}
    more = {**other.state_dict(), "colour": torch.zeros(1)}
    with pytest.raises(StateMismatch, match="colour is unknown"):
        net.load_state_dict(more)
    assert all(torch.equal(x, before[n]) for n, x in net.state_dict().items())
    net.load_state_dict(more, strict=False)
    assert torch.equal(net.head.weight, other.head.weight)
    shapes = {n: torch.zeros(1) for n in other.state_dict()}
    left = len(shapes) - 3
    with pytest.raises(StateMismatch, match=f"; .*; .*, and {left} more$"):
        net.load_state_dict(shapes)
    with pytest.raises(StateMismatch, match=r"is .*, not"):
        net.load_state_dict({"head.weight": torch.zeros(1)}, strict=False)


@pytest.mark.parametrize(
    ("package", "call", "extra"),
    [
        ("safetensors.torch", lambda path: load_checkpoint(path / "m"), "hf"),
        ("matplotlib.figure", lambda path: picture(None, path / "p"), "plot"),
        ("transformers", lambda _: model_bench.decoding(8), "hf"),
    ],
)
def test_packages_that_are_not_there_are_named_with_their_extra(
    package, call, extra, monkeypatch, tmp_path
):
    monkeypatch.setitem(sys.modules, package, None)
    name = package.partition(".")[0]
    with pytest.raises(BackendUnavailable, match=rf"{name}.*pip install 'nsa-neuron\[{extra}\]'"):
        call(tmp_path)


def test_a_look_at_nothing_is_refused():
    with pytest.raises(InvalidArgument, match="'text' is empty; it must be at least one byte"):
        look(model(("nsa",)), b"", [0])


def test_presets_can_be_trained():
    """Every schedule grows, every model has layers, and windows are shorter than the texts."""
    assert set(LAYERS) == set(CONFIGS) == {"tiny", "recall", "small"}
    for name, config in CONFIGS.items():
        assert kinds_of("nsa", LAYERS[name]) == ("nsa",) * LAYERS[name]
        assert (
            LAYERS[name] * config.window < 4096 and config.num_selected * config.select_block < 512
        )
    for how in SCHEDULES.values():
        assert how.shape_at(how.steps - 1)[1] == 4096 and how.shape_at(0) == (how.batch, how.length)
    assert task_of("mqar").pairs == 8


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([1, 1, 0, 0], 2), ([0, 0, 1, 1], 2), ([0, 1, 0, 0], 1), ([1, 1, 1, 1], 4),
        ([0, 0, 0, 0], "empty in some row"), ([1, 0, 1, 1], "padding between tokens"),
        ([1, 0, 1, 0], "padding between tokens"), ([0, 1, 0, 1], "padding between tokens"),
    ],
    ids=str,
)  # fmt: skip
def test_tokens_of_a_padded_row_are_next_to_each_other(row, expected):
    mask = torch.tensor([[1, 1, 1, 0], row]).bool()
    x = torch.arange(8.0).view(2, 4)
    if isinstance(expected, str):
        with pytest.raises(InvalidArgument, match=expected):
            pack(x, mask)
        return
    packed, edges = pack(x, mask)
    assert edges.tolist() == [0, 3, 3 + expected] and edges.dtype == torch.int32
    assert packed[0].tolist() == [0, 1, 2, *(4.0 + i for i in range(4) if row[i])]
    assert torch.equal(unpack(packed, mask), x * mask)
