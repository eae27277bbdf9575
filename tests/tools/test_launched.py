"""Counts of launches and torch operations are those of the document; what is compiled ahead."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tools import host_time, launched, prewarm
from tools.peers.problem import Heads

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/performance.md"
GPU_PAGE = ROOT / "docs/gpu.md"
SMALL = Heads(16, 1, 64, 64)


def documented() -> dict[tuple[str, str], list[int]]:
    """(call, pass) to the counts before and now: Triton, torch kernels, torch operations."""
    text = PAGE.read_text().split("<!-- launches -->")[1].split("<!-- /launches -->")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    return {
        (row[0], row[1]): [int(x) for x in row[2:]] for row in rows if row and row[-1].isdigit()
    }


def test_the_documents_counts_are_what_the_launchers_do():
    now = {}
    for line in launched.table():
        call, name, *counts = [cell.strip() for cell in line.split("|")[1:-1]]
        now[call, name] = [int(x) for x in counts]
    pages = {key: counts[1::2] for key, counts in documented().items()}
    assert pages == now, "python -m tools.launched; docs/performance.md"


def test_a_pass_launches_at_most_half_of_what_it_did():
    for key, (triton_before, triton_now, torch_before, torch_now, all_before, all_now) in (
        documented().items()
    ):  # fmt: skip
        assert 2 * (triton_now + torch_now) <= triton_before + torch_before, key
        assert 2 * all_now <= all_before, key


def test_lists_are_made_once_per_pass():
    done = launched.passes(SMALL, 4096)
    for name, cuts in (("forward", 1), ("backward", 1)):
        names = [launch.name.split(".")[1] for launch in done[name].launches]
        found = [names.count(k) for k in ("count_pairs", "sum_chunks", "cut_lists", "place_pairs")]
        assert found in ([1, 1, cuts, 1], [0, 0, 0, 0]), (name, names)


@pytest.mark.parametrize(("sequences", "each"), [(0, 1), (4, 3)])
def test_compressing_launches_no_torch_kernel(sequences, each):
    done = launched.passes(SMALL, 4096, sequences)["compress"]
    assert (len(done.launches), done.on_device) == (2 * each, 0), "of keys and of values"


def test_torch_operations_are_counted_where_they_run():
    done = launched.Pass()
    done.operations.update({"empty": 2, "view": 3, "sort": 1, "cumsum": 2})
    assert done.on_device == 3


def test_variants_are_what_triton_specialises_on():
    one, two = ({launch.name: launch.variant for launch in launched.passes(SMALL, n)["forward"]
                 .launches} for n in (4096, 4096 + 512))  # fmt: skip
    name = "sliding_window_attention.forward"
    assert one[name] == two[name], "both lengths are multiples of 16"
    odd = {
        launch.name: launch.variant for launch in launched.passes(SMALL, 4097)["forward"].launches
    }
    assert odd[name] != one[name]


def test_the_page_has_the_estimates():
    rows = re.findall(r"^\| `([\w-]+)` \| [^|]+ \| (\d+) \| (\d+) \|$", GPU_PAGE.read_text(), re.M)
    found = [(step, int(compiles), int(seconds)) for step, compiles, seconds in rows]
    want = [(row["step"], row["compiles"], row["seconds"]) for row in prewarm.estimates()]
    assert found[0][0] == "machine" and found[1:] == want, "tools/h200.sh --estimate; docs/gpu.md"
    assert sum(seconds for _, _, seconds in found) < 520, "the first call of ten minutes"


def test_what_is_compiled_ahead_is_named_by_kernel():
    found = prewarm.everything(SMALL, 4096, "h200")
    names = {launch.name for launch in found.values()}
    for op in ("attention", "selected_attention", "compressed_attention"):
        assert {f"{op}.forward", f"{op}.backward_dkv", f"{op}.backward_delta"} <= names
    assert {"decode.score", "decode.attend", "select_blocks.forward", "gated_sum.add"} <= names
    assert len(found) == len({launch.variant for launch in found.values()})


def test_compiling_ahead_records_why_a_kernel_does_not(monkeypatch):
    """In the process that compiles; without a GPU, Triton itself is the reason."""
    monkeypatch.setattr(prewarm, "SHAPES", (SMALL,))
    prewarm.variants.cache_clear()
    try:
        variant = next(v for v in prewarm.variants(4096, "h200") if v.startswith("gated_sum.add"))
        name, same, seconds, why = prewarm.compile_one(variant, 4096, "h200")
        assert (name, same) == ("gated_sum.add", variant) and seconds >= 0
        assert "active drivers" in why or not why
    finally:
        prewarm.variants.cache_clear()


def test_host_time_goes_through_tritons_code(monkeypatch):
    """Every launch of the pass arrives where the driver would be called."""
    monkeypatch.setattr(launched, "PAPER", SMALL)
    found = host_time.host_times(4096, repeats=1)
    done = launched.passes(SMALL, 4096)
    for name, (launches, us) in found.items():
        assert launches == len(done[name].launches) and us > 0
