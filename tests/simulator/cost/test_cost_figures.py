"""Published figures of Trainium2 and the shapes they belong to, written down a second time.

From docs/trainium2.md 7.1 and 7.3 and the sources that `figures` names: what the model is judged by
changes by decision only. H: held out, C: calibrates a constant, S: shown.
"""

from __future__ import annotations

import numpy as np

from nsa_neuron.simulator.cost.figures import CALIBRATES, CASES, HELD_OUT, SHOWN

ROLES = {HELD_OUT: "H", CALIBRATES: "C", SHOWN: "S"}
# case -> cores, how often it is run, arguments; figures
PUBLISHED = {
    "matmul, loads inside": (
        "1 core, 1 times: 8192x4096:float32 8192x8192:float32",
        [
            "duration 39.89 ms H",
            "DMA active 39.87 ms H",
            "DMA packet time 519.58 ms C",
            "TensorE active 34.82 ms S",
        ],
    ),
    "matmul, loads hoisted": (
        "1 core, 1 times: 8192x4096:float32 8192x8192:float32",
        ["duration 28.2 ms H", "DMA active 28.12 ms C", "DMA packet time 402.07 ms C"],
    ),
    "matmul, blocked": (
        "1 core, 1 times: 8192x4096:float32 8192x8192:float32",
        ["duration 28.3 ms H", "VectorE active 2.99 ms H", "DMA packet time per GB 44.9066 ms H"],
    ),
    "exp [4, 4096] bf16": (
        "1 core, 1 times: 4x4096:bfloat16",
        [
            "load data 1416 ns H",
            "trigger to ScalarE 2746 ns C",
            "activation 3700 ns H",
            "store data 1230 ns H",
        ],
    ),
    "exp [128, 128] bf16, GpSimd triggers": (
        "1 core, 1 times: 128x128:bfloat16 True",
        ["trigger to ScalarE 1500 ns C", "2 KiB on an engine 97 ns C", "store data 239 ns H"],
    ),
    "vector add 256,000 by 2000": (
        "1 core, 1 times: 256000:float32 256000:float32 2000",
        ["total 28.63 us H", "DMA active 9.15 us H", "VectorE add 2241.7 ns C"],
    ),
    "vector add 256,000 by 1000": (
        "1 core, 1 times: 256000:float32 256000:float32 1000",
        ["total 26.42 us H", "DMA active 9.32 us H"],
    ),
    "transpose 1024 x 1024 fp32": (
        "1 core, 1 times: 1024x1024:float32",
        [
            "total 46.66 us H",
            "DMA active 27.95 us H",
            "DMA packet time 394.9 us H",
            "TensorE to ScalarE 36.7 ns C",
        ],
    ),
    "conv 256 x 224 x 224, 3 x 3, fp16": (
        "1 core, 1 times: 256x224x224:float16 256x256x3x3:float16 256x1:float16",
        ["total 782.8 us H"],
    ),
    "the same with 2 x 2 max pool": (
        "1 core, 1 times: 256x224x224:float16 256x256x3x3:float16 256x1:float16 True",
        ["total 781 us H"],
    ),
    "conv 256 x 32 x 16, fp16": (
        "1 core, 1 times: 256x32x16:float16 256x256x3x3:float16 256x1:float16",
        ["total 46.9 us C"],
    ),
    "conv 256 x 32 x 16, fp32": (
        "1 core, 1 times: 256x32x16:float32 256x256x3x3:float32 256x1:float32",
        ["total 68.4 us H"],
    ),
    "vector add 25,600 by [128, 2]": (
        "1 core, 1 times: 25600:float32 25600:float32 2",
        ["p99 latency 186 us S"],
    ),
    "vector add 25,600 by [128, 1]": (
        "1 core, 1 times: 25600:float32 25600:float32 128",
        ["p99 latency 378 us S"],
    ),
    "vector add 25,600 by [128, 200]": (
        "1 core, 1 times: 25600:float32 25600:float32 200",
        ["p99 latency 15 us S"],
    ),
    "vector add, rows of 1": (
        "1 core, 1 times: 2560:float32 2560:float32 1",
        ["per row 1.45715 us S"],
    ),
    "clone 256 MB, both cores": (
        "2 core, 1 times: 65536x2048:bfloat16 32",
        ["HBM bandwidth, clone 579 GB/s C", "HBM bandwidth, device to device 649 GB/s H"],
    ),
    "attention, 88 of 590 blocks of 64 keys": (
        "1 core, 21.67 times: 128x768:bfloat16 672x128x64:bfloat16 672x64x128:bfloat16 "
        "6x88:int32 22",
        ["time 22.2 ms H"],
    ),
    "attention, 44 of 296 blocks of 128 keys, 2 queues": (
        "1 core, 10.83 times: 128x1536:bfloat16 370x128x256:bfloat16 12x44:int32 128 2 1 22",
        ["time 5.04 ms C"],
    ),
    "attention, 44 of 296 blocks of 128 keys, 3 queues": (
        "1 core, 10.83 times: 128x1536:bfloat16 370x128x256:bfloat16 12x44:int32 128 3 1 22",
        ["time 4.09 ms C"],
    ),
    "attention, 66 of 366 blocks of 384 keys": (
        "1 core, 15 times: 128x1152:bfloat16 370x128x768:bfloat16 3x66:int32 384 2 3 11",
        ["time 9.9 ms H"],
    ),
    "attention, unions of 74 blocks of 64 keys": (
        "1 core, 24.5 times: 128x768:bfloat16 672x128x64:bfloat16 672x64x128:bfloat16 "
        "6x74:int32 74 6x2x4736:bfloat16",
        ["time 16.3 ms H"],
    ),
    "attention, unions of 140 blocks of 64 keys": (
        "1 core, 24.5 times: 128x768:bfloat16 672x128x64:bfloat16 672x64x128:bfloat16 "
        "6x140:int32 28 6x2x8960:bfloat16",
        ["time 29 ms H"],
    ),
    "attention_cte, 512 tokens, 16 / 8 heads of 128, causal": (
        "1 core, 1 times: 16x512x128:bfloat16 8x512x128:bfloat16 8x512x128:bfloat16",
        ["device time 0.2463 ms H"],
    ),
    "attention_cte, 1024 tokens, 16 / 8 heads of 128, causal": (
        "1 core, 1 times: 16x1024x128:bfloat16 8x1024x128:bfloat16 8x1024x128:bfloat16",
        ["device time 0.4939 ms H"],
    ),
    "attention_cte, 2048 tokens, 16 / 8 heads of 128, causal": (
        "1 core, 1 times: 16x2048x128:bfloat16 8x2048x128:bfloat16 8x2048x128:bfloat16",
        ["device time 1.1438 ms H"],
    ),
    "attention_cte, 3072 tokens, 16 / 8 heads of 128, causal": (
        "1 core, 1 times: 16x3072x128:bfloat16 8x3072x128:bfloat16 8x3072x128:bfloat16",
        ["device time 1.8484 ms H"],
    ),
    "attention_cte, 4096 tokens, 16 / 8 heads of 128, causal": (
        "1 core, 1 times: 16x4096x128:bfloat16 8x4096x128:bfloat16 8x4096x128:bfloat16",
        ["device time 2.8295 ms C"],
    ),
}


def argument(a):
    if hasattr(a, "shape"):
        return "x".join(map(str, a.shape)) + ":" + np.dtype(a.dtype).name
    return str(a)


def test_figures_are_those_that_were_published():
    found = {
        case.name: (
            f"{case.lnc} core, {case.times:.4g} times: {' '.join(map(argument, case.args))}",
            [f"{f.name} {f.published:.6g} {f.unit} {ROLES[f.role]}" for f in case.figures],
        )
        for case in CASES
    }
    assert found == PUBLISHED


def test_every_figure_says_where_it_is_published():
    assert all(len(f.source) > 20 for case in CASES for f in case.figures)
