"""Run all of nki-library's tests, record what came of each: `python -m tests.foreign.survey`.

The record, `survey.json`, is data: one entry per test function and parametrization that was tried,
none left out. Cases are taken in rounds, the smallest of each function first, so that a record
that is cut short is short everywhere alike. Each case runs in a process of its own under a limit
of processor time and memory; what is recorded already is not run again unless `--again` names its
status. Where a rule of the simulator refuses AWS's kernel, the entry says "refused" with that
rule, whatever comes after; the case then runs again with the rule relaxed, to see whether its
numbers agree without it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsa_neuron.simulator import SimulationError

from .checkouts import importable, path_of, revision, why_missing
from .library import TestFunction, functions, not_for_trn2
from .parameters import cases_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

RECORD = Path(__file__).with_name("survey.json")
GIB = 1 << 30
RELAXED_AT_MOST = 4


def outcome_of(entry: dict[str, Any]) -> str:
    """What came of a case in one word: its status, or "relaxed" where it then agrees.

    A refused case that differs or fails without the rule is that.
    """
    status: str = entry["status"]
    if status != "refused" or "relaxed" not in entry:
        return status
    without: str = entry["relaxed"]["status"]
    return {"agrees": "relaxed", "differs": "differs", "fails": "fails"}.get(without, "refused")


def attempt(function: TestFunction, pick: int) -> dict[str, Any]:
    """Run one case, again with the rules relaxed that refuse it, and say what came of it."""
    entry: dict[str, Any] = {"status": ""}
    relax: dict[str, str] = {}
    while True:
        found = _once(function, pick, relax)
        if not relax:
            entry |= found
        else:
            entry["relaxed"] = {"rules": relax.copy(), **found}
        rule = found.get("rule")
        if rule is None or rule in relax or len(relax) == RELAXED_AT_MOST:
            return entry
        relax[rule] = found["message"]


def _once(function: TestFunction, pick: int, relax: dict[str, str]) -> dict[str, Any]:
    import _pytest.outcomes as pytest_outcomes

    try:
        outcome = function.run(pick, relax)
    except SimulationError as error:
        return {"status": "refused", "rule": error.rule, "message": _first_line(error)}
    except pytest_outcomes.Skipped as error:
        return {"status": "skipped", "message": _first_line(error)}
    except Exception as error:
        text = f"{type(error).__name__}: {_first_line(error)}"
        if isinstance(error, MemoryError) or "can't allocate memory" in text:
            return {"status": "too large", "message": "out of memory"}
        return {"status": "fails", "message": text, "where": _where(error)}
    facts: dict[str, Any] = {
        "instructions": outcome.instructions,
        "results": outcome.results,
        "error": float(f"{outcome.error:.3g}"),
        "limit": float(f"{outcome.limit:.3g}"),
    }
    if outcome.failures:
        return {"status": "differs", "message": "; ".join(outcome.failures)[:300], **facts}
    if not outcome.results or not outcome.instructions:
        return {"status": "compared nothing", **facts}
    return {"status": "agrees", **facts}


def _where(error: BaseException) -> str:
    """Who raised an exception: "simulator", "kernel", or "test" for all else of AWS's."""
    frames = [f.filename for f in traceback.extract_tb(error.__traceback__)]
    inner = next((f for f in reversed(frames) if "site-packages" not in f and f[0] == "/"), "")
    if "/nsa_neuron/simulator/" in inner:
        return "simulator"
    ran = any("/nsa_neuron/simulator/" in f for f in frames)
    return "kernel" if ran and "/nkilib_src/" in inner else "test"


def _first_line(error: BaseException) -> str:
    return str(error).split("\n")[0][:300]


def limited(function: TestFunction, pick: int, seconds: int, gib: int) -> dict[str, Any]:
    """`attempt` in a process of its own; "too large" where it exceeds its limits."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(
        target=_child, args=(sender, function, pick, seconds, gib)
    )
    process.start()
    sender.close()
    try:
        entry: dict[str, Any] = receiver.recv()
    except EOFError:
        entry = {}
    process.join()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    if not entry:
        over = process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL)
        how = f"over {seconds} s of processor time" if over else f"exit status {process.exitcode}"
        entry = {"status": "too large" if over else "fails", "message": how}
    entry["peak_gib"] = round(used.ru_maxrss / (1 << 20), 1)
    return entry


def _child(sender: Connection, function: TestFunction, pick: int, seconds: int, gib: int) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    resource.setrlimit(resource.RLIMIT_AS, (gib * GIB, gib * GIB))
    sys.stderr = sys.stdout = open(os.devnull, "w")
    start = time.process_time()
    entry = attempt(function, pick)
    entry["seconds"] = round(time.process_time() - start, 1)
    sender.send(entry)


def rounds(record: dict[str, Any], upto: int, again: set[str]) -> Iterator[tuple[str, int]]:
    """Cases to run: each function's smallest, then each one's next; none after one too large.

    Within a round those functions first whose smallest case was done soonest.
    """
    order = sorted(record["functions"].items(), key=lambda item: _seconds(item[1]))
    for pick in range(upto):
        for name, facts in order:
            if pick >= facts["cases"] or facts["skipped"]:
                continue
            before = facts["tried"].get(str(pick))
            if before is not None and before["status"] not in again:
                continue
            smaller = (facts["tried"].get(str(p), {}) for p in range(pick))
            if any(s.get("status") == "too large" for s in smaller):
                continue
            yield name, pick


def _seconds(facts: dict[str, Any]) -> float:
    found: float = facts["tried"].get("0", {}).get("seconds", 0.0)
    return found


def enumerate_functions(record: dict[str, Any], root: Path) -> None:
    """Bring the record's list of functions up to date with the checkout."""
    old = record.get("functions", {})
    record["functions"] = {}
    for function in functions(root):
        loaded = function.load()
        record["functions"][function.id] = {
            "cases": len(cases_of(loaded)),
            "skipped": not_for_trn2(loaded),
            "tried": old.get(function.id, {}).get("tried", {}),
        }


def save(record: dict[str, Any], path: Path) -> None:
    """Write the record whole or not at all; one line per case."""
    lines = [f' "{k}": {json.dumps(v)}' for k, v in record.items() if k != "functions"]
    entries = []
    for name, facts in record["functions"].items():
        head = json.dumps({k: v for k, v in facts.items() if k != "tried"})[:-1]
        tried = sorted(facts["tried"].items(), key=lambda item: int(item[0]))
        rows = ",\n".join(f'    "{pick}": {json.dumps(entry)}' for pick, entry in tried)
        entries.append(f'  {json.dumps(name)}: {head}, "tried": {{\n{rows}\n  }}}}')
    lines.append(' "functions": {\n' + ",\n".join(entries) + "\n }")
    new = path.with_suffix(".part")
    new.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    new.replace(path)


def main(argv: list[str] | None = None) -> int:
    """Bring the record up to date; 2 where there is no checkout."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--upto", type=int, default=6, help="cases of each function (6)")
    parser.add_argument("--seconds", type=int, default=60, help="processor time of a case (60)")
    parser.add_argument("--gib", type=int, default=12, help="address space of a case (12)")
    parser.add_argument("--again", action="append", default=[], help="run this status again")
    parser.add_argument("--only", default="", help="functions whose name contains this")
    parser.add_argument("--budget", type=float, help="stop after so much processor time, s")
    parser.add_argument("--record", type=Path, default=RECORD)
    args = parser.parse_args(argv)
    root = path_of("library")
    if root is None:
        print(why_missing("library"), file=sys.stderr)
        return 2
    record = json.loads(args.record.read_text()) if args.record.exists() else {}
    if record.get("revision", revision(root)) != revision(root):
        print(f"{args.record} is of {record['revision']}; remove it to start anew", file=sys.stderr)
        return 2
    record = {"repository": "aws-neuron/nki-library", "revision": revision(root), **record}
    with importable("library", ".", "src"):
        enumerate_functions(record, root)
        save(record, args.record)
        for name, pick in rounds(record, args.upto, set(args.again)):
            if args.only not in name:
                continue
            used = resource.getrusage(resource.RUSAGE_CHILDREN)
            if args.budget is not None and used.ru_utime + used.ru_stime > args.budget:
                return 0
            entry = limited(TestFunction.named(name), pick, args.seconds, args.gib)
            if entry["status"] == "too large":
                entry["limits"] = {"seconds": args.seconds, "gib": args.gib}
            record["functions"][name]["tried"][str(pick)] = entry
            save(record, args.record)
            print(name, pick, entry.get("seconds", ""), entry["status"], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
