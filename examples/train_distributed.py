"""Train the byte model on several processes, with any mesh: data, context, tensor, pipeline.

    torchrun --nproc-per-node 4 examples/train_distributed.py --cp 2 --tp 2
    torchrun --nproc-per-node 2 --max-restarts 3 examples/train_distributed.py runs/cp --cp 2

A folder that holds a run goes on behind its newest checkpoint, with this mesh or another; with
`--max-restarts` torchrun starts all ranks again when one ends. Each process uses one core, or one
GPU where there are any.
"""

from __future__ import annotations

import argparse
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from nsa_neuron.distributed.parallelism import AXES, Parallelism
from nsa_neuron.distributed.training import How, train
from nsa_neuron.errors import NsaError
from nsa_neuron.training.presets import CONFIGS, LAYERS, kinds_of, task_of


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/distributed"))
    for axis in AXES:
        parser.add_argument(f"--{axis}", type=int, default=1, help="ranks; default 1")
    parser.add_argument("--preset", choices=tuple(CONFIGS), default="tiny")
    parser.add_argument("--attention", default="nsa", help="of all layers, or of each")
    parser.add_argument("--layers", type=int, help="default: the preset's")
    defaults = How()
    for name in ("steps", "batch", "length", "seed", "save_every", "microbatches"):
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=getattr(defaults, name))
    parser.add_argument("--rate", type=float, default=defaults.rate)
    parser.add_argument("--fetch", choices=("auto", "gather", "blocks"), default="auto")
    parser.add_argument("--schedule", choices=("gpipe", "1f1b", "zbv"), default="1f1b")
    parser.add_argument("--dtype", default="", help="that parameters are cast to, as bfloat16")
    parser.add_argument("--replay", action="store_true", help="activation checkpointing")
    parser.add_argument(
        "--sequence", action=argparse.BooleanOptionalAction, default=defaults.sequence,
        help="with --tp: states between layers are spread by tokens",
    )  # fmt: skip
    parser.add_argument("--timeout", type=int, default=60, help="seconds a rank waits for others")
    return parser.parse_args()


def join(backend: str, timeout: int) -> None:
    """Joins torchrun's ranks. It keeps one store over restarts, in which addresses of ended ranks
    stay, so each start has names of its own."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    limit = timedelta(seconds=timeout)
    serves = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and rank == 0
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(*address, world, is_master=serves, timeout=limit)
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        backend, store=dist.PrefixStore(f"start-{start}", store), rank=rank, world_size=world,
        timeout=limit,
    )  # fmt: skip


def main() -> int:
    args = arguments()
    torch.set_num_threads(1)
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    join("nccl" if cuda else "gloo", args.timeout)
    names = ("steps", "batch", "length", "rate", "seed", "save_every", "fetch", "replay", "dtype",
             "schedule", "microbatches", "sequence")  # fmt: skip
    try:
        how = How(**{name: getattr(args, name) for name in names})
        kinds = kinds_of(args.attention, args.layers or LAYERS[args.preset])
        mesh = Parallelism(**{axis: getattr(args, axis) for axis in AXES})
        train(
            CONFIGS[args.preset], kinds, task_of("text"), mesh, how, args.folder,
            "cuda" if cuda else "cpu",
            lambda row: print(
                f"step {row['step'] + 1:5} of {how.steps}  loss {row['loss']:.4f}  "
                f"{row['seconds']:.2f} s  {row['context bytes sent'] / 1e6:.2f} MB sent for cp",
                flush=True,
            ),
        )  # fmt: skip
    except NsaError as error:
        print(f"rank {dist.get_rank()}: {error}", file=sys.stderr)
        return 1
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
