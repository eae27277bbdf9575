"""The compile check: what it reads from machine code, and that every kernel has its plans."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton")

from nsa_neuron import compile_check
from nsa_neuron.backends.cuda import plan_points, plans
from nsa_neuron.backends.cuda.kernel_table import EVERY_KERNEL, KERNELS, PACKED_KERNELS, Shape
from nsa_neuron.backends.cuda.plan_points import Point
from nsa_neuron.cli import main
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


def check(op: str, kernel: str, dk=192, dv=128, dtype="bfloat16", group=16):
    """The row of one kernel at one call."""
    job = compile_check.job_at(entry(op, kernel), Point(dk, dv, dtype, group))
    return compile_check.compile_job(job)


def test_spills_are_counted_inside_loops_only():
    assert compile_check.spills_in_loops(LISTING) == 2


def test_no_spills_without_a_loop():
    assert compile_check.spills_in_loops(LISTING.replace("@P1 BRA 0x10", "@P1 BRA 0x50")) == 0


def test_a_loop_holds_its_first_and_last_instruction():
    """Spills at a branch's target are inside; one instruction before is outside."""
    at, after = (LISTING.replace("@P1 BRA 0x10", f"@P1 BRA {x}") for x in ("0x0", "0x20"))
    assert compile_check.spills_in_loops(at) == 3
    assert compile_check.spills_in_loops(after) == 1


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
    with pytest.raises(plans.PlanError, match="'attention' on device 'b200'"):
        plans.find("b200", "attention", dk=64, dv=64, dtype="float16", group=1)


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
    entries = [entry("gated_sum", "forward"), entry("gated_sum", "backward")]
    todo = [compile_check.job_at(e, Point(128, 128, "bfloat16", 1)) for e in entries]
    rows = list(compile_check.run(todo))
    reason = "PassManager::run failed" if error == "pass" else "no such layout"
    assert [row.kernel for row in rows] == ["forward", "backward"]
    assert all(row.verdict.endswith(f"does not compile it: {reason}") for row in rows)
    assert rows[0].shared_bytes is None and rows[0].products is None


def test_every_plan_row_is_compiled():
    rows = plan_points.rows_of("h200")
    assert len(rows) > 50 and {op for op, _, _ in rows} == {e.op for e in KERNELS}
    assert plan_points.rows_reached(EVERY_KERNEL, "h200") == rows


def test_a_row_that_nothing_reaches_is_missed(monkeypatch):
    """A row behind one that takes all of its calls, and a row of a kernel that no entry has."""
    shipped = plans.load("h200", "gated_sum")
    dead = [*shipped["forward"], {"max_dk": 64, "constants": {}}]
    other = {**shipped, "forward": dead, "no_such_kernel": [{"constants": {}}]}
    load = plans.load
    monkeypatch.setattr(plans, "load", lambda d, op: other if op == "gated_sum" else load(d, op))
    missed = plan_points.rows_of("h200") - plan_points.rows_reached(EVERY_KERNEL, "h200")
    assert missed == {("gated_sum", "forward", 1), ("gated_sum", "no_such_kernel", 0)}


def test_a_row_is_compiled_at_its_widest(monkeypatch):
    rows = [
        {"dtypes": ["float32"], "max_dk": 128, "max_dv": 64, "constants": {"a": 1}},
        {"max_dk": 192, "min_g": 3, "max_g": 6, "constants": {"a": 2}},
        {"constants": {"a": 3}},
    ]
    monkeypatch.setattr(plans, "load", lambda device, op: {"forward": rows})
    found = plan_points.points(entry("attention", "forward"), "h200")
    assert {
        Point(128, 64, "float32", 16), Point(192, 256, "bfloat16", 3),
        Point(256, 256, "bfloat16", 16),
    } <= set(found)  # fmt: skip


@pytest.mark.parametrize(
    ("bounds", "group"),
    [({"max_g": 1}, 1), ({"max_g": 3}, 1), ({"min_g": 5, "max_g": 7}, 5), ({"min_g": 33}, 33)],
)
def test_a_row_for_unusual_groups_is_compiled(bounds, group, monkeypatch):
    """A row without a least or a largest group takes all of them."""
    rows = [{**bounds, "constants": {"a": 1}}, {"constants": {"a": 2}}]
    monkeypatch.setattr(plans, "load", lambda device, op: {"forward": rows})
    forward = entry("gated_sum", "forward")
    forward = replace(forward, min_group=1, max_group=1024)
    found = [p for p in plan_points.points(forward, "h200") if p.row("h200", forward) == 0]
    assert Point(256, 256, "bfloat16", group) in found


@pytest.mark.parametrize(
    ("op", "kernel"), [("compressed_attention", "backward_dkv"), ("compress", "column_sum")]
)
def test_parts_are_added_up_by_kernels_for_as_many_as_the_plans_have(op, kernel):
    planned = {row["constants"]["SPLITS"] for row in plans.load("h200", op)[kernel]}
    shape = Shape(192, 128, 16, {})
    adders = [e for e in KERNELS if (e.op, e.kernel) == (op, "reduce_splits")]
    assert {e.constants(shape)["SPLITS"] for e in adders} == planned


def test_every_kernel_is_compiled_for_every_dtype():
    for e in KERNELS:
        found = {point.dtype for point in plan_points.points(e, "h200")}
        assert found == {"bfloat16", "float16", "float32"}, e
        dims = {(p.dk, p.dv) for p in plan_points.points(e, "h200") if p.dtype == "bfloat16"}
        assert dims >= {(192, 128), (128, 128)}, e


def test_everything_is_more():
    few, every = compile_check.jobs(), compile_check.jobs(full=True)
    assert len(every) > 4 * len(few)
    packed = {job.point.dtype for job in every if job.entry.packed}
    assert packed == {"bfloat16", "float16", "float32"}


FAST = {
    "excess_work": 1.0, "narrowest": 64, "narrow_lines": (), "serialised": False,
    "waiting_gathers": (),
}  # fmt: skip
MEASURED = {"shared_bytes": 1000, "spills_in_loops": 0, **FAST}


@pytest.mark.parametrize(
    "op, kernel, dtype, products, problem",
    [
        ("attention", "forward", "bfloat16", "mma", "are mma, not wgmma"),
        ("attention", "forward", "float32", "mma", "not exact"),
        ("attention", "forward", "float32", "fma", ""),
        ("compressed_attention", "forward", "float32", "fma", "are fma, not mma"),
        ("compress", "linear_forward", "float32", "wgmma", ""),
        ("decode", "score", "float16", "fma", "are fma, not mma"),
        ("gated_sum", "forward", "float16", "fma", ""),
    ],
)
def test_which_products_are_demanded(op, kernel, dtype, products, problem):
    job = compile_check.job_at(entry(op, kernel), Point(192, 128, dtype, 16))
    measured = MEASURED | {"products": products}
    found = compile_check.find_problems(job.entry, job.arguments, dtype, measured)
    assert len(found) == bool(problem) and all(problem in text for text in found)


LIMITS = [
    ({"shared_bytes": 232_448}, ()),
    ({"shared_bytes": 232_449}, ("shared memory 232449 > 232448 bytes",)),
    ({"spills_in_loops": 1}, ("1 spill instructions inside loops",)),
    ({"products": "mma"}, ("matrix products are mma, not wgmma",)),
    (
        {"shared_bytes": 1 << 20, "spills_in_loops": 2, "products": "fma"},
        (
            "shared memory 1048576 > 232448 bytes", "2 spill instructions inside loops",
            "matrix products are fma, not wgmma",
        ),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("change", "problems"), LIMITS, ids=str)
def test_what_a_gpu_would_refuse_at_its_limit(change, problems):
    job = compile_check.job_at(entry("attention", "forward"), Point(192, 128, "bfloat16", 16))
    measured = {**MEASURED, "products": "wgmma", **change}
    assert compile_check.find_problems(job.entry, job.arguments, "bfloat16", measured) == problems


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"excess_work": 1.0, "narrowest": 64}, ""),
        ({"excess_work": 1.01}, "excess"),
        ({"narrowest": 32, "narrow_lines": ("kernel.py:3",)}, "narrow"),
        ({"serialised": True}, "serialised"),
        ({"waiting_gathers": ("kernel.py:7",)}, "gather"),
    ],
    ids=str,
)
def test_what_would_run_slowly_is_a_problem_unless_the_plan_accepts_it(change, name):
    found = compile_check.find_slow({**MEASURED, **change})
    assert list(found) == [name] * bool(name)
    problems, accepted = compile_check.sift(found, {})
    assert list(problems) == list(found.values()) and not accepted
    problems, accepted = compile_check.sift(found, {name: "no room"})
    assert problems == () and accepted == {name: f"{found[name]}: no room" for name in found}


@pytest.mark.parametrize(
    ("said", "serialised"),
    [
        ("(C7514) Potential Performance Loss: wgmma.mma_async instructions are serialized due to "
         "non wgmma instructions reading accumulator registers of a wgmma", True),
        ("(C7515) Potential Performance Loss: anything", True),
        ("Used 255 registers, used 1 barriers", False),
    ],
)  # fmt: skip
def test_every_reason_for_serialised_products_is_one(said, serialised):
    """ptxas's number is the reason: C7514 with tiles that overlap, C7515 with negative bounds."""
    assert compile_check.is_serialised(f"ptxas info    : {said}") == serialised


def test_lines_are_named():
    slow = {"narrowest": 16, "narrow_lines": ("a.py:3", "a.py:9"), "waiting_gathers": ("b.py:7",)}
    found = compile_check.find_slow({**MEASURED, **slow})
    assert found["narrow"] == "wgmma of 16 < 64 columns at a.py:3, a.py:9"
    assert found["gather"].endswith("at b.py:7")


@pytest.mark.parametrize("shown", [True, False])
def test_a_reason_that_has_outlived_its_cause_is_told(monkeypatch, capsys, shown):
    def compiled(function, e, arguments, dtype):
        read = {"shared_bytes": 8, "registers": 8, "local_bytes": 0, "spills_in_loops": 0}
        return read | {"products": "wgmma", **FAST, "excess_work": 1.5 if shown else 1.0}

    jobs = compile_check.jobs([entry("gated_sum", "forward")])
    jobs = [replace(job, accepts={"excess": "no room"}) for job in jobs]
    monkeypatch.setattr(compile_check, "jobs", lambda full: jobs)
    monkeypatch.setattr(compile_check, "compile_kernel", compiled)
    assert main(["compile-check", "--processes", "1"]) == (0 if shown else 1)
    out, err = capsys.readouterr()
    assert ("1.50 times the products that the tiles need: no room" in out) == shown
    assert ("accepts 'excess', which no call of it shows" in err) == (not shown)


@pytest.mark.parametrize("words", [[], ["--json"]])
@pytest.mark.parametrize(("shared", "code"), [(232_448, 0), (232_449, 1)])
def test_one_kernel_with_a_problem_is_exit_code_1(monkeypatch, capsys, shared, code, words):
    """Of many: the last one does not fit."""

    def compiled(function, e, arguments, dtype):
        read = {"shared_bytes": next(sizes), "registers": 8, "local_bytes": 0}
        return read | {"spills_in_loops": 0, "products": "wgmma", **FAST}

    todo = [e for e in KERNELS if e.op == "gated_sum"]
    jobs = compile_check.jobs(todo)
    sizes = iter([1000] * (len(jobs) - 1) + [shared])
    monkeypatch.setattr(compile_check, "jobs", lambda full: jobs)
    monkeypatch.setattr(compile_check, "compile_kernel", compiled)
    assert main(["compile-check", "--processes", "1", *words]) == code
    assert ("shared memory 232449" in capsys.readouterr().out) == bool(code)


def test_what_is_not_wgmma_says_why():
    for job in compile_check.jobs():
        wanted, reason = job.entry.products(job.point.dtype, job.arguments)
        assert (wanted == "wgmma") == (reason == ""), job


def test_what_cuobjdump_does_not_say_is_told():
    usage = " Function f:\n  REG:128 STACK:16 SHARED:0 LOCAL:8 CONSTANT[0]:564"
    assert [compile_check._field(name, usage) for name in ("REG", "STACK", "LOCAL")] == [
        "128", "16", "8",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no 'REGISTERS:'"):
        compile_check._field("REGISTERS", usage)


@pytest.mark.parametrize(("rows", "wanted"), [(32, "mma"), (64, "wgmma")])
def test_one_token_of_fewer_rows_than_wgmma_has_needs_none(rows, wanted):
    constants = {"QUERIES": 1, "BLOCK_M": rows, "PRECISION": "ieee"}
    assert entry("selected_attention", "forward").products("float16", constants)[0] == wanted


@pytest.mark.parametrize("group", [1, 4, 5, 16, 32, 33, 64])
def test_kernels_are_compiled_with_a_flag_where_the_plans_let_the_overlap_decide(group):
    wanted = {"dk": 192, "dv": 128, "dtype": "bfloat16", "group": group}
    strategy = plans.find("h200", "selected_attention", **wanted)["dispatch"]["strategy"]
    constants = entry("selected_attention", "sum_chunks").constants(Shape(192, 128, group, {}))
    assert constants["MEASURED"] is (strategy == "by_overlap")


def test_the_gated_sum_is_compiled_with_and_without_deltas():
    kernels = [e for e in KERNELS if (e.op, e.kernel) == ("gated_sum", "backward")]
    flags = {e.variant: e.constants(Shape(128, 128, 1, {}))["DELTA"] for e in kernels}
    assert flags == {"": False, "with deltas": True}


@pytest.mark.slow
def test_several_processes_give_the_same_rows():
    todo = compile_check.jobs([entry("gated_sum", "forward")])[:2]
    assert len(todo) == 2
    assert list(compile_check.run(todo, 2)) == list(compile_check.run(todo))


@pytest.mark.slow
def test_a_kernel_that_fits():
    row = check("sliding_window_attention", "forward")
    assert row.verdict == "ok" and row.exempt == ""
    assert row.products == "wgmma" and row.spills_in_loops == 0
    # q [64, 192] and two stages of k [64, 192] and v [64, 128], two bytes each.
    assert row.shared_bytes == 2 * (64 * 192 + 2 * 64 * (192 + 128))


@pytest.mark.slow
def test_a_kernel_that_does_not_fit(monkeypatch):
    constants = {"BLOCK_M": 64, "BLOCK_N": 128, "UPCAST": False, "PRECISION": "ieee"}
    rows = {"backward_dkv": [{"constants": constants | {"num_warps": 8, "num_stages": 4}}]}
    monkeypatch.setattr(plans, "load", lambda device, op: rows)
    row = check("attention", "backward_dkv")
    assert "shared memory" in row.verdict and "spill instructions inside loops" in row.verdict
