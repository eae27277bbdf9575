"""Runs the cells of a plan and writes a row per measurement; README.md says what a row holds."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend

from tools.peers.adapters import NOTES, PEERS, Call, FlashWindow, Flex, Own, Peer, Sdpa
from tools.peers.measure import Timer, check_backward, check_forward, graphed
from tools.peers.problem import GRADS, AnyProblem, Heads, Problem, make_decode, make_problem
from tools.peers.report import progress
from tools.runs import Row, describe, read_rows, replace_process, watchdog, write_rows

if TYPE_CHECKING:
    import argparse

PREFILL = ("dense", "nsa", "slc", "cmp", "select", "cmp_select", "window")
DATA_DEPENDENT = ("nsa", "slc", "select", "cmp_select")
DECODE = ("dense_decode", "decode")
COMMAND = (sys.executable, "-m", "tools.peers")
"""How a process of this benchmark is started."""
Result = TypeVar("Result")


class Cell(NamedTuple):
    """One stage of one implementation on one problem; the first four fields are the problem."""

    heads: Heads
    tokens: int
    dist: str
    batch: int
    stage: str
    peer: str

    @property
    def key(self) -> list[str]:
        return [str(part) for part in self]


def plan(args: argparse.Namespace, peers: dict[str, Peer]) -> Iterator[Cell]:
    """Most important first: every stage at the first length, decode, then the other lengths."""
    problems: list[tuple[tuple[Heads, int, str, int], tuple[str, ...]]] = []
    for tokens in args.lengths:
        for heads in args.heads:
            for dist in args.dists:
                stages: tuple[str, ...] = PREFILL if dist == args.dists[0] else DATA_DEPENDENT
                problems.append(((heads, tokens, dist, 1), stages))
    first = len(args.dists) * len(args.heads)
    problems[first:first] = [
        ((h, args.decode_tokens, "random", args.decode_batch), DECODE) for h in args.heads
    ]
    for problem, stages in problems:
        for stage in stages:
            for name, peer in peers.items():
                wanted = stage in (args.stages or stages) and name in (args.only or peers)
                if wanted and stage in peer.stages():
                    yield Cell(*problem, stage, name)


class Bench:
    """Runs the plan, writes a row per measurement, survives whatever an implementation does."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.timer = Timer(args.device, args.seconds)
        self.commits = dict(pair.split("=", 1) for pair in args.commit)
        self.machine = describe_machine(args.device)
        self.rows: list[Row] = []
        if args.resume:
            self.rows = [row for row in read_rows(args.out) if row["status"] != "skipped"]
        if not args.shard:
            write_rows(args.out, self.rows)
        self.done = [row["key"] for row in self.rows]
        self.peers = {peer.name: peer for peer in self.load_peers()}
        torch.set_float32_matmul_precision("highest")  # for the reference, whatever imports did
        self.current: tuple[Cell, AnyProblem] | None = None

    def load_peers(self) -> Iterator[Peer]:
        """The dense baselines, then every peer and own table that can be imported."""
        if self.args.device == "cpu":
            yield Sdpa("math", SDPBackend.MATH)
        else:
            yield Sdpa("cudnn", SDPBackend.CUDNN_ATTENTION)
            yield Sdpa("flash", SDPBackend.FLASH_ATTENTION)
        yield Flex(self.args.device)
        yield FlashWindow()
        sources = [(name, make, getattr(self.args, name)) for name, make in PEERS.items()]
        for name, make, source in sources + [(spec, Own, spec) for spec in self.args.own]:
            if source is None or ["import", name] in self.done:
                continue
            try:
                yield make(source)
            # Whatever an import raises is a result of this benchmark, an exit included.
            except (Exception, SystemExit) as error:
                self.emit(["import", name], peer=name, stage="import", reason=describe(error))

    def problem(self, cell: Cell) -> AnyProblem:
        """The problem of a cell; the last one is kept."""
        if self.current is None or self.current[0][:4] != cell[:4]:
            self.current = None  # free its memory first
            args, like = self.args, (self.args.dtype, self.args.device)
            p: AnyProblem
            if cell.batch > 1:
                p = make_decode(cell.heads, args.geom, cell.batch, cell.tokens, *like)
            else:
                rho = args.rho if cell.dist == "correlated" else 0.0
                p = make_problem(cell.heads, args.geom, cell.tokens, rho, args.checked, *like)
            self.current = (cell, p)
        return self.current[1]

    def prepare(self, cell: Cell) -> tuple[AnyProblem, Call, list[Tensor]]:
        """What the implementation makes of the problem, its call, and fresh leaves for it."""
        peer = self.peers[cell.peer]
        p = peer.view(self.problem(cell))
        leaves = [getattr(p, name).detach() for name in GRADS.get(cell.stage, ())]
        call = peer.stages()[cell.stage](p)
        return p, call, [leaf.requires_grad_() for leaf in leaves]

    def run(self) -> None:
        for cell in plan(self.args, self.peers):
            if cell.key in self.done:
                continue
            if time.time() - self.args.started > self.args.budget:
                self.record(cell, "", status="skipped", reason="time budget")
                continue
            with self.limit(cell), torch.set_grad_enabled(cell.stage in GRADS):
                self.measure(cell)

    def measure(self, cell: Cell) -> None:
        """Records forward and backward, or eager and graphed decode, of one cell."""
        first, second = ("eager", "graph") if cell.stage in DECODE else ("fwd", "bwd")
        ready = self.guarded(cell, first, lambda: self.prepare(cell))
        if ready is None:
            return
        p, call, leaves = ready
        passes = {first: lambda: self.forward(cell.stage, p, lambda: call(*leaves))}
        if leaves:
            passes[second] = lambda: self.backward(cell.stage, p, call, leaves)
        elif cell.stage in DECODE and self.args.device == "cuda":
            passes[second] = lambda: self.forward(cell.stage, p, *graphed(call))
        for direction, body in passes.items():
            result = self.guarded(cell, direction, body)
            if result is None:
                return
            note = NOTES.get(cell.peer, {}).get(cell.stage, "")
            self.record(cell, direction, **result, note=note, unions=getattr(p, "unions", {}))

    def forward(
        self, stage: str, p: AnyProblem, run: Callable[[], Tensor | None], out: Tensor | None = None
    ) -> Row:
        """Checks, then times; `out` is where `run` leaves its result if it returns none."""
        result = run()
        found = result if out is None else out
        assert found is not None
        right, errors = check_forward(stage, p, found.detach())
        del result, found
        return {"status": status(right), "errors": errors} | self.timer(run)

    def backward(self, stage: str, p: AnyProblem, call: Call, leaves: list[Tensor]) -> Row:
        out = call(*leaves)
        grad_out = torch.randn_like(out).contiguous()
        assert isinstance(p, Problem)
        right, errors = check_backward(stage, p, leaves, out, grad_out)

        def run() -> object:
            return torch.autograd.grad(out, leaves, grad_out, retain_graph=True)

        return {"status": status(right), "errors": errors} | self.timer(run)

    def guarded(self, cell: Cell, direction: str, body: Callable[[], Result]) -> Result | None:
        """The result of `body`, or None after recording why there is none."""
        try:
            return body()
        except Exception as error:  # any failure of foreign code is a row, never the end of the run
            self.record(cell, direction, reason=describe(error))
        if self.args.device == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError:  # the CUDA context is lost, for instance after a bad access
                self.restart()
        return None

    def limit(self, cell: Cell) -> AbstractContextManager[None]:
        """Gives up on a cell that takes too long."""

        def give_up() -> None:
            reason = f"no result within {seconds:.0f} s"
            short = seconds < self.args.cell_limit  # cut by the budget: no verdict on the cell
            self.record(cell, "", status="skipped" if short else "failed", reason=reason)
            self.restart()

        left = self.args.budget + self.args.grace - (time.time() - self.args.started)
        seconds = max(5.0, min(self.args.cell_limit, left))
        return watchdog(seconds, give_up)

    def restart(self) -> None:
        """Replaces this process by one that goes on after the last recorded row."""
        resumed = ["--resume", "--prewarm", "0", "--started", str(self.args.started)]
        replace_process([*COMMAND, *sys.argv[1:], *resumed])

    def record(self, cell: Cell, direction: str, **fields: object) -> None:
        where = cell._asdict() | {"heads": str(cell.heads), "direction": direction}
        self.emit(cell.key, **where, **fields)

    def emit(self, key: list[str], **fields: object) -> None:
        """Appends one row to the file and a short line to the output."""
        row = {"key": key, "status": "failed"} | fields | self.machine
        row |= {"dtype": str(self.args.dtype), "commit": self.commits.get(fields["peer"])}
        row |= {
            "revision": self.args.revision,
            "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        self.rows.append(row)
        if self.args.shard:
            return
        with self.args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if row["status"] != "skipped":
            print(progress(row), flush=True)

    def warm(self) -> None:
        """One shard of the cells that the run begins with, forward and backward, unmeasured."""
        index, count = map(int, self.args.shard.split("/"))
        first = (self.args.lengths[0], self.args.decode_tokens)
        cells = [c for c in plan(self.args, self.peers) if c.tokens in first and c.dist == "random"]
        for cell in cells[index::count]:
            # the measured run records what fails
            with contextlib.suppress(Exception), torch.set_grad_enabled(cell.stage in GRADS):
                _, call, leaves = self.prepare(cell)
                out = call(*leaves)
                if leaves:
                    torch.autograd.grad(out, leaves, torch.ones_like(out))
                del call, leaves, out
            if self.args.device == "cuda":
                torch.cuda.empty_cache()  # the other shards need the memory


def prewarm(jobs: int, seconds: float) -> None:
    """Fills the kernel caches from several processes: serial compilation would eat the budget.

    At 16K tokens: the kernels are those of longer sequences, and every process has its own problem.
    """
    # fla would keep the autotuning results of processes that disturb each other
    env = os.environ | {"FLA_CACHE_RESULTS": "0", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    command = [*COMMAND, *sys.argv[1:], "--prewarm", "0", "--lengths", "16384", "--shard"]
    null, deadline = subprocess.DEVNULL, time.time() + seconds
    shards = [f"{i}/{jobs}" for i in range(jobs)]
    workers = [subprocess.Popen([*command, s], env=env, stdout=null, stderr=null) for s in shards]
    for worker in workers:
        try:
            worker.wait(max(0.0, deadline - time.time()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def status(right: bool) -> str:
    return "ok" if right else "mismatch"


def describe_machine(device: str) -> dict[str, object]:
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    versions |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    name = torch.cuda.get_device_name() if device == "cuda" else device
    return {"device": name, "versions": versions, "python": platform.python_version()}
