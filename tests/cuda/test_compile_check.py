"""The compile check: what it reads from machine code, and that every kernel has its plans."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from nsa_neuron import compile_check
from nsa_neuron.backends.cuda import plans
from nsa_neuron.backends.cuda.kernel_table import KERNELS, PACKED_KERNELS, Shape
from nsa_neuron.toolchain import KernelPackage

LISTING = """
        /*0000*/                   LDL R1, [R2] ;                    /* 0x0000000402017983 */
        /*0010*/                   STL [R2], R1 ;                    /* 0x0000000102007387 */
        /*0020*/              @!P0 LDL.64 R4, [R2+0x8] ;             /* 0x0000080002048983 */
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], !UPT ;
        /*0040*/               @P1 BRA 0x10 ;                        /* 0xffffffd000007947 */
        /*0050*/                   LDL R9, [R2] ;                    /* 0x0000000402017983 */
        /*0060*/                   EXIT ;                            /* 0x000000000000794d */
        /*0070*/                   BRA 0x70;                         /* 0xfffffffc00fc7947 */
"""


def entry(op: str, kernel: str):
    return next(e for e in KERNELS if (e.op, e.kernel) == (op, kernel))


def test_spills_are_counted_inside_loops_only():
    assert compile_check.spills_in_loops(LISTING) == 2


def test_no_spills_without_a_loop():
    assert compile_check.spills_in_loops(LISTING.replace("@P1 BRA 0x10", "@P1 BRA 0x50")) == 0


@pytest.mark.parametrize("device", plans.DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dims", [(128, 128), (192, 128), (80, 256)])
def test_every_kernel_has_a_plan_and_all_its_constants(device, dtype, dims):
    """A constant that neither plan nor launcher gives would be taken for a pointer."""
    package = KernelPackage("cuda_kernels")
    for e in KERNELS:
        function = getattr(package.load(e.module), e.kernel)
        for group in (1, 4, 5, 16, 64):
            if not e.min_group <= group <= e.max_group:
                continue
            found = plans.find(device, e.op, dk=dims[0], dv=dims[1], dtype=dtype, group=group)
            constants = e.constants(Shape(*dims, group, found[e.plan or e.kernel]))
            wanted = {p.name for p in function.params if p.is_constexpr}
            assert wanted <= set(constants), (e.op, e.kernel)


def test_packed_variants_are_other_kernels_under_other_names():
    for e in PACKED_KERNELS:
        unpacked = entry(e.op, e.kernel)
        found = plans.find("h200", e.op, dk=128, dv=128, dtype="bfloat16", group=4)
        shape = Shape(128, 128, 4, found[e.plan or e.kernel])
        assert unpacked.constants(shape)["PACKED"] is False
        assert e.constants(shape) == unpacked.constants(shape) | {"PACKED": True}
        assert e.label == f"{unpacked.label} packed"


def test_no_plan_says_what_is_missing():
    with pytest.raises(plans.PlanError, match="'attention' on device 'h100'"):
        plans.find("h100", "attention", dk=64, dv=64, dtype="float16", group=1)


@pytest.mark.parametrize("error", ["pass", "source"])
def test_a_kernel_that_does_not_compile_is_a_row(monkeypatch, error):
    """The kernels after it are still compiled."""
    import triton

    class NotSupported(triton.compiler.errors.CompilationError):
        def __init__(self):
            super().__init__("def kernel():\n    pass", None, "no such\nlayout")

    def refuse(source, target, options):
        raise RuntimeError("PassManager::run failed") if error == "pass" else NotSupported()

    monkeypatch.setattr(triton, "compile", refuse)
    rows = compile_check.run(
        [entry("gated_sum", "forward"), entry("gated_sum", "backward")],
        head_dims=[(128, 128)],
        groups=[1],
    )
    reason = "PassManager::run failed" if error == "pass" else "no such layout"
    assert [row.kernel for row in rows] == ["forward", "backward"]
    assert all(row.verdict.endswith(f"does not compile it: {reason}") for row in rows)
    assert rows[0].shared_bytes is None and rows[0].wgmma is None


@pytest.mark.slow
def test_a_kernel_that_fits():
    (row,) = compile_check.run(
        [entry("sliding_window_attention", "forward")], head_dims=[(192, 128)], groups=[16]
    )
    assert row.verdict == "ok"
    assert row.wgmma and row.spills_in_loops == 0
    # q [128, 192] and three stages of k [64, 192] and v [64, 128], two bytes each.
    assert row.shared_bytes == 2 * (128 * 192 + 3 * 64 * (192 + 128))


@pytest.mark.slow
def test_a_kernel_that_does_not_fit(monkeypatch):
    constants = {"BLOCK_M": 64, "BLOCK_N": 128, "UPCAST": False, "PRECISION": "ieee"}
    rows = {"backward_dkv": [{"constants": constants | {"num_warps": 8, "num_stages": 4}}]}
    monkeypatch.setattr(plans, "load", lambda device, op: rows)
    (row,) = compile_check.run(
        [entry("attention", "backward_dkv")], head_dims=[(192, 128)], groups=[16]
    )
    assert "shared memory" in row.verdict and "spill instructions inside loops" in row.verdict
