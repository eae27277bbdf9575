"""What the compile check reads from Triton's GPU IR: products, their work, gathers that wait."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from nsa_neuron.backends.cuda import gpu_ir

MMA = "#ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0, "
LAYOUTS = f"""
#mma = {MMA}warpsPerCTA = [8, 1], instrShape = [16, 16, 16]}}>
#mma1 = {MMA}warpsPerCTA = [4, 2], instrShape = [16, 64, 16]}}>
#loc1 = loc("/a/kernels/common.py":32:24)
#loc2 = loc("/a/kernels/window.py":277:4)
#loc3 = loc("dk"(#loc2))
#loc4 = loc(callsite(#loc1 at #loc3))
#loc5 = loc("/a/kernels/window.py":283:4)
"""
DOT = "ttng.warp_group_dot"
A, B = "!ttg.memdesc<64x128xbf16, #shared, #smem>", "!ttg.memdesc<128x32xbf16, #shared2, #smem>"
TWICE = f"    %s = {DOT} %a, %b, %c : {A} * {B} -> tensor<64x32xf32, #mma> loc(#loc4)"
P = "tensor<64x32xbf16, #ttg.dot_op<{opIdx = 0, parent = #mma1, kWidth = 2}>>"
V = "!ttg.memdesc<32x128xbf16, #shared, #smem, mutable>"
ONCE = f"    %o = {DOT} %p, %v, %acc : {P} * {V} -> tensor<64x128xf32, #mma1> loc(#loc5)"


def ir(*lines: str) -> str:
    return "\n".join([LAYOUTS, *lines])


def test_tiles_width_duplicates_and_line():
    """Eight warps of 16 rows on a tile of 64: every element is computed twice."""
    twice, once = gpu_ir.products(ir(TWICE, ONCE))
    assert (twice.m, twice.n, twice.k, twice.width, twice.duplicates) == (64, 32, 128, 16, 2)
    assert (once.m, once.n, once.k, once.width, once.duplicates) == (64, 128, 32, 64, 1)
    assert (twice.line, once.line) == ("window.py:277", "window.py:283")


def test_excess_work():
    products = gpu_ir.products(ir(TWICE, ONCE))
    assert gpu_ir.excess_work(products) == 1.5
    assert gpu_ir.excess_work(products[1:]) == 1.0
    assert gpu_ir.excess_work([]) == 1.0


PLACE = "tensor<32x!tt.ptr<i32>, #b>"
ROWS = "tensor<32x128x!tt.ptr<bf16>, #b>"
IDS = f"      %ids = tt.load %where : {PLACE} loc(#loc2)"
ADDRESS = f"      %at = tt.addptr %base, %ids : {ROWS}, tensor<32x128xi32, #b> loc(#loc2)"
COPY = (
    f"      %t = ttg.async_copy_global_to_local %at, %buffer : {ROWS} -> <32x128xbf16> loc(#loc5)"
)
LOAD = f"      %t = tt.load %at : {ROWS} loc(#loc5)"
BEGIN = "    %r:2 = scf.for %i = %lo to %hi step %st iter_args(%ids = %first) -> (i32)  : i32 {"
END = "    } loc(#loc2)"


@pytest.mark.parametrize("gather", [COPY, LOAD])
def test_a_gather_behind_a_load_of_its_iteration(gather):
    assert gpu_ir.waiting_gathers(ir(BEGIN, IDS, ADDRESS, gather, END)) == ["window.py:283"]


def test_a_gather_far_behind_a_load_of_its_iteration():
    """Between the ids and the address lies arithmetic, of which only the last step names them."""
    far = [
        "      %wide = arith.extsi %ids : i32 to i64 loc(#loc2)",
        "      %row = arith.muli %wide, %stride : i64 loc(#loc2)",
        ADDRESS.replace("%base, %ids", "%base, %row"),
    ]
    assert gpu_ir.waiting_gathers(ir(BEGIN, IDS, *far, COPY, END)) == ["window.py:283"]


@pytest.mark.parametrize("gather", [COPY, LOAD])
def test_ids_that_the_last_iteration_loaded(gather):
    ahead = IDS.replace("%ids =", "%next =")
    assert gpu_ir.waiting_gathers(ir(BEGIN, ADDRESS, gather, ahead, END)) == []


def test_a_load_in_front_of_the_loop_or_of_a_vector():
    assert gpu_ir.waiting_gathers(ir(IDS, BEGIN, ADDRESS, COPY, END)) == []
    vector = COPY.replace("32x128x", "32x")
    assert gpu_ir.waiting_gathers(ir(BEGIN, IDS, ADDRESS, vector, END)) == []


def test_inner_loops_are_loops_of_their_own():
    inner = [f"  {line}" for line in (BEGIN, IDS, ADDRESS, COPY, END)]
    assert gpu_ir.waiting_gathers(ir(BEGIN, *inner, END)) == ["window.py:283"]
