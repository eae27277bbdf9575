"""Write the tables of docs/simulator.md from the records: `python -m tests.foreign.table`.

`survey.json` (made by `tests.foreign.survey`) is the record of nki-library's tests, `examples.json`
that of single kernels of the SDK and elsewhere. `--run` makes the latter anew for every checkout
that is named by its variable; nothing else runs anything.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import elsewhere, examples
from .checkouts import importable, path_of, revision
from .survey import RECORD, outcome_of
from .verdicts import VERDICTS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .examples import ExampleCase

EXAMPLES = Path(__file__).with_name("examples.json")
DOCUMENT = Path(__file__).parents[2] / "docs/simulator.md"
BEGIN, END = "<!-- foreign kernels: begin -->", "<!-- foreign kernels: end -->"
TITLES = {
    "sdk": "aws-neuron/aws-neuron-sdk, nki/examples",
    "triton-viz": "Deep-Learning-Profiling-Tools/triton-viz, examples/nki_beta2",
    "nkipy": "aws-neuron/nkipy",
    "nxdi": "aws-neuron/neuronx-distributed-inference, contrib",
    "samples": "aws-neuron/nki-samples, src/nki_samples/tutorials",
}
# Whole layers and blocks of a model, which are looked for by name.
KERNELS = (
    "moe_tkg",
    "moe_block_tkg",
    "transformer_tkg",
    "mlp_tkg",
    "qkv_tkg",
    "cross_entropy_forward",
    "attention_block_tkg",
)
# Outcome of a case -> column.
COLUMNS = {
    "agrees": "agree",
    "relaxed": "agree, rule relaxed",
    "refused": "refused",
    "differs": "differ",
    "fails": "fail",
    "too large": "too large",
    "compared nothing": "compared nothing",
    "skipped": "skipped",
}


def run_example(case: ExampleCase) -> dict[str, Any]:
    """What came of one example."""
    entry: dict[str, Any] = {"kernel": case.kernel, "file": case.file}
    try:
        outcome = case.run()
    except Exception as error:
        text = str(error).split("\n")[0]
        return {**entry, "verdict": f"{type(error).__name__}: {text}"}
    return {
        **entry,
        "shapes": outcome.shapes,
        "instructions": outcome.instructions,
        "error": float(f"{outcome.error:.2g}"),
        "limit": float(f"{outcome.limit:.2g}"),
        "verdict": "; ".join(outcome.failures) or "agrees",
    }


def run_examples(record: dict[str, Any]) -> None:
    """Bring the record up to date for the checkouts that there are."""
    by_repository = defaultdict(list)
    for case in (*examples.CASES, *elsewhere.CASES):
        by_repository[case.repository].append(case)
    for repository, cases in by_repository.items():
        root = path_of(repository)
        if root is None:
            continue
        with importable(repository):
            entries = [run_example(case) for case in cases]
        record[repository] = {"revision": revision(root), "kernels": entries}


def example_section(repository: str, found: dict[str, Any]) -> Iterator[str]:
    """One repository's kernels."""
    kernels = found["kernels"]
    good = sum(k["verdict"] == "agrees" for k in kernels)
    yield from (f"### {TITLES[repository]} ({found['revision']})", "")
    yield from (f"{good} of {len(kernels)} kernels agree.", "")
    yield "| Kernel | File | Shapes | Instructions | Max error | Limit | Verdict |"
    yield "|---|---|---|--:|--:|--:|---|"
    for k in kernels:
        shapes = k.get("shapes", [])
        listed = ", ".join(shapes[:4]) + (", ..." if len(shapes) > 4 else "")
        numbers = (
            f"{k['instructions']} | {k['error']:.1e} | {k['limit']:.1e}"
            if "error" in k
            else " | | "
        )
        verdict = k["verdict"].replace("|", "\\|")
        yield f"| {k['kernel']} | `{k['file']}` | {listed} | {numbers} | {verdict} |"
    yield ""


def library_section(record: dict[str, Any]) -> Iterator[str]:
    """nki-library: what was counted, the totals, each test function, the refusals, the rest."""
    functions = record["functions"]
    cases = {
        (name, pick): entry
        for name, facts in functions.items()
        for pick, entry in facts["tried"].items()
    }
    totals = Counter(outcome_of(entry) for entry in cases.values())
    yield from (f"### aws-neuron/nki-library ({record['revision']})", "")
    yield (
        f"{len(functions)} test functions with {sum(f['cases'] for f in functions.values()):,} "
        f"parametrizations; {len(cases):,} were tried, the smallest of each function first, and "
        "stand here whatever came of them."
    )
    yield from ("", "| Outcome | cases |", "|---|--:|")
    yield from (f"| {name} | {totals[key]} |" for key, name in COLUMNS.items())
    yield ""
    left = Counter(f["skipped"] or ("no parameters" if not f["cases"] else "") for f in
                   functions.values())  # fmt: skip
    whole = sum(_all_agree(f) for f in functions.values())
    yield (
        f"Test functions of which every case tried agrees, rules relaxed included: {whole}. Not "
        f"tried: {left['no parameters']} whose parameters AWS draws at random or reads from files "
        "that are not published and that have none here, "
        + ", ".join(f"{n} ({why})" for why, n in left.items() if why and why != "no parameters")
        + "."
    )
    yield ""
    yield from _kernel_table(functions)
    yield from _function_table(functions)
    yield from _refusals(cases)
    yield from _others(cases)


def _all_agree(facts: dict[str, Any]) -> bool:
    found = [outcome_of(e) for e in facts["tried"].values()]
    return bool(found) and all(o in ("agrees", "relaxed") for o in found)


def _kernel_table(functions: dict[str, Any]) -> Iterator[str]:
    """The kernels of `KERNELS`, all of their test functions together."""
    yield "| Kernel | tried | " + " | ".join(COLUMNS.values()) + " |"
    yield "|---|--:|" + "--:|" * len(COLUMNS)
    for kernel in KERNELS:
        entries = [
            entry
            for name, facts in functions.items()
            if name.partition("::")[0].endswith(f"/test_{kernel}")
            for entry in facts["tried"].values()
        ]
        found = Counter(map(outcome_of, entries))
        counts = " | ".join(str(found[key] or "") for key in COLUMNS)
        yield f"| {kernel} | {len(entries)} | {counts} |"
    yield ""


def _function_table(functions: dict[str, Any]) -> Iterator[str]:
    yield "| Test | cases | tried | " + " | ".join(COLUMNS.values()) + " | largest error / limit |"
    yield "|---|--:|--:|" + "--:|" * len(COLUMNS) + "--:|"
    for name, facts in functions.items():
        found = Counter(outcome_of(e) for e in facts["tried"].values())
        counts = " | ".join(str(found[key] or "") for key in COLUMNS)
        file, _, method = name.partition("::")
        shown = f"`{file.split('/')[-1]}` {method.rpartition('.')[2]}"
        note = facts["skipped"]
        ratio = "" if note else _ratio(facts["tried"].values())
        yield f"| {shown} | {facts['cases']} | {len(facts['tried']) or note} | {counts} | {ratio} |"
    yield ""


def _ratio(entries: Any) -> str:
    """The largest part of its limit that an agreeing case's error takes."""
    parts = [
        e["error"] / e["limit"] if e["limit"] else 0.0
        for entry in entries
        if (e := entry if entry["status"] == "agrees" else entry.get("relaxed", {})).get("status")
        == "agrees"
    ]
    return f"{max(parts):.2f}" if parts else ""


def _refusals(cases: dict[tuple[str, str], dict[str, Any]]) -> Iterator[str]:
    """Rules that refuse AWS's kernels."""
    rules: dict[str, list[tuple[str, dict[str, Any]]]] = defaultdict(list)
    for (name, _), entry in cases.items():
        for rule in entry.get("relaxed", {}).get("rules", {entry.get("rule", ""): ""}):
            if entry["status"] == "refused":
                rules[rule].append((name, entry))
    yield from ("Rules of the simulator that refuse AWS's kernels:", "")
    yield "| Rule | functions | cases | agree without it | AWS's kernels | AWS's documents |"
    yield "|---|--:|--:|--:|---|---|"
    for rule, found in sorted(rules.items(), key=lambda x: -len(x[1])):
        does, say = VERDICTS[rule]
        good = sum(outcome_of(entry) == "relaxed" for _, entry in found)
        names = len({name for name, _ in found})
        yield f"| `{rule}` | {names} | {len(found)} | {good} | {does} | {say} |"
    yield ""


def _others(cases: dict[tuple[str, str], dict[str, Any]]) -> Iterator[str]:
    """What neither agrees nor is refused, by message."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (name, _), entry in cases.items():
        status = outcome_of(entry)
        if status in ("differs", "fails", "too large"):
            found = entry if entry["status"] != "refused" else entry["relaxed"]
            where = {"test": "in AWS's test", "kernel": "in AWS's kernel"}.get(
                found.get("where", ""), ""
            )
            text = found["message"].replace("|", "\\|")[:160]
            groups[COLUMNS[status], f"{where}: {text}" if where else text].append(
                name.rpartition(".")[2]
            )
    yield from (
        "What differs, fails or is too large:",
        "",
        "| | Message | Tests |",
        "|---|---|---|",
    )
    for (status, text), names in sorted(groups.items()):
        listed = ", ".join(f"`{n}` ({c})" for n, c in Counter(names).items())
        yield f"| {status} | {text} | {listed} |"
    yield ""


def main(argv: list[str] | None = None) -> int:
    """Write the section between the markers; 1 when there are no markers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", action="store_true", help="run the examples first")
    args = parser.parse_args(argv)
    record = json.loads(EXAMPLES.read_text()) if EXAMPLES.exists() else {}
    if args.run:
        run_examples(record)
        EXAMPLES.write_text(json.dumps(record, indent=1) + "\n")
    text = DOCUMENT.read_text()
    if BEGIN not in text or END not in text:
        print(f"{DOCUMENT} lacks {BEGIN} and {END}", file=sys.stderr)
        return 1
    lines = list(library_section(json.loads(RECORD.read_text())))
    for repository in TITLES:
        if repository in record:
            lines += example_section(repository, record[repository])
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    DOCUMENT.write_text(before + BEGIN + "\n" + "\n".join(lines) + "\n" + END + after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
