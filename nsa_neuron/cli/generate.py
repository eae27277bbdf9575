"""Continue a text, byte by byte, with a checkpoint that `nsa train` wrote."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nsa_neuron.cli import values
from nsa_neuron.nn import Sampling, stream
from nsa_neuron.nn.checkpoint import load_checkpoint

if TYPE_CHECKING:
    import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="model.safetensors of a run")
    parser.add_argument("prompt", nargs="?", help="default: what comes from stdin")
    parser.add_argument("--bytes", type=int, default=200, help="to write, default 200")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest byte")
    parser.add_argument("--top-k", type=int, default=0, help="of the k likeliest bytes only")
    parser.add_argument("--top-p", type=float, default=1.0, help="of the likeliest, up to this sum")
    parser.add_argument("--seed", type=values.seed, default=0)


def run(args: argparse.Namespace) -> int:
    model, _ = load_checkpoint(args.checkpoint)
    given = sys.stdin.buffer.read() if args.prompt is None else args.prompt.encode()
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    out = sys.stdout.buffer
    for new in stream(model, [given], args.bytes, sampling=sampling):
        out.write(bytes(new.tolist()))
        out.flush()
    out.write(b"\n")
    return 0
