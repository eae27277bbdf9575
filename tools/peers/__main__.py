"""Times public Native Sparse Attention implementations and dense attention in one run.

    python -m tools.peers --fla DIR --sfnsa DIR --own my_kernels:STAGES --out rows.jsonl

README.md in this folder says what is measured, how, and what a row holds.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from tools.peers import dry_run
from tools.peers.adapters import PEERS
from tools.peers.bench import Bench, prewarm
from tools.peers.problem import Geometry, Heads
from tools.peers.report import table
from tools.runs import listed

OUT_OF_TIME = 3
"""Exit status when cells were left for another run with --resume."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    for name in PEERS:
        add(f"--{name}", type=Path, metavar="DIR", help=f"folder of {name}'s source")
    add("--own", action="append", default=[], metavar="MODULE:TABLE", help="our own kernels")
    add("--commit", action="append", default=[], metavar="NAME=SHA", help="revision of a peer")
    add("--revision", default="", help="revision of this project, for the rows")
    add("--heads", type=listed(Heads.parse), default="64/4/192/128,64/4/128/128")
    add("--lengths", type=listed(int), default="65536,32768,16384,8192,131072")
    add("--dists", type=listed(str), default="random,correlated", help="kinds of inputs")
    add("--rho", type=float, default=0.1, help="strength of the topics in `correlated`")
    add("--decode-batch", type=int, default=32)
    add("--decode-tokens", type=int, default=65536)
    add("--stages", type=listed(str), default="", help="only these stages")
    add("--only", type=listed(str), default="", help="only these implementations")
    add("--checked", type=int, default=48, help="rows compared with the reference")
    add("--budget", type=float, default=480, help="seconds after which no cell begins")
    add("--grace", type=float, default=30, help="seconds that the last cell may run over")
    add("--cell-limit", type=float, default=90, help="seconds for one cell, compilation included")
    add("--seconds", type=float, default=0.4, help="measured time per row")
    add("--prewarm", type=int, default=8, help="processes that compile ahead; 0 for none")
    add("--out", type=Path, default=Path("peers.jsonl"))
    add("--resume", action="store_true", help="keep the rows in --out and go on after them")
    add("--dry-run", action="store_true", help="tiny sizes on a CPU, everything checked")
    add("--tiny", action="store_true", help="like --dry-run without its self-check, and smaller")
    add("--started", type=float, default=time.time(), help=argparse.SUPPRESS)
    add("--shard", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.device, args.dtype, args.geom = "cuda", torch.bfloat16, Geometry()
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.dry_run or args.tiny:
        if args.dry_run:
            dry_run.shrink(args)
            args.own.append("tools.peers.dry_run:REFERENCE")
            dry_run.check_everything(args)
        else:
            dry_run.shrink_further(args)
    elif not torch.cuda.is_available():
        sys.exit("no CUDA device here; --dry-run needs none")
    if args.prewarm and not args.shard:
        prewarm(args.prewarm, 0.3 * args.budget)
    bench = Bench(args)
    if args.shard:
        bench.warm()
        return 0
    bench.run()
    print(table(bench.rows))
    if args.dry_run:
        dry_run.check_rows(bench.rows, complete=not (args.stages or args.only))
    return OUT_OF_TIME if any(row["status"] == "skipped" for row in bench.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
