"""Who would run a call of given sizes, and who refuses it with which reason.

Nothing is allocated or run. For every device type, the targets that the automatic choice asks, in
order; with --policy, or where NSA_BACKEND is set, that one only, as `use_backend` would.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nsa_neuron.cli import FAILED, shared
from nsa_neuron.conformance.targets import Place, find_targets
from nsa_neuron.ops import get
from nsa_neuron.registry import ANYWHERE, AUTOMATIC, REGISTRY, Supported, requested
from nsa_neuron.terminal import table

if TYPE_CHECKING:
    import argparse

    from nsa_neuron.spec import Bound

DEVICES = ("cpu", "cuda", "neuron")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("op")
    parser.add_argument(
        "--device", action="append", help="may be repeated; default cpu, cuda, neuron"
    )
    parser.add_argument("--policy", metavar="NAME[:MODE]", help="as given to use_backend")
    shared.add_call(parser)
    shared.add_json(parser)


def run(args: argparse.Namespace) -> int:
    bound = shared.bind(
        get(args.op), shared.sizes_of(args), shared.pairs(args.set, "--set"), args.dtype
    )
    policy = args.policy or requested()
    places = find_targets([str(REGISTRY.target(policy))] if policy else ())
    devices = args.device or ([places[0].device] if policy else DEVICES)
    rows: list[dict[str, Any]] = []
    for device in devices:
        call = shared.on_device(bound, device)
        asked = places if policy else _automatic(places, device)
        verdicts = choose(call, asked)
        verdicts += [verdict(call, p) | {"chosen": False} for p in places if p not in asked]
        rows += [{"device": device, **row} for row in verdicts]
    if args.json:
        shared.print_json({"call": bound.describe(), "policy": policy, "verdicts": rows})
    else:
        print(_text(bound, rows))
        if policy and not args.policy:
            print(f"NSA_BACKEND={policy}: nobody else is asked")
    chosen = {row["device"] for row in rows if row["chosen"]}
    return 0 if chosen.issuperset(devices) else FAILED


def _automatic(places: list[Place], device: str) -> list[Place]:
    by_name = {str(place.target): place for place in places}
    order = AUTOMATIC.get(device.partition(":")[0], ANYWHERE)
    return [by_name[name] for name in order if name in by_name]


def choose(bound: Bound, places: list[Place]) -> list[dict[str, Any]]:
    """Verdicts of the targets in order; the first that takes the call and can run is chosen."""
    rows, open_still = [], True
    for place in places:
        row = verdict(bound, place)
        row["chosen"] = open_still and row["supported"] and not place.hindrance
        open_still = open_still and not row["chosen"]
        rows.append(row)
    return rows


def verdict(bound: Bound, place: Place) -> dict[str, Any]:
    """What a target says to a call, whether or not it can run here."""
    row = {"target": str(place.target), "hindrance": place.hindrance}
    if place.target.mode == "?":
        return {**row, "supported": False, "rule": "available", "reason": place.hindrance}
    answer = REGISTRY.get(place.target.backend).supports(bound, place.target.mode)
    if isinstance(answer, Supported):
        plan = "" if answer.plan is None else repr(answer.plan)
        return {**row, "supported": True, "rule": "", "reason": "", "plan": plan}
    return {**row, "supported": False, "rule": answer.rule, "reason": answer.reason}


def _text(bound: Bound, rows: list[dict[str, Any]]) -> str:
    lines, styles = [], []
    for row in rows:
        if row["chosen"]:
            said = "chosen"
        elif not row["supported"]:
            said = f"refuses by rule '{row['rule']}': {row['reason']}"
        elif row["hindrance"]:
            said = f"would take it, but cannot run here: {row['hindrance']}"
        else:
            said = "would take it if asked"
        lines.append([row["device"], row["target"], said])
        styles.append("good" if row["chosen"] else "dim" if not row["supported"] else "")
    head = f"{bound.spec.name}({bound.describe()})"
    return table(head.replace(" on meta", ""), ["tensors on", "target", "verdict"], lines, styles)
