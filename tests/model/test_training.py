"""Training at a tiny scale: tasks, resuming to the bit, checkpoints that are whole or refused."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
from tiny import config, model

from nsa_neuron.cli import main
from nsa_neuron.errors import InvalidArgument, NsaError, StateMismatch
from nsa_neuron.nn import generate
from nsa_neuron.nn.checkpoint import load_checkpoint, read_tensors, save_checkpoint, write_tensors
from nsa_neuron.training import (
    MultiQueryRecall,
    Text,
    TrainConfig,
    evaluate,
    train,
)
from nsa_neuron.training.corpus import corpus_of, docstrings, prose_corpus, python_corpus
from nsa_neuron.training.optimizers import optimizers_of
from nsa_neuron.training.presets import CONFIGS, SCHEDULES, TASKS, kinds_of, task_of

TEXTS = [f"text number {i} says that {i} is {i * i}. ".encode() * 30 for i in range(40)]
CORPUS = corpus_of(plain=TEXTS[:30], other=TEXTS[30:])
HOW = TrainConfig(steps=8, batch=2, length=48, growth=((0.75, 96),), warm_up=2, save_every=3)


def run(folder, how=HOW, until=None, kinds=("nsa", "window"), task=None):
    return train(config(), kinds, task or Text(CORPUS), how, folder, until=until)


def weights(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def test_a_stopped_run_ends_where_an_unbroken_one_does(tmp_path):
    whole = run(tmp_path / "whole")
    run(tmp_path / "parts", until=2)
    run(tmp_path / "parts", until=5)
    parts = run(tmp_path / "parts")
    assert torch.equal(weights(whole), weights(parts))
    logs = [
        [(row["step"], row["loss"]) for row in map(json.loads, path.open())]
        for path in (tmp_path / "whole" / "log.jsonl", tmp_path / "parts" / "log.jsonl")
    ]
    assert logs[0] == logs[1] and len(logs[0]) == HOW.steps


def test_lines_of_lost_steps_are_dropped_when_a_killed_run_goes_on(tmp_path):
    run(tmp_path, until=3)
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 3, "loss": 9.9}\n')
    run(tmp_path)
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").open()]
    assert steps == list(range(HOW.steps))


def test_a_folder_of_another_run_is_refused(tmp_path):
    run(tmp_path, until=1)
    before = (tmp_path / "training.safetensors").read_bytes()
    with pytest.raises(StateMismatch, match="its how differ"):
        run(tmp_path, dataclasses.replace(HOW, seed=1))
    with pytest.raises(StateMismatch, match="its kinds differ"):
        run(tmp_path, kinds=("nsa", "full"))
    assert (tmp_path / "training.safetensors").read_bytes() == before


def test_a_run_that_begins_with_a_checkpoint(tmp_path):
    run(tmp_path / "first", until=2)
    path = tmp_path / "first" / "model.safetensors"
    first, _ = load_checkpoint(path)
    how = dataclasses.replace(HOW, rate=1e-12, muon=1e-12, decay=0.0)
    parts = (config(), ("nsa", "window"), Text(CORPUS), how, tmp_path / "second")
    second = train(*parts, begin_with=path)
    torch.testing.assert_close(weights(second), weights(first))
    _, notes = load_checkpoint(tmp_path / "second" / "model.safetensors")
    assert notes["begun_with"]["finished_steps"] == 2 and notes["finished_steps"] == HOW.steps
    with pytest.raises(StateMismatch, match="another configuration"):
        train(config(), ("full", "window"), *parts[2:4], tmp_path / "third", begin_with=path)


def test_the_schedule():
    shares = [HOW.share_at(step) for step in range(HOW.steps)]
    assert max(shares) <= 1 and shares[0] == 0.5 and shares[-1] < 0.2
    grown = dataclasses.replace(HOW, growth=((0.5, 96), (0.75, 200)))
    assert [grown.shape_at(step) for step in (0, 3, 4, 5, 6)] == [(2, 48)] * 2 + [(1, 96)] * 2 + [
        (1, 200)
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"rate": 0.0},
        {"batch": -1},
        {"length": 1},
        {"seed": 2**63},
        {"clip": float("nan")},
        {"muon": -1.0},
        {"growth": ((0.5, 96), (0.2, 200))},
        {"growth": ((0.5, 0),)},
    ],
)
def test_bad_schedules(change):
    with pytest.raises(InvalidArgument) as caught:
        dataclasses.replace(HOW, **change)
    assert caught.value.argument == next(iter(change))


def test_a_diverging_run_says_so(tmp_path):
    with pytest.raises(NsaError, match="lower the learning rate"):
        run(tmp_path, dataclasses.replace(HOW, rate=1e30))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("corpus", [None, CORPUS], ids=["dots", "text"])
def test_recall_batches_can_be_solved_by_lookup_only_across_the_filler(corpus):
    task, starts = MultiQueryRecall(pairs=6, rounds=2, near=20, corpus=corpus), set()
    for batch in (task.batch(8, 120, generator()), task.held_out(3, 120, generator())):
        for row, flags in zip(batch.tokens, batch.counted, strict=True):
            text = bytes(row.tolist())
            known = dict(re.findall(rb"([A-M])([N-Z])", text[:76]))
            assert len(known) == 6 and not re.search(rb"[A-Z]", text[76:96])
            asked = re.findall(rb"([A-M])([N-Z])", text[96:])
            assert asked[:6] != asked[6:] and set(asked[:6]) == set(asked[6:]) == set(known.items())
            assert flags.nonzero().flatten().tolist() == list(range(97, 120, 2))
            starts.add(next(re.finditer(rb"[A-Z]", text)).start() % 2)
            assert corpus or text[:96].count(b".") == 84
    assert starts == {0, 1}


@pytest.mark.parametrize("muon", [0.0, 0.02])
def test_every_parameter_is_trained_by_one_optimizer(muon):
    net = model(("nsa", "full"), torch.float32)
    found = optimizers_of(net, HOW.rate, muon, HOW.decay)
    held = [id(p) for o in found for group in o.param_groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, net.parameters()))
    assert [type(o).__name__ for o in found] == ["AdamW", "Muon"][: 1 + bool(muon)]


@pytest.mark.parametrize(
    "task",
    [MultiQueryRecall(pairs=30), MultiQueryRecall(corpus=CORPUS, near=60)],
    ids=["dots", "text"],
)
def test_tasks_refuse_what_does_not_fit(task):
    with pytest.raises(InvalidArgument):
        task.batch(1, 100, generator())
    with pytest.raises(InvalidArgument, match="longer than"):
        Text(CORPUS).batch(1, 10**6, generator())
    with pytest.raises(InvalidArgument, match="held out"):
        Text(CORPUS).held_out(1, 10**6, generator())


def test_held_out_texts_are_not_trained_on():
    held = bytes(CORPUS.held_out.tolist())
    for part in CORPUS.parts.values():
        assert b"number 0 " not in bytes(part.tolist())
    assert b"number 0 " in held and b"number 20 " in held and b"number 30 " in held


def test_the_real_corpus():
    corpus = python_corpus()
    assert len(corpus.parts["topics"]) > 300_000 and len(corpus.parts["source"]) > 3_000_000


def test_more_prose_without_what_is_held_out():
    """Docstrings of files that are held out are not trained on either."""
    usual, prose = python_corpus(), prose_corpus()
    assert torch.equal(prose.held_out, usual.held_out)
    assert prose.parts["source"] is usual.parts["source"]
    known = bytes(prose.parts["docstrings"].tolist())
    source = bytes(usual.parts["source"].tolist()).decode(errors="replace")
    assert 10**6 < len(known) < len(source) / 4
    held = bytes(usual.held_out.tolist()).decode(errors="replace")
    samples = [text.splitlines()[0] for text in known.decode().split("\n\n")[:2000] if text]
    assert sum(line in source for line in samples) > 0.95 * len(samples)
    only_held = [line for line in samples if line in held and line not in source]
    assert not only_held


def test_docstrings_of_a_file():
    source = f'"""{"m" * 60}"""\ndef f():\n    """{"a" * 59}\n    b"""\ndef g():\n    """short"""\n'
    assert docstrings(source.encode()) == ["m" * 60, "a" * 59 + "\nb"]


def test_a_batch_smaller_than_the_parts_begins_with_any():
    corpus = corpus_of(a=[b"a" * 50] * 2, b=[b"b" * 50] * 2)
    drawn = [corpus.sample(1, 4, generator(seed))[0, 0].item() for seed in range(20)]
    assert set(drawn) == {ord("a"), ord("b")}
    assert corpus.sample(3, 1, generator())[:, 0].tolist() == [97, 98, 97]


def test_evaluation_counts_what_counts():
    class Copies(torch.nn.Module):
        """Predicts that every byte comes again."""

        def forward(self, tokens):
            return torch.nn.functional.one_hot(tokens, 256).float() * 50

    task = Text(corpus_of(same=[b"a" * 100] * 2))
    assert evaluate(Copies(), task, 2, 20) == {"loss": pytest.approx(0, abs=1e-6), "accuracy": 1.0}
    assert evaluate(Copies(), MultiQueryRecall(), 2, 80)["accuracy"] == 0.0


def test_checkpoints_survive(tmp_path):
    net = model(("nsa", "full"), torch.float32, phi="linear", shared_kv=True)
    save_checkpoint(net, tmp_path / "deep" / "m.safetensors", {"steps": 3})
    again, notes = load_checkpoint(tmp_path / "deep" / "m.safetensors")
    assert notes == {"steps": 3} and again.config == net.config and again.kinds == net.kinds
    assert generate(again, [b"hello"], 5) == generate(net, [b"hello"], 5)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["m.safetensors"]


def test_damaged_checkpoints_are_refused(tmp_path):
    good = tmp_path / "m.safetensors"
    save_checkpoint(model(("nsa",), torch.float32), good)
    raw, (tensors, about) = good.read_bytes(), read_tensors(good)
    cases = {
        "cut off": raw[: len(raw) // 2],
        "empty": b"",
        "text": b"hello",
    }
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
    write_tensors(tmp_path / "newer", tensors, {**about, "format": 99})
    write_tensors(tmp_path / "less", {k: tensors[k] for k in list(tensors)[1:]}, about)
    other = {**about, "config": {**about["config"], "dim": 32}}
    write_tensors(tmp_path / "other", tensors, other)
    write_tensors(tmp_path / "bad", tensors, {**about, "config": {"dim": 32}})
    write_tensors(tmp_path / "list", tensors, [about])
    for name in (*cases, "newer", "less", "other", "bad", "list", "absent"):
        with pytest.raises(StateMismatch, match=name):
            load_checkpoint(tmp_path / name)


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "m.safetensors"
    save_checkpoint(model(("nsa",), torch.float32), path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_tensors(path, {}, {"not": object()})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


RUNS = ("run", "more")


def test_commands(tmp_path, capsysbinary):
    words = [str(tmp_path / "run"), "--preset", "tiny", "--task", "mqar", "--steps", "2"]
    words += ["--batch", "2", "--length", "128"]
    assert main(["train", *words, "--json"]) == 0
    found = json.loads(capsysbinary.readouterr().out)
    assert found["kinds"] == ["nsa", "nsa"] and 0 <= found["accuracy"] <= 1
    path = str(tmp_path / "run" / "model.safetensors")
    more = [str(tmp_path / "more"), "--begin-with", path, *words[3:], "--json"]
    assert main(["train", *more]) == 0
    assert json.loads(capsysbinary.readouterr().out)["kinds"] == ["nsa", "nsa"]
    first, second = (load_checkpoint(tmp_path / run / "model.safetensors")[0] for run in RUNS)
    assert second.config == first.config == CONFIGS["tiny"]
    assert main(["generate", path, "abc", "--bytes", "7", "--temperature", "1"]) == 0
    assert len(capsysbinary.readouterr().out) == 8
    assert main(["generate", path, "", "--bytes", "7"]) == 2
    assert b"'prompts' is empty" in capsysbinary.readouterr().err
    assert main(["generate", str(tmp_path / "none"), "abc"]) == 2
    assert main(["train", *words, "--attention", "nsa,sparse"]) == 2


def test_presets():
    assert set(TASKS) == set(SCHEDULES) == {"text", "prose", "mqar", "needle"}
    assert kinds_of("nsa,full", 2) == ("nsa", "full")
    assert task_of("mqar") == MultiQueryRecall()
