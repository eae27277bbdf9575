"""Measures tile plans on a GPU and writes the best ones.

    python -m tools.tune --out tune.jsonl --budget 110

For each unit of `tune_candidates.json` (a stage, a pass and the kernel whose constants are tried)
and each head shape, it runs the stage with the shipped constants and with every candidate, compares
the result with the float32 reference of the peers' harness first, and times only what is right. A
candidate that wins by 2% becomes a row of `plans/<device>/<op>.json`, in front of those that it did
not measure, which stay as they are. Then `tune_overlap` measures from which overlap on selected
attention prefers the union of neighbouring queries. Every measurement is a line of `--out`; a run
with the same file goes on where the last one stopped: out of time (exit status 3), or killed by a
kernel.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from nsa_neuron import environment
from nsa_neuron.backends.cuda import devices, plans
from nsa_neuron.registry import REGISTRY
from tools import plan_files, tune_overlap
from tools.peers.adapters import Own
from tools.peers.measure import check_backward, check_forward
from tools.peers.problem import GRADS, AnyProblem, Geometry, Heads, make_decode, make_problem
from tools.runs import describe, listed, read_rows, replace_process, watchdog
from tools.tune_units import Crossover, Unit

OUT_OF_TIME = 3
COMMAND = (sys.executable, "-m", "tools.tune")
LEAST_GAIN = 0.02
"""A candidate must be this much faster than the shipped constants: less is noise."""


@contextlib.contextmanager
def override(op: str, kernel: str, constants: dict[str, Any]) -> Iterator[None]:
    """Launches `kernel` of `op` with other constants inside, whoever asks for its plan."""
    shipped = plans.find

    def find(device: str, name: str, **wanted: Any) -> dict[str, Any]:
        found = shipped(device, name, **wanted)
        return {**found, kernel: constants} if name == op else found

    plans.find = find  # type: ignore[assignment]
    REGISTRY.forget()
    try:
        yield
    finally:
        plans.find = shipped
        REGISTRY.forget()


def time_call(run: Callable[[], object]) -> dict[str, float]:
    """Median, p20 and p80 in ms of a call; on a CPU one run, which says nothing about a GPU."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        run()
        ms = [1e3 * (time.perf_counter() - start)] * 3
    else:
        from triton.testing import do_bench

        ms = do_bench(run, warmup=15, rep=120, quantiles=[0.5, 0.2, 0.8])
    return dict(zip(("median_ms", "p20_ms", "p80_ms"), ms, strict=True))


class Tuner:
    """Runs units on problems of the harness; see the module.

    Args:
        args: of the command line.
        own: the stages as the harness calls them.
        timer: times a call, in ms.
    """

    def __init__(self, args: argparse.Namespace, own: Any = None, timer: Any = time_call) -> None:
        self.args, self.timer = args, timer
        self.own = own or Own("tools.own_stages:STAGES")
        self.rows: list[dict[str, Any]] = read_rows(args.out)
        self.current: tuple[Any, Any] | None = None  # the last problem, by its settings

    @cached_property
    def machine(self) -> dict[str, Any]:
        device = environment.accelerator() or "cpu"
        versions = environment.versions()
        return {"device": device, "versions": versions, "revision": self.args.revision}

    def run(self) -> bool:
        """Tunes every unit; whether nothing is left."""
        for heads in self.args.heads:
            for unit in self.args.units:
                if not self.tune(unit, heads):
                    return False
        return all(
            tune_overlap.tune(self, crossover, heads)
            for heads in self.args.heads
            for crossover in self.args.crossovers
        )

    def tune(self, unit: Unit, heads: Heads) -> bool:
        """Measures what a unit still lacks and writes its plan; False when out of time."""
        done = self.measured(unit, heads)
        # The first row of a unit has the constants that were shipped when it was begun.
        base = done[0]["constants"] if done else self.shipped(unit, self.point(heads))
        if not self.complete(unit, heads, [base, *({**base, **c} for c in unit.candidates)]):
            return False
        self.settle(self.measured(unit, heads), unit, self.point(heads))
        return True

    def complete(self, unit: Unit, heads: Heads, every: list[dict[str, Any]]) -> bool:
        """Measures the constants that were not measured yet; False when out of time."""
        key = self.key(unit, heads)
        tried = [row["constants"] for row in self.measured(unit, heads)]
        for constants in every:
            if constants in tried:
                continue
            if time.time() - self.args.started > self.args.budget:
                return False
            with self.limit(key, constants):
                self.measure(key, unit, heads, constants)
            tried.append(constants)
        return True

    def key(self, unit: Unit, heads: Heads) -> list[Any]:
        """What the rows of a unit have in common."""
        names = [unit.stage, unit.direction, unit.op, unit.kernel, str(heads), self.args.tokens]
        return names if unit.rho is None else [*names, unit.rho]

    def measured(self, unit: Unit, heads: Heads) -> list[dict[str, Any]]:
        """The rows of a unit, of earlier runs too."""
        return [row for row in self.rows if row["key"] == self.key(unit, heads)]

    def point(self, heads: Heads) -> plan_files.Point:
        return plan_files.Point(heads.dk, heads.dv, heads.q // heads.kv, self.args.dtype_name)

    def shipped(self, unit: Unit, point: plan_files.Point) -> dict[str, Any]:
        wanted: dict[str, Any] = {
            "dk": point.dk,
            "dv": point.dv,
            "dtype": point.dtype,
            "group": point.group,
        }
        return plans.find(self.args.device_plans, unit.op, **wanted)[unit.kernel]

    def measure(self, key: list[Any], unit: Unit, heads: Heads, constants: dict[str, Any]) -> None:
        """Records whether a result is right, and only then how long it takes."""
        try:
            p, call, leaves = self.prepare(unit, heads)
            with torch.set_grad_enabled(unit.stage in GRADS):
                run, judge = self.judged(unit, p, call, leaves, constants)
                with override(unit.op, unit.kernel, constants):
                    right, errors = judge()
                    times = self.timer(run) if right else {}
        except Exception as error:  # whatever a candidate raises is why it is not taken
            self.emit(key, constants, status="failed", reason=describe(error))
            self.recover()
            return
        self.emit(key, constants, status="ok" if right else "mismatch", errors=errors, **times)

    def judged(self, unit: Unit, p: Any, call: Any, leaves: list[Any], constants: Any) -> Any:
        """The timed call and its check. A backward kernel gets the forward of the shipped plan."""
        if unit.direction == "bwd":
            out = call(*leaves)
            grad = torch.randn_like(out).contiguous()

            def again() -> Any:
                return torch.autograd.grad(out, leaves, grad, retain_graph=True)

            return again, lambda: check_backward(unit.stage, p, leaves, out, grad)
        if unit.stage == "decode":  # the plan is read when the caches are set up
            with override(unit.op, unit.kernel, constants):
                call = self.own.stages()["decode"](p)

        def run() -> Any:
            return call(*leaves)

        return run, lambda: check_forward(unit.stage, p, run().detach())

    def prepare(self, unit: Unit, heads: Heads) -> tuple[Any, Any, list[Any]]:
        """The problem (the last one is kept), the stage's call, fresh leaves."""
        args, decode = self.args, unit.stage == "decode"
        rho = args.rho if unit.rho is None else unit.rho
        if self.current is None or self.current[0] != (heads, decode, rho):
            self.current = None  # free its memory first
            like = (args.dtype, args.device)
            p: AnyProblem
            if decode:
                p = make_decode(heads, args.geom, args.decode_batch, args.decode_tokens, *like)
            else:
                p = make_problem(heads, args.geom, args.tokens, rho, 16, *like)
            self.current = ((heads, decode, rho), p)
        p = self.current[1]
        leaves = [getattr(p, name).detach() for name in GRADS.get(unit.stage, ())]
        return p, self.own.stages()[unit.stage](p), [leaf.requires_grad_() for leaf in leaves]

    def settle(self, rows: list[dict[str, Any]], unit: Unit, point: plan_files.Point) -> None:
        """Writes the fastest right constants, if they beat the shipped ones clearly."""
        right = [row for row in rows if row["status"] == "ok"]
        if not right:
            return
        best, base = min(right, key=lambda row: row["median_ms"]), rows[0]
        if base["status"] == "ok" and best["median_ms"] > (1 - LEAST_GAIN) * base["median_ms"]:
            return
        names = ("tokens", "median_ms", "shipped_ms", "device", "revision")
        facts = {**best, "shipped_ms": base.get("median_ms")}
        measured = {name: facts[name] for name in names}
        self.write_plan(unit, point, best["constants"], measured)

    def write_plan(
        self, unit: Unit, point: plan_files.Point, constants: dict[str, Any], measured: Any
    ) -> None:
        """Makes these constants what is found at a point from now on."""
        device = self.args.device_plans
        path = plans.PLANS_FOLDER / device / f"{unit.op}.json"
        # A device's file holds only the kernels in which it differs from another one.
        listed_rows = json.loads(path.read_text()) if path.exists() else {}
        listed_rows.setdefault(unit.kernel, [*plans.load(device, unit.op)[unit.kernel]])
        plan_files.put(listed_rows, unit.kernel, point, constants, measured)
        plan_files.write(path, listed_rows)
        self.write_bundle()
        plans.load.cache_clear()
        REGISTRY.forget()

    def write_bundle(self) -> None:
        if self.args.bundle:
            device = self.args.device_plans
            bundled = plan_files.bundle(plans.PLANS_FOLDER / device)
            self.args.bundle.write_text(json.dumps({"device": device, "plans": bundled}))

    def emit(self, key: list[Any], constants: dict[str, Any], **fields: Any) -> None:
        names = ("stage", "direction", "op", "kernel", "heads", "tokens")
        row = {"key": key, **dict(zip(names, key, strict=False)), "constants": constants}
        row |= fields | self.machine
        self.rows.append(row)
        if self.args.shard:
            return
        with self.args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        shown = f"{row['median_ms']:.3f} ms" if "median_ms" in row else row.get("reason", "")[:140]
        print(f"{row['heads']} {row['op']}.{row['kernel']} {row['status']} {shown} {constants}")
        sys.stdout.flush()

    def recover(self) -> None:
        if self.args.device != "cuda":
            return
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:  # the CUDA context is lost
            self.restart()

    def restart(self) -> None:
        """Replaces this process by one that goes on after the last recorded row."""
        resumed = ["--prewarm", "0", "--started", str(self.args.started)]
        replace_process([*COMMAND, *sys.argv[1:], *resumed])

    def limit(self, key: list[Any], constants: dict[str, Any]) -> AbstractContextManager[None]:
        """Gives up on a candidate that takes too long."""
        seconds = self.args.candidate_limit

        def give_up() -> None:
            self.emit(key, constants, status="failed", reason=f"no result within {seconds:.0f} s")
            self.restart()

        return watchdog(seconds, give_up)

    def warm(self) -> None:
        """One shard of all candidates, launched once each, so that they are compiled."""
        index, count = map(int, self.args.shard.split("/"))
        every = [
            (heads, unit, change)
            for heads in self.args.heads
            for unit in [*self.args.units, *tune_overlap.units(self.args)]
            for change in ({}, *unit.candidates)
        ]
        for heads, unit, change in every[index::count]:
            constants = {**self.shipped(unit, self.point(heads)), **change}
            # the measuring process records what fails
            with contextlib.suppress(Exception), torch.set_grad_enabled(unit.stage in GRADS):
                p, call, leaves = self.prepare(unit, heads)
                run, _ = self.judged(unit, p, call, leaves, constants)
                with override(unit.op, unit.kernel, constants):
                    run()


def prewarm(jobs: int, seconds: float) -> None:
    """Compiles candidates in several processes: serial compilation would eat the budget.

    At 16K tokens, whose kernels are those of longer sequences: every process has a problem of its
    own, and a dozen of 64K tokens do not fit a GPU.
    """
    command = [*COMMAND, *sys.argv[1:], "--prewarm", "0", "--tokens", "16384", "--shard"]
    null, deadline = subprocess.DEVNULL, time.time() + seconds
    shards = [[*command, f"{i}/{jobs}"] for i in range(jobs)]
    workers = [subprocess.Popen(shard, stdout=null, stderr=null) for shard in shards]
    for worker in workers:
        try:
            worker.wait(max(0.0, deadline - time.time()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--heads", type=listed(Heads.parse), default="64/4/192/128,64/4/128/128")
    add("--tokens", type=int, default=32768)
    add("--decode-batch", type=int, default=32)
    add("--decode-tokens", type=int, default=65536)
    add("--rho", type=float, default=0.1, help="topics of the inputs, see peers/README.md")
    add("--only", type=listed(str), default="", help="op or op.kernel")
    add("--candidates", type=Path, default=Path(__file__).with_name("tune_candidates.json"))
    add("--plans", type=Path, help="folder of plans to read and write; default: the package's")
    add("--bundle", type=Path, help="afterwards, write all plans of the device into one file")
    add("--install", type=Path, metavar="BUNDLE", help="write a bundle's plans; measure nothing")
    add("--budget", type=float, default=240, help="seconds after which nothing is begun")
    add("--candidate-limit", type=float, default=40, help="seconds for one, compilation included")
    add("--prewarm", type=int, default=12, help="processes that compile ahead; 0 for none")
    add("--out", type=Path, default=Path("tune.jsonl"))
    add("--revision", default="", help="of this project; default: what git says")
    add("--dry-run", action="store_true", help="tiny problems, interpreted, on copies of the plans")
    add("--started", type=float, default=time.time(), help=argparse.SUPPRESS)
    add("--shard", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.device, args.dtype, args.geom = "cuda", torch.bfloat16, Geometry()
    args.device_plans = devices.gpu().plans if torch.cuda.is_available() else "h200"
    if args.dry_run:
        shrink(args)
    args.dtype_name = str(args.dtype).removeprefix("torch.")
    args.revision = args.revision or environment.revision()
    data = json.loads(args.candidates.read_text())
    units = [Unit.of(item) for item in data["dry_run" if args.dry_run else "units"]]
    every = [Crossover(**item) for item in data.get("crossovers", ())]
    wanted = set(args.only or [*(u.op for u in units), *(c.op for c in every)])
    args.units = [u for u in units if {u.op, f"{u.op}.{u.kernel}"} & wanted]
    args.crossovers = [c for c in every if {c.op, f"{c.op}.dispatch"} & wanted]
    return args


def shrink(args: argparse.Namespace) -> None:
    """Tiny sizes, interpreted, in fp16 (interpreted Triton multiplies bf16 wrongly)."""
    args.device, args.dtype, args.device_plans = "cpu", torch.float16, "interpret"
    args.geom, args.heads = Geometry(n=4, w=40), [Heads(2, 1, 24, 16)]
    args.tokens, args.decode_batch, args.decode_tokens, args.prewarm = 136, 2, 264, 0
    args.candidate_limit = 300.0
    if args.plans is None:
        args.plans = args.out.parent / "plans"


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.plans:
        if not args.plans.exists():
            shutil.copytree(plans.PLANS_FOLDER, args.plans)
        plans.PLANS_FOLDER = args.plans
    if args.install:
        given = json.loads(args.install.read_text())
        plan_files.install(given["plans"], plans.PLANS_FOLDER / given["device"])
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device here; --dry-run needs none")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.prewarm and not args.shard:
        prewarm(args.prewarm, 0.4 * args.budget)
    tuner = Tuner(args)
    if args.shard:
        tuner.warm()
        return 0
    complete = tuner.run()
    tuner.write_bundle()
    return 0 if complete else OUT_OF_TIME


if __name__ == "__main__":
    sys.exit(main())
