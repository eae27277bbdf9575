"""Times public Native Sparse Attention implementations and dense attention in one run.

    python peers.py --fla DIR --sfnsa DIR --xunhao DIR --own my_kernels:STAGES --out rows.jsonl

README.md in this folder says what is measured, how, and what a row holds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import triton
from adapters import NOTES, PEERS, Call, FlashWindow, Flex, Own, Peer, Sdpa
from measure import Timer, check_backward, check_forward, graphed
from problem import GRADS, AnyProblem, Geometry, Heads, make_decode, make_problem
from torch import Tensor
from torch.nn.attention import SDPBackend

PREFILL = ("dense", "nsa", "slc", "cmp", "select", "cmp_select", "window")
DATA_DEPENDENT = ("nsa", "slc", "select", "cmp_select")
DECODE = ("dense_decode", "decode")
OUT_OF_TIME = 3  # exit status when cells were left for another run with --resume
DENSE_OF = {"nsa": "dense", "decode": "dense_decode"}
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
    problems = []
    for tokens in args.lengths:
        for heads in args.heads:
            for dist in args.dists:
                stages = PREFILL if dist == args.dists[0] else DATA_DEPENDENT
                problems.append(((heads, tokens, dist, 1), stages))
    decode = [((h, args.decode_tokens, "random", args.decode_batch), DECODE) for h in args.heads]
    first = len(args.dists) * len(args.heads)
    problems[first:first] = decode
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
        self.rows: list[dict] = []
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

    def forward(self, stage: str, p: AnyProblem, run: Call, out: Tensor | None = None) -> dict:
        """Checks, then times; `out` is where `run` leaves its result if it returns none."""
        result = run()
        right, errors = check_forward(stage, p, (result if out is None else out).detach())
        del result
        return {"status": status(right), "errors": errors} | self.timer(run)

    def backward(self, stage: str, p: AnyProblem, call: Call, leaves: list[Tensor]) -> dict:
        out = call(*leaves)
        grad_out = torch.randn_like(out).contiguous()
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

    @contextlib.contextmanager
    def limit(self, cell: Cell) -> Iterator[None]:
        """Gives up on a cell that takes too long; nothing could interrupt a hanging kernel."""

        def give_up() -> None:
            reason = f"no result within {seconds:.0f} s"
            short = seconds < self.args.cell_limit  # cut by the budget: no verdict on the cell
            self.record(cell, "", status="skipped" if short else "failed", reason=reason)
            self.restart()

        left = self.args.budget + self.args.grace - (time.time() - self.args.started)
        seconds = max(5.0, min(self.args.cell_limit, left))
        watchdog = threading.Timer(seconds, give_up)
        watchdog.daemon = True
        watchdog.start()
        try:
            yield
        finally:
            watchdog.cancel()
            watchdog.join()  # a thread that is still there at exit may abort the process

    def restart(self) -> None:
        """Replaces this process by one that goes on after the last recorded row."""
        resumed = ["--resume", "--prewarm", "0", "--started", str(self.args.started)]
        replace_process([sys.executable, *sys.argv, *resumed])

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


def read_rows(path: Path) -> list[dict]:
    """The rows of a file of JSON lines, if it exists; a line that was cut off is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def write_rows(path: Path, rows: list[dict]) -> None:
    """Replaces a file of JSON lines at once, so that an interrupted run leaves a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text("".join(json.dumps(row) + "\n" for row in rows))
    draft.replace(path)


def replace_process(command: list[str]) -> None:
    """Runs `command` in place of this process, which may hold a lost or hanging CUDA context.

    The driver frees a context when its device files are closed. What keeps those open across an
    exec is the driver's choice, so all files but the standard ones are closed here.
    """
    sys.stdout.flush()
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.execv(command[0], command)


def prewarm(jobs: int, seconds: float) -> None:
    """Fills the kernel caches from several processes: serial compilation would eat the budget.

    At 16K tokens: the kernels are those of longer sequences, and every process has its own problem.
    """
    # fla would keep the autotuning results of processes that disturb each other
    env = os.environ | {"FLA_CACHE_RESULTS": "0", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    command = [sys.executable, *sys.argv, "--prewarm", "0", "--lengths", "16384", "--shard"]
    null, deadline = subprocess.DEVNULL, time.time() + seconds
    shards = [f"{i}/{jobs}" for i in range(jobs)]
    workers = [subprocess.Popen([*command, s], env=env, stdout=null, stderr=null) for s in shards]
    for worker in workers:
        try:
            worker.wait(max(0.0, deadline - time.time()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


# ------------------------------------------------------------------------------------- reporting


def status(right: bool) -> str:
    return "ok" if right else "mismatch"


def describe(error: BaseException) -> str:
    """The error in about 400 characters; compilers say the reason last."""
    text = " | ".join(line.strip() for line in str(error).splitlines() if line.strip())
    text = text if len(text) < 400 else f"{text[:120]} ... {text[-270:]}"
    return f"{type(error).__name__}: {text}"


def describe_machine(device: str) -> dict[str, object]:
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    versions |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    name = torch.cuda.get_device_name() if device == "cuda" else device
    return {"device": name, "versions": versions, "python": platform.python_version()}


def progress(row: dict) -> str:
    fields = ("heads", "tokens", "dist", "stage", "direction", "peer", "status")
    text = " ".join(str(row[field]) for field in fields if row.get(field))
    if "median_ms" not in row:
        return f"{text}: {row['reason'][:160]}"
    shown = [name for name in row["errors"] if not name.startswith("max_abs")]
    errors = " ".join(f"{name} {row['errors'][name]:.2g}" for name in shown)
    return f"{text}: {row['median_ms']:.3f} ms, {errors}"


def table(rows: list[dict]) -> str:
    """Median ms by problem, stage and implementation; the most important problems come last."""
    groups: dict[str, dict[str, dict[str, dict]]] = defaultdict(lambda: defaultdict(dict))
    dense: dict[tuple, float] = {}
    for row in rows:
        if row["stage"] == "import":
            continue
        kind = f"decode x{row['batch']}" if row["batch"] > 1 else row["dist"]
        problem, line = (row["heads"], row["tokens"]), f"{row['stage']} {row['direction']}"
        groups["{} {} {}".format(*problem, kind)][line][row["peer"]] = row
        if row["status"] == "ok" and row["stage"] in DENSE_OF.values():
            best = dense.get((*problem, line), row["median_ms"])
            dense[(*problem, line)] = min(best, row["median_ms"])

    def entry(row: dict | None) -> str:
        if row is None:
            return ""
        mark = {"ok": "", "mismatch": "!", "failed": "x", "skipped": "."}[row["status"]]
        if "median_ms" not in row:
            return mark
        against = f"{DENSE_OF.get(row['stage'])} {row['direction']}"
        best = dense.get((row["heads"], row["tokens"], against))
        ratio = f" ({best / row['median_ms']:.1f})" if best else ""
        return f"{row['median_ms']:.3f}{mark}{ratio}"

    text = ["\nmedian ms (best right dense time / this); ! wrong, x failed, . out of time"]
    for label, lines in reversed(groups.items()):
        every = [row for cells in lines.values() for row in cells.values()]
        peers = list(dict.fromkeys(row["peer"] for row in every))
        text.append(f"\n{label:32}" + "".join(f"{name[:14]:>15}" for name in peers))
        unions = next((row["unions"] for row in every if row.get("unions")), {})
        text += [f"  blocks of {n} neighbours: {count:.1f}" for n, count in unions.items()]
        for line, cells in lines.items():
            text.append(f"  {line:30}" + "".join(f"{entry(cells.get(n)):>15}" for n in peers))
    return "\n".join(text)


# --------------------------------------------------------------------------------------- options


def listed(kind: Callable[[str], object]) -> Callable[[str], list]:
    """Parser of a comma-separated option."""
    return lambda text: [kind(item) for item in text.split(",") if item]


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
        import dry_run

        if args.dry_run:
            dry_run.shrink(args)
            args.own.append("dry_run:REFERENCE")
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
