"""`nsa plan`: its bytes are those that gloo sends, and it says that it is modelled."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nsa_neuron.cli import main
from nsa_neuron.distributed import counting, shard_tokens, sharded_loss
from nsa_neuron.distributed.parallelism import Parallelism, parallelize
from nsa_neuron.distributed.plan import model as plan
from nsa_neuron.distributed.plan.machines import H200, TRN2
from nsa_neuron.nn import ByteLanguageModel, NsaConfig

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"
SMALL = plan.Problem(
    tokens=2048, layers=2, dim=32, hidden=128, vocabulary=256, heads=4, kv_heads=2, dk=8, dv=8
)


class Sent(TorchDispatchMode):
    """Bytes of what collectives take, by their name."""

    def __init__(self):
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.__name__:
            name = func.__name__.split(".")[0].strip("_").removesuffix("_")
            given = args[1] if name in ("allgather_base", "reduce_scatter_base") else args[0]
            tensors = [x for x in tree_leaves(given) if isinstance(x, torch.Tensor)]
            self.bytes[name] += sum(x.numel() * x.element_size() for x in tensors)
        return func(*args, **(kwargs or {}))


def measured(shape):
    """Bytes of one training step of a mesh (dp, cp, tp), by axis."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "cp", "tp"))
    torch.manual_seed(0)
    p = SMALL
    config = NsaConfig(dim=p.dim, heads=p.heads, kv_heads=p.kv_heads, dk=p.dk, dv=p.dv, phi="mean")
    net = parallelize(
        ByteLanguageModel(config, p.layers), mesh, fetch="gather", replay=True, sequence=True,
        whole_logits=False,
    )  # fmt: skip
    tokens = torch.randint(0, 256, (1, p.tokens))
    own, targets = shard_tokens(tokens, mesh["cp"])
    collectives = Sent()
    with counting() as sent, collectives:
        ranks = shape[0] * shape[1]
        sharded_loss(net(own), targets, ranks, p.tokens - 1, mesh["tp"]).backward()
    return {k: n for k, n in sent.items() if k != "agree"}, dict(collectives.bytes)


@pytest.mark.parametrize("world", [2, 4])
def test_context_parallel_bytes_are_what_is_sent(two, four, world):
    found = (two if world == 2 else four)(measured, (1, world, 1))
    per_rank = [
        plan.training(
            plan.Sizes(world, 2048 // world, 32, 16, 512, 2 * 16 * plan.WORD), rank, plan.REPLAYS
        )
        for rank in range(world)
    ]
    assert sum(sum(sent.values()) for sent, _ in found) == 2 * sum(per_rank)
    mesh = Parallelism(cp=world)
    assert plan.estimate(SMALL, mesh, TRN2).sent["cp"] * 2 == 2 * per_rank[-1]


@pytest.mark.parametrize("world", [2, 4])
def test_sharded_parameters_bytes_are_what_is_sent(two, four, world):
    """Parameters are gathered in float32 here, which the plan does in bfloat16."""
    _, found = (two if world == 2 else four)(measured, (world, 1, 1))[0]
    weights = ByteLanguageModel(
        NsaConfig(dim=32, heads=4, kv_heads=2, dk=8, dv=8, phi="mean"), 2
    ).state_dict()
    whole = sum(x.numel() for x in weights.values())
    ends = sum(weights[name].numel() for name in ("embedding.weight", "head.weight", "norm.weight"))
    assert found["allgather_base"] * world == 4 * (2 * whole - ends)
    assert found["reduce_scatter_base"] == 4 * whole
    # The plan's model has other perceptrons, so its rule is checked on its own count.
    p, mesh = SMALL, Parallelism(dp=world)
    planned = plan.estimate(dataclasses.replace(p, batch=world), mesh, TRN2).sent["dp"]
    ends = 2 * p.vocabulary * p.dim
    rule = 2 * (2 * p.parameters - ends) + 4 * p.parameters
    assert planned == rule * (world - 1) / world


def test_tensor_parallel_bytes_are_what_is_sent(two):
    _, found = two(measured, (1, 1, 2))[0]
    planned = plan.estimate(SMALL, Parallelism(tp=2), TRN2).sent["tp"] * 2  # float32 here
    # Of a ring of two: sums send the whole, gathers their own part, scatters half of the whole.
    moved = found["all_gather_into_tensor"] + found["reduce_scatter_tensor"] / 2
    assert moved + found["all_reduce"] == pytest.approx(planned, rel=0.02)


def numbers_of_the_page():
    """Rows of the page's tables: target, devices, batch, mesh, whether it is the best, numbers."""
    target, bold = "", ""
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if re.fullmatch(r"\**\d+ x \d+ x \d+ x \d+\**", cells[min(1, len(cells) - 1)]) is None:
            continue
        mesh = Parallelism(*map(int, cells[1].strip("*").split(" x ")))
        if cells[0].isdigit():
            yield TRN2, int(cells[0]), 16, mesh, True, [float(x) for x in cells[2:4]]
        else:
            target, bold = cells[0] or target, cells[1].startswith("**")
            machine = {"Trn2 chips": TRN2, "H200s": H200}[target]
            yield machine, 64, 1, mesh, bold, [float(cells[2]), float(cells[6])]


def test_the_page_shows_what_the_plan_says():
    rows = list(numbers_of_the_page())
    assert len(rows) == 15
    for machine, devices, batch, mesh, is_best, (memory, seconds) in rows:
        problem = plan.Problem(tokens=2**20, batch=batch)
        found = plan.estimate(problem, mesh, machine)
        assert sum(found.memory.values()) / 1e9 == pytest.approx(memory, rel=0.05), mesh
        assert found.total == pytest.approx(seconds, rel=0.01), mesh
        if is_best:
            assert plan.best(problem, devices, machine)[0].mesh == mesh


def test_meshes_divide_and_the_best_fits():
    problem = plan.Problem(tokens=2**20)
    found = plan.best(problem, 64, TRN2)
    assert all(e.mesh.ranks == 64 for e in found) and found[0].fits
    assert found[0].total == min(e.total for e in found if e.fits)
    near = plan.neighbours(found[0], found)
    assert near and all(e in found and e is not found[0] for e in near)
    assert not plan.best(problem, 1, TRN2)[0].fits


def test_more_devices_are_faster_and_need_less_memory():
    problem = plan.Problem(tokens=2**20, batch=4)
    chosen = [plan.best(problem, n, H200)[0] for n in (64, 128, 256)]
    times = [e.total for e in chosen]
    assert times == sorted(times, reverse=True)
    states = [sum(e.memory.values()) for e in chosen]
    assert states[0] > states[-1]


def test_operations_are_the_specs(capsys):
    whole = plan.operations("compressed_attention", 4096, 4096, 8, 2, 64, 64)
    halves = [plan.operations("compressed_attention", 2048, t, 8, 2, 64, 64) for t in (2048, 4096)]
    assert sum(halves) == whole and halves[1] > 2 * halves[0]


def test_the_command_says_what_it_is(capsys):
    assert main(["plan", "--tokens", "64K", "--layers", "4", "--devices", "16..64"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("MODELLED, not measured") and "trn2-arch.rst" in out
    assert [f"{n} devices" in out for n in (16, 32, 64, 128)] == [True, True, True, False]
    assert main(["plan", "--target", "h200", "--devices", "8", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["modelled"] is True and data["problem"] == dataclasses.asdict(plan.Problem(2**20))
    assert data["plans"][0]["meshes"][0]["seconds_per_step"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--devices", "7"], "divides this model"), (["--devices", "many"], "no number")],
)
def test_bad_numbers_are_refused(capsys, words, message):
    assert main(["plan", *words]) == 2
    assert message in capsys.readouterr().err
