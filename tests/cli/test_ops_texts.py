"""What `nsa ops` prints."""

from __future__ import annotations

import json

from nsa_neuron.cli import main, ops


def lines(text: str) -> list[str]:
    return text.strip("\n").split("\n")


ROW = {
    "op": "blend", "summary": "Blends things.", "backward": "blend_backward",
    "args": [
        {"name": "x", "optional": False, "kind": "tensor", "dims": "B S|S", "dtype": "float"},
        {"name": "w", "optional": True, "kind": "tensor", "dims": "B", "dtype": "int32"},
        {"name": "n", "optional": False, "kind": "int", "symbol": "n", "default": 16},
        {"name": "len", "optional": False, "kind": "int", "symbol": ""},
    ],
    "returns": [{"name": "o", "shape": [1, 2], "dtype": "bfloat16"},
                {"name": "lse", "shape": [], "dtype": "float32"}],
    "cost": {"flops": 3_000_000_000, "bytes": 1_500_000},
}  # fmt: skip


def test_an_op_s_page() -> None:
    assert lines(ops._page(ROW)) == [
        "blend: Blends things.",
        "argument  type   dims or symbol  default",
        "--------  -----  --------------  -------",
        "x         float  [B, S] or [S]",
        "w         int32  [B]",
        "n         int    n               16",
        "len       int",
        "returns o bfloat16[1, 2], lse float32[]",
        "costs 3.00 GFLOP and 1.5 MB at these sizes: 2000.0 FLOP/byte",
    ]


def test_the_overview_of_ops() -> None:
    assert lines(ops._overview([ROW])) == [
        "op     must be given  returns  GFLOP  MB   FLOP/byte",
        "-----  -------------  -------  -----  ---  ---------",
        "blend  x, len         o, lse   3.00   1.5  2000.0",
        "Costs are counted at the default sizes or those of --size; `nsa ops NAME` says more.",
    ]


def test_data_of_an_op_is_whole(capsys) -> None:
    words = ["--size", "S=64", "Hq=2", "Dk=8", "Dv=4", "B=3", "--dtype", "fp16", "--json"]
    assert main(["ops", "sliding_window_attention", "gated_sum", *words, "--set", "window=5"]) == 2
    assert "gated_sum has no scalar argument 'window'; it has none" in capsys.readouterr().err
    assert main(["ops", "sliding_window_attention", *words, "--set", "window=5"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["op"] == "sliding_window_attention" and row["summary"].endswith(".")
    assert row["backward"] == "sliding_window_attention_backward"
    args = {arg["name"]: arg for arg in row["args"]}
    assert args["q"] == {
        "name": "q", "optional": False, "kind": "tensor", "dims": "B S Hq Dk", "dtype": "float"
    }  # fmt: skip
    assert args["cu_seqlens_q"]["optional"] and args["cu_seqlens_q"]["dtype"] == "int32"
    assert (args["window"]["kind"], args["window"]["symbol"], args["window"]["default"]) == (
        "int", "w", 512
    )  # fmt: skip
    assert row["returns"] == [
        {"name": "o", "shape": [3, 64, 2, 4], "dtype": "float16"},
        {"name": "lse", "shape": [3, 64, 2], "dtype": "float32"},
    ]
    assert row["call"]["dtype"] == "float16" and row["call"]["shapes"]["k"] == [3, 64, 1, 8]
    assert args["q"].keys() & {"default", "symbol"} == set()
    assert main(["ops", "attention_backward", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert {arg["name"]: arg["dtype"] for arg in row["args"] if "dtype" in arg}["lse"] == "float32"


def test_scalars_of_some_op_are_taken_by_the_ops_that_have_them(capsys) -> None:
    """Of an overview; of an op that is named, what it has not is refused."""
    costs = []
    for window in (1, 2):
        assert main(["ops", "--set", f"window={window}", "--json"]) == 0
        rows = {row["op"]: row["cost"]["flops"] for row in json.loads(capsys.readouterr().out)}
        costs.append((rows["sliding_window_attention"], rows["attention"]))
    assert costs[0][0] < costs[1][0] < 2 * costs[0][0] and costs[0][1] == costs[1][1]
