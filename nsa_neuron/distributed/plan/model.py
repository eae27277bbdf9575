"""What one training step of one mesh costs: counted memory and bytes, modelled time.

Bytes of context parallelism are `wire.py`'s formulas, which the tests compare with what gloo sends.
Collectives are rings: a rank sends (n - 1) / n of the whole. Times of the slowest rank count: with
contiguous shards that is the one with the last tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from nsa_neuron.distributed.parallelism import Parallelism
from nsa_neuron.distributed.plan.machines import REFERENCE, Machine
from nsa_neuron.distributed.wire import Sizes, training
from nsa_neuron.ops import get
from nsa_neuron.ops.common import compressed_blocks

HALF, WORD = 2, 4  # bytes of bfloat16 and float32
STATE = 4 * WORD  # bytes of a parameter's master copy, two moments and gradient
REPLAYS = 1  # forward passes that activation checkpointing adds
FREE = 0.9  # of a device's memory: the rest is for buffers and fragments
STAGES = (
    "compress", "compressed_attention", "select_blocks", "selected_attention",
    "sliding_window_attention", "gated_sum",
)  # fmt: skip
ASSUMED = (
    "assumed: context parallelism overlaps attention, sharded parameters overlap products, tensor "
    "parallelism nothing; the last rank's contiguous shard sets the pace; collectives are rings; a "
    "pipeline's microbatch is a sequence; tensor-parallel ranks share the tokens of states between "
    "layers, and the vocabulary of logits",
)
DENSE = ("select_blocks",)  # without a backward pass
GEOMETRY = {
    "block": 32, "stride": 16, "select_block": 64, "num_selected": 16, "num_initial": 1,
    "num_local": 2, "window": 512,
}  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """A model and a training step.

    Attributes:
        tokens: of a sequence. batch: sequences of a step.
        layers, dim, hidden, vocabulary: of the model; its perceptrons have three matrices.
        heads, kv_heads, dk, dv: of attention, with the paper's blocks (32, 16, 64, 16, 512).
        microbatches: of a pipeline, per data-parallel rank; 0: its sequences one by one.
    """

    tokens: int
    batch: int = 1
    layers: int = 32
    dim: int = 4096
    hidden: int = 11008
    vocabulary: int = 128_256
    heads: int = 64
    kv_heads: int = 4
    dk: int = 192
    dv: int = 128

    @property
    def block_parameters(self) -> int:
        """Of one layer; three sets of keys and values."""
        d, h = self.dim, self.heads
        attention = d * (h * self.dk + 3 * self.kv_heads * (self.dk + self.dv) + 3 * h)
        return attention + h * self.dv * d + 3 * d * self.hidden

    @property
    def parameters(self) -> int:
        """Of the model, with an embedding and a head."""
        return self.layers * self.block_parameters + 2 * self.vocabulary * self.dim


@dataclass
class Estimate:
    """One mesh.

    Attributes:
        mesh: how the devices are used.
        memory: bytes per device, by what holds them.
        sent: bytes that a device sends in a step, by axis.
        seconds: of a step, by what takes them; overlapped communication counts beyond compute.
        fits: whether the memory suffices.
    """

    mesh: Parallelism
    memory: dict[str, float] = field(default_factory=dict)
    sent: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    fits: bool = True

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())

    @property
    def bound(self) -> str:
        """What takes most of them."""
        return max(self.seconds, key=lambda name: self.seconds[name])


def estimate(problem: Problem, mesh: Parallelism, machine: Machine) -> Estimate:
    """Memory, bytes and time of a step, with every block run again in the backward pass."""
    found = Estimate(mesh)
    found.memory = _memory(problem, mesh)
    found.fits = sum(found.memory.values()) <= FREE * machine.memory
    found.sent = _sent(problem, mesh)
    found.seconds = _seconds(problem, mesh, machine, found.sent)
    return found


def _share(problem: Problem, mesh: Parallelism) -> tuple[int, float, int]:
    """Tokens and layers of a rank, and its kv heads."""
    kv = max(1, problem.kv_heads // mesh.tp)
    return problem.tokens // mesh.cp, problem.layers / mesh.pp, kv


def _memory(problem: Problem, mesh: Parallelism) -> dict[str, float]:
    tokens, layers, kv = _share(problem, mesh)
    row = kv * (problem.dk + problem.dv) * HALF
    local = problem.parameters / (mesh.tp * mesh.pp)
    block = problem.block_parameters / mesh.tp
    waiting = min(mesh.pp, problem.batch // mesh.dp)
    heads = max(1, problem.heads // mesh.tp)
    states = 2 * problem.dim + 4 * problem.dim / mesh.tp  # two are gathered, the others by tokens
    wide = heads * (problem.dk + 4 * problem.dv) + 3 * problem.hidden / mesh.tp + states
    blocks = compressed_blocks(problem.tokens, GEOMETRY["block"], GEOMETRY["stride"])
    one_head = problem.tokens * (problem.dk + problem.dv)
    gathered = (2 * HALF + HALF + WORD) * one_head if mesh.cp > 1 else 0
    return {
        "parameters and optimizer": STATE * local / (mesh.dp * mesh.cp),
        "gathered parameters": 2 * HALF * block if mesh.dp * mesh.cp > 1 else HALF * local,
        "kept states": tokens * problem.dim * HALF * layers * waiting / mesh.tp,
        "one block": tokens * wide * HALF * 2 + 3 * tokens * row * 2 + 2 * blocks * row,
        "one head's gathered keys": gathered,
        "logits": tokens * problem.vocabulary * (HALF + WORD) / mesh.tp,
    }


def _sent(problem: Problem, mesh: Parallelism) -> dict[str, float]:
    tokens, layers, kv = _share(problem, mesh)
    sequences = problem.batch / mesh.dp
    row = kv * (problem.dk + problem.dv) * HALF
    sizes = Sizes(mesh.cp, tokens, GEOMETRY["block"], GEOMETRY["stride"], GEOMETRY["window"], row)
    states = tokens * problem.dim * HALF
    group = mesh.dp * mesh.cp
    local = problem.parameters / (mesh.tp * mesh.pp)
    # Blocks are gathered for the forward and the backward pass, embedding and head once; gradients
    # are scattered in float32.
    ends = 2 * problem.vocabulary * problem.dim / (mesh.tp * mesh.pp)
    sharded = (HALF * (2 * local - ends) + WORD * local) * (group - 1) / group
    # States are gathered before attention and perceptron and scattered behind them; a block run
    # again stops before its last scatter; the backward pass does the same the other way round.
    # Embedding and head do one of each; of a token's logits three numbers are summed, in float32.
    moved = states * ((4 + 3 * REPLAYS + 4) * layers + 4 / mesh.pp)
    logits = 3 * 2 * tokens * WORD / mesh.pp
    return {
        "cp": training(sizes, mesh.cp - 1, REPLAYS) * layers * sequences,
        "tp": (moved + logits) * (mesh.tp - 1) / mesh.tp * sequences,
        "dp": sharded,
        "pp": 2 * states * sequences if mesh.pp > 1 else 0.0,
    }


def _seconds(
    problem: Problem, mesh: Parallelism, machine: Machine, sent: dict[str, float]
) -> dict[str, float]:
    tokens, layers, _ = _share(problem, mesh)
    sequences = problem.batch / mesh.dp
    dense = problem.block_parameters * layers + problem.vocabulary * problem.dim / mesh.pp
    products = 8 * tokens * sequences * dense / mesh.tp / (machine.flops * machine.matmul)
    attention = _attention(problem, mesh, machine) * layers * sequences
    spans = {
        "tp": mesh.tp, "cp": mesh.tp * mesh.cp, "dp": mesh.tp * mesh.cp * mesh.dp, "pp": 2**30
    }  # fmt: skip
    spans["pp"] = mesh.ranks if mesh.pp > 1 else 1
    messages = {
        "tp": (8 + 3 * REPLAYS) * layers * sequences, "cp": 4 * layers * sequences * mesh.cp,
        "dp": 3 * layers, "pp": 2 * sequences,
    }  # fmt: skip
    sizes = {"tp": mesh.tp, "cp": mesh.cp, "dp": mesh.dp * mesh.cp, "pp": mesh.pp}
    links = {
        axis: sent[axis] / machine.link(spans[axis]).bandwidth
        + messages[axis] * machine.link(spans[axis]).latency
        if sizes[axis] > 1
        else 0.0
        for axis in sent
    }
    compute = products + attention
    bubble = (compute + links["tp"]) * (mesh.pp - 1) / max(1.0, sequences)
    return {
        "products": products,
        "attention": attention,
        "tensor parallel": links["tp"],
        "context parallel, beyond attention": max(0.0, links["cp"] - attention),
        "sharded parameters, beyond products": max(0.0, links["dp"] - products),
        "pipeline": bubble + links["pp"],
    }


def _attention(problem: Problem, mesh: Parallelism, machine: Machine) -> float:
    """Seconds of one layer's attention on the last rank: forward, again, backward."""
    tokens = problem.tokens // mesh.cp
    heads, kv = problem.heads // mesh.tp, max(1, problem.kv_heads // mesh.tp)
    sizes = {
        "S": tokens, "T": problem.tokens, "Hq": heads, "Hkv": kv, "Dk": problem.dk, "Dv": problem.dv
    }  # fmt: skip
    total = 0.0
    for stage in STAGES:
        own = dict(sizes)
        if stage == "compress":
            own["T"] = tokens  # each rank compresses its own blocks
        if stage == "select_blocks" and mesh.tp > problem.kv_heads:
            own["Hq"] = problem.heads // problem.kv_heads  # for the whole group
        ratio = operations(stage, **own) / operations(stage, **REFERENCE)
        times = 2 if stage == "compress" else 1  # keys and values
        back = machine.backward.get(stage)
        if back is None:
            back = 0.0 if stage in DENSE else machine.forward[stage] * _backward_ratio(stage)
        total += times * ratio * (2 * machine.forward[stage] + back) / 1e3 / machine.units
    return total


def _backward_ratio(stage: str) -> float:
    return operations(f"{stage}_backward", **REFERENCE) / operations(stage, **REFERENCE)


@cache
def operations(op: str, S: int, T: int, Hq: int, Hkv: int, Dk: int, Dv: int) -> int:
    """Operations of a call of one sequence, by the op's spec; no memory is used."""
    spec = get(op)
    sizes: dict[str, int] = {"B": 1, "S": S, "T": T, "Hq": Hq, "Hkv": Hkv, "Dk": Dk, "Dv": Dv}
    l, d = GEOMETRY["block"], GEOMETRY["stride"]
    sizes |= {"Nc": int(compressed_blocks(T, l, d)), "n": GEOMETRY["num_selected"], "3": 3}
    sizes |= {"D": Dk, "F": Dk, "lD": l * Dk, "l": l}
    given: dict[str, Any] = {**dict.fromkeys(spec.names), **spec.defaults, **_scalars(spec.names)}
    if "kv_len" in given:
        given["kv_len"] = T
    if "method" in given:
        given["method"] = "mlp"
    for arg in spec.tensors:
        if not arg.optional or arg.name in ("w1", "b1", "w2", "b2"):
            kind = {"i32": torch.int32, "stat": torch.float32}.get(arg.dtype, torch.bfloat16)
            shape = [sizes[symbol] for symbol in arg.forms[0]]
            given[arg.name] = torch.empty(shape, dtype=kind, device="meta")
    return max(1, spec.cost(spec.bind(given)).flops)


def _scalars(names: tuple[str, ...]) -> dict[str, int]:
    return {name: value for name, value in GEOMETRY.items() if name in names}


def meshes(problem: Problem, devices: int) -> list[Parallelism]:
    """All meshes of so many devices that divide the model, its batch and its sequences."""
    found = []
    for pp in divisors(devices):
        for tp in divisors(devices // pp):
            for cp in divisors(devices // pp // tp):
                mesh = Parallelism(pp, devices // pp // tp // cp, cp, tp)
                if _divides(problem, mesh):
                    found.append(mesh)
    return found


def _divides(problem: Problem, mesh: Parallelism) -> bool:
    kv = problem.kv_heads
    heads = problem.heads % mesh.tp == 0 and (kv % mesh.tp == 0 or mesh.tp % kv == 0)
    shard = problem.tokens // mesh.cp
    tokens = problem.tokens % mesh.cp == 0 and shard >= GEOMETRY["window"]
    return (
        heads and tokens and problem.layers % mesh.pp == 0 and problem.batch % mesh.dp == 0
        and problem.hidden % mesh.tp == 0
    )  # fmt: skip


def divisors(number: int) -> list[int]:
    """Ascending."""
    small = [i for i in range(1, math.isqrt(number) + 1) if number % i == 0]
    return sorted({*small, *(number // i for i in small)})


def best(problem: Problem, devices: int, machine: Machine) -> list[Estimate]:
    """Estimates of all meshes: the fastest of those that fit first, then those of least memory."""
    made = [estimate(problem, mesh, machine) for mesh in meshes(problem, devices)]
    return sorted(made, key=lambda e: (not e.fits, e.total if e.fits else sum(e.memory.values())))


def neighbours(chosen: Estimate, found: list[Estimate]) -> list[Estimate]:
    """Those that move one factor between two axes of the chosen mesh."""
    return [e for e in found if e is not chosen and _distance(e.mesh, chosen.mesh) <= 2]


def _distance(a: Parallelism, b: Parallelism) -> float:
    pairs = ((a.pp, b.pp), (a.dp, b.dp), (a.cp, b.cp), (a.tp, b.tp))
    return sum(abs(math.log2(x / y)) for x, y in pairs)
