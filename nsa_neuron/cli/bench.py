"""Measure on this machine, or model a Trainium2.

`--target cpu` measures what one call of torch.ops.nsa costs beyond an empty op, and the reference
NSA against scaled_dot_product_attention; with `--part native`, both modes of the `cpu` backend
against it, and decode; with `--part stages`, `memory` or `peers`, what bounds each of its kernels,
how much memory a pass takes, and others' sparse attention; with `--part model`, whole models'
decoding and training steps beside full attention's, transformers' own cache included. `--simulator`
measures the simulator's own time and memory against NumPy doing the same arithmetic on the same
tiles, and what profiling adds. All of these measure on this computer. `--target trn2`
measures nothing: it models the time of the NKI kernels on one NeuronCore or more, per stage and
against dense attention, from simulated runs of some queries (minutes per length), or of a decode
step; nothing of it has run on hardware. One kernel's time: `nsa profile`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsa_neuron import bench, environment
from nsa_neuron.bench.record import Absent, Modelled, Record
from nsa_neuron.cli import need_torch, values
from nsa_neuron.errors import NsaError

if TYPE_CHECKING:
    import argparse

# What was measured or modelled, and what prints it.
Part = tuple[Sequence[Record | Modelled | Absent], Callable[[Any], str]]
# Parts of --target cpu about the `cpu` backend: their modules, and lengths if none are given.
NATIVE_PARTS = {
    "native": ("native", [4096, 8192, 16384]),
    "stages": ("native_stages", [4096, 16384]),
    "memory": ("native_memory", [4096, 8192, 16384, 65536]),
    "peers": ("native_peers", [4096]),
}

STAGES = (
    "compress", "compressed_attention", "select_blocks", "selected_attention",
    "sliding_window_attention", "gated_sum", "nsa_attention", "attention",
)  # fmt: skip
"""What `--target trn2` models; the last but one is one kernel, the last dense attention."""


def configure(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--target", choices=("cpu", "trn2"), help="measure here, or model")
    what.add_argument(
        "--simulator",
        action="store_true",
        help="the simulator's speed and memory against NumPy's, measured here",
    )
    parser.add_argument(
        "--part",
        choices=("overhead", "attention", "layer", *NATIVE_PARTS, "model"),
        help="one part of --target cpu only; `layer` is a layer beside the op inside it; `native` "
        "(the cpu backend against SDPA), its `stages` (what bounds each kernel), its `memory` and "
        "its `peers`, and `model` (decoding and training beside full attention) take minutes, so "
        "they have to be asked for",
    )
    parser.add_argument(
        "--shape",
        default="16/1/128/float32",
        metavar="HQ/HKV/D/DTYPE",
        help="of --part native, stages, memory and peers",
    )
    parser.add_argument("--forward", action="store_true", help="no gradients, of --part native")
    parser.add_argument(
        "--tokens", type=values.whole(), nargs="+", help="default 2048 8192 16384, on trn2 65536"
    )
    parser.add_argument(
        "--dims", nargs="+", default=["192/128"], metavar="DK/DV", help="head dims, on trn2"
    )
    parser.add_argument(
        "--replaced",
        type=values.share,
        default=0.05,
        help="share of a query's blocks that the next one replaces, on trn2; 1 is random",
    )
    parser.add_argument("--backward", action="store_true", help="the backward pass, on trn2")
    parser.add_argument(
        "--cores", type=int, choices=(1, 2, 8), default=1,
        help="on trn2: 2 share a sequence, 8 (a chip) its kv heads as well",
    )  # fmt: skip
    parser.add_argument(
        "--decode", type=values.whole(), nargs="+", metavar="BATCH",
        help="a decode step of a chip for these batches, on trn2",
    )  # fmt: skip
    parser.add_argument(
        "--stage", nargs="+", default=[], metavar="OP", choices=STAGES,
        help="only these ops, on trn2: " + ", ".join(STAGES),
    )  # fmt: skip
    parser.add_argument("--no-dense", action="store_true", help="no dense attention, on trn2")
    parser.add_argument(
        "--rounds", type=values.whole(), default=150, help="interleaved rounds of overhead"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="append JSON lines to a file")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> int:
    if args.out:  # what cannot be written shall be known before minutes of measuring
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.open("a").close()
    here = environment.describe()
    if args.simulator:
        parts = _simulator()
    else:
        parts = _trn2(args) if args.target == "trn2" else _cpu(args)
    records = [record for measured, _ in parts for record in measured]
    lines = bench.to_lines(records, here)
    if args.out:
        with args.out.open("a") as file:
            file.write("".join(f"{line}\n" for line in lines))
    texts = [to_text(measured) for measured, to_text in parts]
    told = [] if args.target == "trn2" else [bench.head(here)]
    print("\n".join(lines) if args.json else "\n\n".join([*told, *texts]))
    return 0


def _simulator() -> list[Part]:
    from nsa_neuron.bench import simulator

    return [(simulator.measure(), simulator.to_text)]


def _cpu(args: argparse.Namespace) -> list[Part]:
    need_torch("nsa bench --target cpu")
    from nsa_neuron.bench import attention, overhead

    parts: list[Part] = []
    if args.part in (None, "overhead"):
        parts.append((overhead.measure(rounds=args.rounds), overhead.to_text))
    if args.part in (None, "attention"):
        lengths = args.tokens or [2048, 8192, 16384]
        parts.append((attention.measure(lengths), attention.to_text))
    if args.part in NATIVE_PARTS:
        name, lengths = NATIVE_PARTS[args.part]
        module = importlib.import_module(f"nsa_neuron.bench.{name}")
        more = {"gradients": False} if args.forward and args.part == "native" else {}
        measured = module.measure(args.tokens or lengths, *_shape(args.shape), **more)
        parts.append((measured, module.to_text))
    if args.part == "layer":
        from nsa_neuron import layer_bench

        parts.append((layer_bench.measure(), layer_bench.to_text))
    if args.part == "model":
        from nsa_neuron import model_bench

        lengths = args.tokens or [2048, 8192, 32768]
        parts.append((model_bench.measure(lengths), model_bench.to_text))
    return parts


def _shape(text: str) -> tuple[tuple[int, int], int, str]:
    """`16/1/128/float32` as heads, head dim and dtype."""
    words = text.split("/")
    sizes = [int(word) for word in words[:3] if word.isdecimal() and int(word)]
    known = ("float32", "bfloat16", "float16")
    if len(words) != 4 or len(sizes) != 3 or words[3] not in known or sizes[0] % sizes[1]:
        raise NsaError(f"--shape is {text!r}; it must be HQ/HKV/D/DTYPE, such as 16/1/128/float32")
    return (sizes[0], sizes[1]), sizes[2], words[3]


def _trn2(args: argparse.Namespace) -> list[Part]:
    need_torch("nsa bench --target trn2")
    from nsa_neuron.bench import decoding, trainium

    if args.decode:
        return [
            (decoding.measure(tokens, args.decode, (64, 4), _dims(text)), decoding.to_text)
            for tokens in args.tokens or [65536]
            for text in args.dims
        ]
    problems = [
        trainium.Problem(tokens, (64, 4), _dims(text), args.replaced, args.backward, args.cores)
        for tokens in args.tokens or [65536]
        for text in args.dims
    ]
    return [(trainium.measure(problems, not args.no_dense, args.stage), trainium.to_text)]


def _dims(text: str) -> tuple[int, int]:
    """`192/128` as numbers."""
    parts = text.split("/")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise NsaError(f"--dims is {text!r}; it must be DK/DV, such as 192/128")
    return int(parts[0]), int(parts[1])
