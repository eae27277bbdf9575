"""Schedules, clipping, seeds, batches and scores of training, each against its own arithmetic."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from tiny import config, model

from nsa_neuron.errors import InvalidArgument
from nsa_neuron.nn.checkpoint import RECALL, SHIPPED, load_checkpoint
from nsa_neuron.training import Batch, MultiQueryRecall, Text, TrainConfig, evaluate, loop, train
from nsa_neuron.training.corpus import _piece, corpus_of
from nsa_neuron.training.optimizers import optimizers_of
from nsa_neuron.training.presets import CONFIGS, SCHEDULES, kinds_of
from nsa_neuron.training.tasks import without_capitals

CORPUS = corpus_of(
    a=[bytes([97 + i % 26]) * 40 for i in range(60)],
    b=[bytes([48 + i % 10]) * 40 for i in range(60)],
)
HOW = TrainConfig(steps=10, batch=4, length=24, growth=(), warm_up=4, save_every=100, decay=0.0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_rates_rise_in_equal_steps_and_fall_to_a_tenth():
    """Cosine from 1 to 0.1: 0.55 half way, and 0.55 + 0.45 cos(pi / 4) at a quarter."""
    long = dataclasses.replace(HOW, steps=1000, warm_up=1)
    assert long.share_at(0) == 1
    assert long.share_at(250) == pytest.approx(0.55 + 0.45 / math.sqrt(2))
    assert long.share_at(500) == pytest.approx(0.55)
    assert long.share_at(1000) == pytest.approx(0.1)
    warm = dataclasses.replace(HOW, steps=10**9, warm_up=4)
    assert [warm.share_at(i) for i in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1, 1])


def test_longer_sequences_come_in_fewer_rows_from_their_step_on():
    grown = dataclasses.replace(HOW, steps=100, growth=((0.0, 30), (0.25, 48), (0.5, 1000)))
    at = {step: grown.shape_at(step) for step in (0, 24, 25, 49, 50)}
    assert at == {0: (3, 30), 24: (3, 30), 25: (2, 48), 49: (2, 48), 50: (1, 1000)}
    assert dataclasses.replace(HOW, growth=((0.0, 5),)).shape_at(0) == (4, 24)  # never shorter


@pytest.mark.parametrize(
    "change",
    [{"warm_up": 0}, {"save_every": 0}, {"rate": math.inf}, {"clip": 0.0}, {"muon": math.inf},
     {"seed": -(2**63) - 1}, {"growth": ((-0.1, 9),)}, {"length": 0}],
    ids=str,
)  # fmt: skip
def test_schedules_beyond_their_limits(change):
    with pytest.raises(InvalidArgument) as caught:
        dataclasses.replace(HOW, **change)
    assert caught.value.argument == next(iter(change))


@pytest.mark.parametrize(
    "change",
    [{"steps": 1}, {"batch": 1}, {"length": 2}, {"warm_up": 1}, {"save_every": 1}, {"muon": 0.0},
     {"seed": -(2**63)}, {"seed": 2**63 - 1}, {"growth": ((0.0, 1),)}],
    ids=str,
)  # fmt: skip
def test_schedules_at_their_limits(change):
    made = dataclasses.replace(HOW, **change)
    assert {name: getattr(made, name) for name in change} == change


class Spy(Text):
    """Remembers what it was asked for and gave."""

    given: list = []  # noqa: RUF012

    def batch(self, batch, length, generator):
        found = super().batch(batch, length, generator)
        self.given.append((batch, length, found.tokens.clone()))
        return found


def run(folder, how=HOW, **more):
    Spy.given.clear()
    net = train(config(), ("nsa",), Spy(CORPUS), how, folder, **more)
    return net, list(Spy.given)


def test_batches_depend_on_the_seed_and_the_step(tmp_path):
    how = dataclasses.replace(HOW, steps=3)
    _, first = run(tmp_path / "a", how)
    _, again = run(tmp_path / "b", dataclasses.replace(how, rate=1e-4))
    _, other = run(tmp_path / "c", dataclasses.replace(how, seed=1))
    for x, y, z in zip(first, again, other, strict=True):
        assert torch.equal(x[2], y[2]) and not torch.equal(x[2], z[2])
    assert not torch.equal(first[0][2], first[1][2])
    expected = CORPUS.sample(4, 24, generator(1_000_003 + 2))
    assert torch.equal(other[2][2], expected)


def test_each_optimizer_has_its_own_rate_at_each_step(tmp_path, monkeypatch):
    seen = []
    make = loop.optimizers_of

    def spied(*args):
        found = make(*args)
        for optimizer in found:
            step = optimizer.step

            def wrapped(step=step, optimizer=optimizer):
                rates = [group["lr"] for group in optimizer.param_groups]
                seen.append((type(optimizer).__name__, rates))
                step()

            optimizer.step = wrapped
        return found

    monkeypatch.setattr(loop, "optimizers_of", spied)
    how = dataclasses.replace(HOW, steps=2, rate=0.5, muon=0.125, warm_up=2)
    run(tmp_path, how)
    assert [name for name, _ in seen] == ["AdamW", "Muon"] * 2
    for i, (_, rates) in enumerate(seen):
        share = (0.5, 0.55)[i // 2]  # of the first and the second of two steps
        assert rates == pytest.approx([(0.5, 0.125)[i % 2] * share] * len(rates))


def test_gradients_are_clipped_to_their_largest_norm(tmp_path, monkeypatch):
    norms = []

    def optimizer_of(net, *_):
        class Watch(torch.optim.SGD):
            def step(self):
                squares = [p.grad.square().sum() for p in net.parameters()]
                norms.append(float(torch.stack(squares).sum().sqrt()))

        return [Watch(net.parameters(), lr=0.1)]

    monkeypatch.setattr(loop, "optimizers_of", optimizer_of)
    run(tmp_path / "a", dataclasses.replace(HOW, steps=2, clip=1e-3))
    assert norms == pytest.approx([1e-3] * 2, rel=1e-2)
    norms.clear()
    run(tmp_path / "b", dataclasses.replace(HOW, steps=2, clip=1e6))
    assert all(1e-2 < norm < 1e3 for norm in norms)


def test_the_log_and_the_notes_count_bytes_and_steps(tmp_path):
    how = dataclasses.replace(HOW, steps=4, growth=((0.5, 48),), save_every=3)
    told = []
    run(tmp_path / "a", how, report=lambda step, loss: told.append((step, loss)), until=3)
    rows = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").open()]
    assert [row["step"] for row in rows] == [0, 1, 2] == [step for step, _ in told]
    assert [row["loss"] for row in rows] == [round(loss, 5) for _, loss in told]
    assert [row["bytes"] for row in rows] == [4 * 24, 4 * 24, 2 * 48]
    assert all(row["cpu_seconds"] >= 0 for row in rows)
    _, notes = load_checkpoint(tmp_path / "a" / "model.safetensors")
    assert notes["finished_steps"] == 3 and notes["trained_bytes"] == 3 * 96
    assert notes["how"]["growth"] == [[0.5, 48]]
    path = tmp_path / "a" / "model.safetensors"
    net, _ = run(tmp_path / "b", dataclasses.replace(how, steps=2, growth=()), begin_with=path)
    again, notes = load_checkpoint(tmp_path / "b" / "model.safetensors")
    assert notes["trained_bytes"] == 3 * 96 + 2 * 96
    assert not net.training and not again.training


def test_states_are_saved_when_they_are_due(tmp_path, monkeypatch):
    saved = []
    save = loop._save
    monkeypatch.setattr(loop, "_save", lambda *a: saved.append(a[3]) or save(*a))
    run(tmp_path, dataclasses.replace(HOW, steps=7, save_every=3))
    assert saved == [3, 6, 7]


def counted_loss(logits, tokens, places):
    odds = logits.double().log_softmax(-1)
    return -sum(float(odds[b, t - 1, tokens[b, t]]) for b, t in places) / len(places)


def test_a_loss_is_that_of_the_bytes_that_count():
    logits, tokens = torch.randn(2, 6, 256), torch.randint(256, (2, 6))
    every = [(b, t) for b in range(2) for t in range(1, 6)]
    assert float(loop.loss_of(logits, Batch(tokens))) == pytest.approx(
        counted_loss(logits, tokens, every)
    )
    counted = torch.zeros(2, 6, dtype=torch.bool)
    places = [(0, 2), (0, 5), (1, 1)]
    for b, t in places:
        counted[b, t] = True
    assert float(loop.loss_of(logits, Batch(tokens, counted))) == pytest.approx(
        counted_loss(logits, tokens, places)
    )


class Fixed(torch.nn.Module):
    """Predicts the next letter of the alphabet, with odds of e^3 to 1."""

    def forward(self, tokens):
        return torch.nn.functional.one_hot((tokens + 1) % 256, 256).float() * 3


class Rows:
    """Two texts: a half and a quarter of whose counted bytes are the next letters."""

    def __init__(self, counted):
        self.counted = counted

    def held_out(self, batch, length, generator):
        tokens = torch.tensor([list(b"abxxd"), list(b"axxxx")])
        return Batch(tokens, self.counted)


def test_scores_are_means_over_texts_and_over_bytes():
    right, wrong = math.log(1 + 255 * math.exp(-3)), math.log(math.exp(3) + 255)
    found = evaluate(Fixed(), Rows(None), 2, 5)
    assert found["accuracy"] == 1 / 8  # "b" behind "a" is the only next letter of eight
    assert found["loss"] == pytest.approx(((right + 3 * wrong) / 4 + wrong) / 2, rel=1e-5)
    counted = torch.tensor([[0, 1, 1, 0, 0], [0, 1, 0, 0, 0]]).bool()
    found = evaluate(Fixed(), Rows(counted), 2, 5)
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert found["loss"] == pytest.approx(((right + wrong) / 2 + wrong) / 2, rel=1e-5)


def test_every_piece_of_a_part_may_be_drawn():
    part = torch.arange(7, dtype=torch.uint8)
    gen = generator()
    firsts = {int(_piece(part, 5, gen)[0]) for _ in range(60)}
    assert firsts == {0, 1, 2}
    assert torch.equal(_piece(part, 7, gen), part)


def test_held_out_pieces_reach_from_the_first_to_the_last_byte():
    held = bytes(CORPUS.held_out.tolist())
    pieces = [bytes(row.tolist()) for row in CORPUS.held_out_pieces(4, 20)]
    last = len(held) - 20
    assert pieces == [held[at : at + 20] for at in (0, last // 3, 2 * last // 3, last)]
    assert bytes(CORPUS.held_out_pieces(1, 20)[0].tolist()) == held[:20]
    assert CORPUS.held_out_pieces(1, len(held)).shape == (1, len(held))


def test_one_text_in_twenty_is_held_out_and_texts_are_kept_apart():
    texts = [f"<{i}>".encode() for i in range(41)]
    found = corpus_of(some=texts)
    assert bytes(found.held_out.tolist()) == b"<0>\n\n<20>\n\n<40>"
    left = b"\n\n".join(t for i, t in enumerate(texts) if i not in (0, 20, 40))
    assert bytes(found.parts["some"].tolist()) == left


def test_capitals_become_small_and_nothing_else_changes():
    text = torch.arange(256)
    assert bytes(without_capitals(text).tolist()) == bytes(range(256)).lower()


def test_answers_and_questions_take_the_room_that_is_said():
    """8 pairs asked twice take 32 bytes; the pairs 16 more and one for odd places."""
    task = MultiQueryRecall(pairs=8, rounds=2, near=3)
    with pytest.raises(InvalidArgument, match="at least 52"):
        task.batch(1, 51, generator())
    found = task.batch(50, 52, generator())
    assert found.tokens.shape == (50, 52)
    assert (found.tokens[:, 17:20] == ord(".")).all()  # near
    first = (found.tokens[:, 0] != ord(".")).float().mean()
    assert 0.2 < float(first) < 0.8  # pairs begin at odd places, too


@pytest.mark.parametrize("muon", [0.0, 0.02])
def test_matrices_of_blocks_are_muon_s_and_only_matrices_decay(muon):
    net = model(("nsa", "full"), torch.float32, phi="mlp")
    names = {id(p): name for name, p in net.named_parameters()}
    found = optimizers_of(net, 0.1, muon, 0.25)
    groups = [
        ([names[id(p)] for p in g["params"]], g["weight_decay"], g["lr"])
        for o in found for g in o.param_groups
    ]  # fmt: skip
    assert found[0].defaults["betas"] == (0.9, 0.95)
    rest, flat = groups[0], groups[1]
    assert (rest[1:], flat[1:]) == ((0.25, 0.1), (0.0, 0.1))
    assert all(n.endswith("bias") or "norm" in n or n[-2:] in ("b1", "b2") for n in flat[0])
    if muon:
        (matrices, decay, rate) = groups[2]
        assert (decay, rate) == (0.25, 0.02) and found[1].param_groups[0]["momentum"] == 0.95
        parts = ("q.weight", "kv.weight", "gate.weight", "out.weight", "up.weight", "down.weight")
        assert {n.partition(".attention.")[2] or n[9:] for n in matrices} == set(parts)
        assert all(".phi_" in n or n.startswith(("embedding", "head")) for n in rest[0])


@pytest.mark.parametrize("names", ["nsa,full,window", "", "nsa,", "sparse"])
def test_kinds_that_are_none_or_too_many(names):
    with pytest.raises(InvalidArgument, match="one or 2 of nsa, full, window"):
        kinds_of(names, 2)
    assert kinds_of("window", 3) == ("window",) * 3


def stages(path):
    """How the runs went that a shipped model comes from, the last one first, and its config."""
    net, notes = load_checkpoint(path)
    found = []
    while "growth" in notes.get("how", {}):  # older runs had other options
        growth = tuple(tuple(pair) for pair in notes["how"]["growth"])
        found.append(TrainConfig(**{**notes["how"], "growth": growth}))
        notes = notes.get("begun_with", {})
    return net.config, found


def test_presets_are_what_the_shipped_models_were_trained_by():
    """A preset that changed would be told as the way to models that came another way."""
    config_, found = stages(RECALL)
    assert config_ == CONFIGS["recall"]
    assert found[2:] == [SCHEDULES["needle"], SCHEDULES["mqar"]]
    config_, found = stages(SHIPPED)
    assert config_ == dataclasses.replace(CONFIGS["small"], kv_heads=1)
    assert found[3] == dataclasses.replace(SCHEDULES["prose"], seed=5, save_every=25)
    tiny = dataclasses.replace(CONFIGS["small"], dim=32, heads=2, kv_heads=1, dk=16, dv=16)
    assert tiny == CONFIGS["tiny"]
