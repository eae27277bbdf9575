"""Evidence for docs/distributed.md, made on this machine over gloo: data, and a picture.

    python -m tools.distributed_evidence parity     # 100 steps: one rank, CP 2, TP 2, FSDP 2
    python -m tools.distributed_evidence memory     # 64K tokens on one rank and on four
    python -m tools.distributed_evidence overlap    # is communication hidden behind attention?

Writes `docs/data/distributed-<what>.json`, with the machine in it; `parity` also a picture.
Every rank has one thread; memory is the growth of a rank's largest resident size.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from nsa_neuron.distributed import counting, shard_tokens, sharded_loss
from nsa_neuron.distributed.exchange import WAITING
from nsa_neuron.distributed.parallelism import Parallelism, parallelize
from nsa_neuron.distributed.training import How, train
from nsa_neuron.environment import describe
from nsa_neuron.nn import ByteLanguageModel, NsaConfig
from nsa_neuron.training.presets import task_of

ROOT = Path(__file__).parents[1]
MESHES = {
    "one rank": Parallelism(), "CP 2": Parallelism(cp=2), "TP 2": Parallelism(tp=2),
    "FSDP 2": Parallelism(dp=2),
}  # fmt: skip
PARITY = NsaConfig(
    dim=32, heads=4, kv_heads=2, dk=16, dv=16, block=16, stride=8, select_block=32,
    num_selected=4, window=32, phi="linear",
)  # fmt: skip
LONG = NsaConfig(
    dim=64, heads=2, kv_heads=1, dk=32, dv=32, block=64, stride=64, select_block=64,
    num_selected=4, window=64, phi="mean",
)  # fmt: skip
WIDE = dataclasses.replace(LONG, heads=4, kv_heads=4, dk=128, dv=128)
HOW = How(steps=100, batch=2, length=256, rate=1e-2, save_every=1000)
TOKENS = 65536


def on_ranks(count: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """What a function returns on each of so many fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (count, folder, work, args), count)
        return [json.loads((Path(folder) / f"{r}.json").read_text()) for r in range(count)]


def _rank(rank: int, count: int, folder: str, work: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count
    )
    (Path(folder) / f"{rank}.json").write_text(json.dumps(work(*args)))
    dist.destroy_process_group()


def losses(name: str) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        shared = [folder]
        dist.broadcast_object_list(shared)
        found = train(
            PARITY, ("nsa", "nsa"), task_of("text"), MESHES[name], HOW, Path(shared[0]) / "run"
        )
        dist.barrier()
        return found


def parity() -> dict[str, Any]:
    """Losses of 100 steps by mesh."""
    found = {name: on_ranks(mesh.ranks, losses, name)[0] for name, mesh in MESHES.items()}
    one = found["one rank"]
    apart = {k: max(abs(a - b) for a, b in zip(v, one, strict=True)) for k, v in found.items()}
    draw(found)
    return {"losses": found, "largest difference from one rank, nats": apart}


def draw(found: dict[str, list[float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, low) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, height_ratios=(2, 1))
    for i, (name, values) in enumerate(found.items()):
        style = {"label": name, "color": f"C{i}"}
        top.plot(values, linewidth=3 if i == 0 else 1, **style)
        if i:
            apart = [abs(a - b) for a, b in zip(values, found["one rank"], strict=True)]
            low.plot(apart, **style)
    top.set_ylabel("loss, nats per byte")
    top.legend()
    low.set(yscale="log", xlabel="step", ylabel="difference from one rank")
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "images" / "loss_parity.png", dpi=110)


def long_step(ranks: int) -> dict[str, Any]:
    """Forward and backward of 64K tokens: growth of the largest resident size, CPU time, bytes."""
    mesh = Parallelism(cp=ranks).mesh()
    torch.manual_seed(0)
    net = parallelize(ByteLanguageModel(LONG, 2), mesh, fetch="gather")
    tokens = torch.randint(0, 256, (1, TOKENS))
    own, targets = shard_tokens(tokens, mesh["cp"])
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    with counting() as sent:
        loss = sharded_loss(net(own), targets, ranks, TOKENS - 1)
        loss.backward()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "MB": (after.ru_maxrss - before.ru_maxrss) / 1024,
        "CPU seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "seconds": time.perf_counter() - began,
        "MB sent": sum(sent.values()) / 1e6,
    }


def memory() -> dict[str, Any]:
    """64K tokens on one rank and on four."""
    return {f"{n} ranks": on_ranks(n, long_step, n) for n in (1, 4)}


def trace() -> dict[str, float]:
    """Of a forward pass of 16K tokens and 4 kv heads on two ranks, in ms, from torch's profiler.

    The whole; attention ops; exchanges under way, which includes waiting for the other rank to
    come; exchanges while attention ops run; how long the rank stood still for one.
    """
    mesh = Parallelism(cp=2).mesh()
    net = parallelize(ByteLanguageModel(WIDE, 1), mesh, fetch="gather")
    own, _ = shard_tokens(torch.randint(0, 256, (1, 16384)), mesh["cp"])
    with torch.no_grad():
        net(own)
        with torch.profiler.profile() as profile:
            net(own)
    kinds = {
        "nsa_distributed::context_attention": "layer", "gloo:all_to_all": "exchange",
        WAITING: "waiting",
    }  # fmt: skip
    spans: dict[str, list[tuple[float, float]]] = {
        kind: [] for kind in (*kinds.values(), "attention")
    }
    for event in profile.events() or ():
        kind = "attention" if event.name.startswith("nsa::") else kinds.get(event.name)
        if kind is not None:
            spans[kind].append((event.time_range.start, event.time_range.end))
    both = sum(
        max(0.0, min(b, d) - max(a, c)) for a, b in spans["exchange"] for c, d in spans["attention"]
    )
    total = {kind: sum(b - a for a, b in found) / 1e3 for kind, found in spans.items()}
    return {**total, "exchange during attention": both / 1e3}


def overlap() -> dict[str, Any]:
    """Spans of both ranks."""
    return {"ms by rank": on_ranks(2, trace)}


WORK = {"parity": parity, "memory": memory, "overlap": overlap}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=tuple(WORK))
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    found = {"machine": describe(), **WORK[args.what]()}
    path = ROOT / "docs" / "data" / f"distributed-{args.what}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
