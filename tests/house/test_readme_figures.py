"""Figures of the README, and of modelled stages, are those of the newest rows of their kind."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from tools.plot_cpu import latest, of

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
README = " ".join((ROOT / "README.md").read_text().split())
NATIVE = {"Hq": 16, "Hkv": 1, "Dk": 128, "dtype": "float32"}


@cache
def every(pattern: str) -> list[dict[str, Any]]:
    """The rows of all files of this name, in order of their dates."""
    texts = [path.read_text() for path in sorted(RESULTS.glob(pattern))]
    return [json.loads(line) for text in texts for line in text.splitlines()]


@cache
def rows(pattern: str) -> list[dict[str, Any]]:
    """The last row of each measurement there."""
    return latest(every(pattern))


def median(pattern: str, bench: str, name: str, **facts: Any) -> float:
    (row,) = [row for row in of(rows(pattern), bench, **facts) if row["name"] == name]
    found: float = row["median"]
    return found


def said(pattern: str) -> list[float]:
    """Numbers in a sentence of the README; `#` stands for one."""
    number = r"(\d[\d,]*(?:\.\d+)?)"
    found = re.search(re.escape(pattern).replace(r"\#", number), README)
    assert found, f"the README says it otherwise: {pattern}"
    return [float(text.replace(",", "")) for text in found.groups()]


def test_nsa_beside_dense_attention_on_a_cpu() -> None:
    lengths = (4096, 8192, 16384, 65536)
    both = said(
        "#, #, # and # times as fast at 4K, 8K, 16K and 64K tokens forward, "
        "#, #, # and # with gradients"
    )
    for way, told in (("forward", both[:4]), ("forward + backward", both[4:])):
        for tokens, ratio in zip(lengths, told, strict=True):
            facts = {"pass": way, "tokens": tokens, **NATIVE}
            dense, ours = (
                median("cpu-native-*.jsonl", "native", name, **facts)
                for name in ("sdpa", "cpu:native")
            )
            assert round(dense / ours, 2) == ratio, (way, tokens)
    step, dense = said("one decoded token at 256K tokens takes # ms where dense attention takes #")
    facts = {"pass": "decode", "tokens": 262144, **NATIVE}
    assert round(median("cpu-native-*.jsonl", "native", "decode", **facts), 1) == step
    assert round(median("cpu-native-*.jsonl", "native", "sdpa decode", **facts)) == dense


def test_the_cost_of_a_call() -> None:
    def ratio(op: str, mode: str) -> float:
        return round(median("cpu-native-*.jsonl", "overhead", "ratio", op=op, mode=mode), 2)

    modes = ("forward", "forward, grad", "forward + backward")
    three = said("`gated_sum` | # to # | # to # | # to # |")
    for mode, least, most in zip(modes, three[::2], three[1::2], strict=True):
        found = [ratio(op, mode) for op in ("attention", "sliding_window_attention", "gated_sum")]
        assert (min(found), max(found)) == (least, most), mode
    told = said("reads and checks the block ids) | # | # | # |")
    assert told == [ratio("selected_attention", mode) for mode in modes]
    (new,) = said("new block ids at each call | # |")
    (checked,) = said("whose kernel checks them | # |")
    assert new == ratio("selected_attention", "forward, new ids")
    assert checked == ratio("selected_attention", "forward, new ids, checked by the kernel")


def test_whole_models() -> None:
    def of_model(name: str, tokens: int) -> float:
        return median("model-cpu-2*.jsonl", "model", name, tokens=tokens)

    writes = said("128K tokens of context writes # bytes a second beside full attention's #,")
    for name, told in zip(("decode nsa", "decode full"), writes, strict=True):
        assert round(1000 / of_model(name, 131072)) == told
    steps = said("a training step takes # of full attention's at 32K, # at 2K")
    for tokens, told, digits in ((32768, steps[0], 2), (2048, steps[1], 1)):
        share = of_model("train nsa", tokens) / of_model("train full", tokens)
        assert round(share, digits) == told


def test_the_reference() -> None:
    told = said("# times its time at 2K tokens, # at 8K, # at 16K")
    for tokens, ratio in zip((2048, 8192, 16384), told, strict=True):
        found = median("cpu-2*-quiet.jsonl", "attention", "ratio", tokens=tokens)
        assert round(found, 1) == ratio


def test_the_simulator() -> None:
    def measured(name: str) -> float:
        return median("simulator-*-quiet.jsonl", "simulator", name)

    cases = {
        "matmul 1024x1024x1024 bf16": "matmul 1024 x 1024 x 1024, bf16",
        "softmax 4096x4096 fp32": "softmax 4096 x 4096",
        "causal attention 2048x128 bf16": "causal attention 2048 x 128",
    }
    more = said("Profiling adds #, # and # % to a simulation")
    for (name, title), percent in zip(cases.items(), more, strict=True):
        told = said(f"| {title} | # | # |")
        assert [round(measured(name), 2), round(measured(f"{name}, memory"), 2)] == told
        assert round(100 * measured(f"{name}, profiled over simulated") - 100) == percent
    speeds = said(
        "runs at # (attention) and # instructions per second (hoisted matmul; # and # with all"
    )
    kernels = ("attention 12288x128 bf16", "hoisted matmul 4096 fp32")
    levels = ("timed", "timed with band")
    found = [measured(f"shape-only {kernel}, {level}") for level in levels for kernel in kernels]
    assert [round(speed) * 1000 for speed in found] == speeds
    least, most = said("Bookkeeping after a run takes # to # us per instruction")
    each = [
        row["median"] for row in rows("simulator-*-quiet.jsonl") if "bookkeeping" in row["name"]
    ]
    assert (round(min(each), 1), round(max(each), 1)) == (least, most)


PAGE = (ROOT / "docs" / "performance.md").read_text()


def modelled(name: str, **facts: Any) -> dict[str, Any]:
    """The newest row of a forward pass on a core of a Trainium2."""
    facts = {"pass": "forward", "cores": 1, "Dk": 192, **facts}
    found = of(every("trn2-modelled-*.jsonl"), "trn2", **facts)
    return [row for row in found if row["name"] == name][-1]


def shown(told: str, exact: float) -> bool:
    """Whether a number is another one rounded; of large ones four digits are shown."""
    digits = len(told.partition(".")[2])
    near = 0.5 * 10**-digits if digits else max(0.5, 5e-4 * exact)
    return abs(float(told) - exact) <= 1.01 * near


def test_the_modelled_stages_of_a_trainium2() -> None:
    head = re.search(r"^\| stage \| (8K .*) \|$", PAGE, re.MULTILINE)
    assert head
    lengths = [1024 * int(x[:-1]) * (1024 if x[-1] == "M" else 1) for x in head[1].split(" | ")]
    names = ("compress", "compressed_attention", "select_blocks", "selected_attention",
             "sliding_window_attention", "gated_sum")  # fmt: skip
    for name in names:
        line = re.search(rf"^\| {name}\b[^|]*\| (.*) \|$", PAGE, re.MULTILINE)
        assert line, name
        for tokens, told in zip(lengths, line[1].split(" | "), strict=True):
            assert shown(told, modelled(name, tokens=tokens)["central"]), (name, tokens)


def test_the_modelled_whole_in_one_kernel() -> None:
    band = r"([\d.]+) \(([\d.]+) to ([\d.]+)\)"
    how = "(?:unrolled|hardware loops)"
    lines = re.findall(rf"^\| (\d+)K \| {band} \| {band} \| .*{how}", PAGE, re.MULTILINE)
    assert len(lines) >= 5
    for tokens, *numbers in lines:
        for replaced, told in ((0.05, numbers[:3]), (1.0, numbers[3:])):
            row = modelled("nsa_attention", tokens=1024 * int(tokens), replaced=replaced)
            exact = [row[level] for level in ("central", "low", "high")]
            assert all(map(shown, told, exact)), (tokens, replaced, told, exact)


def test_every_measured_row_says_of_what_and_on_what() -> None:
    """Machine, versions, revision and load, so that nobody has to believe a sentence beside it."""
    for path in sorted(RESULTS.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            assert "remark" not in row and row["kind"] in ("measured", "modelled", "absent")
            here = row["environment"]
            assert {"cpu", "cores", "load", "revision", "versions"} <= {*here}, path.name
            assert here["revision"] and here["load"] is not None, path.name
