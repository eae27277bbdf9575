"""Compiles the Triton kernels at every shipped tile plan for an H200, on a machine without a GPU.

What a GPU would refuse or slow down is visible in the machine code: more shared memory than a block
may have, registers spilled to local memory inside a loop, matrix products that are not `wgmma`,
too narrow, done twice or one after the other, gathers that wait for their ids.
`run()` compiles each kernel of `nsa_neuron.backends.cuda.kernel_table` for sm_90 with the plans of
device `h200` and gives one `Row` per kernel and plan. Nothing is executed: this says that a
kernel fits the machine, not how fast or how right it is.
"""

from __future__ import annotations

import contextlib
import functools
import io
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from nsa_neuron.backends.cuda import gpu_ir, plans
from nsa_neuron.backends.cuda.kernel_table import (
    EVERY_KERNEL,
    IEEE_PRODUCT,
    PRODUCTS,
    KernelEntry,
    Shape,
)
from nsa_neuron.backends.cuda.plan_points import Point, points
from nsa_neuron.toolchain import DISTRIBUTION, KernelPackage

SHARED_MEMORY_LIMIT = 232_448
"""Bytes of shared memory one block may use on sm_90 (CUDA C++ Programming Guide, table of compute
capabilities: 227 KiB)."""

_TRITON_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
NARROW = 64
"""Columns below which a wgmma is held up by its left operand in shared memory: 2 KB per 64 x N x 16
product at 128 bytes a cycle (Hopper tuning guide) take as long as 32 columns of arithmetic."""

SERIALISED = ("wgmma.mma_async instructions are serialized", "C7515")
"""What ptxas says of products that wait for each other; its number (C7514, ...) is the reason."""

_MEASURED = (
    *("shared_bytes", "registers", "local_bytes", "spills_in_loops", "products"),
    *("excess_work", "narrowest", "narrow_lines", "serialised", "waiting_gathers"),
)
_REASON_LIMIT = 300
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")


@dataclass(frozen=True)
class Row:
    """What one kernel becomes at one plan.

    Attributes:
        kernel: its name and variant.
        constants: the plan's constants, `num_warps` and `num_stages` included.
        shared_bytes, registers: per block, per thread. Like what follows, None where the kernel
            does not compile.
        local_bytes: stack of a thread; not zero when registers were spilled.
        spills_in_loops: loads and stores of local memory inside a loop body.
        products: the instructions that multiply matrices: `wgmma`, `mma` or neither (`fma`).
        excess_work: multiplications done over those that the tiles need; 1.0 is ideal.
        narrowest: columns of the narrowest wgmma, 0 without any; narrow_lines: where those narrower
            than `NARROW` come from.
        serialised: whether ptxas serialises the wgmma.
        waiting_gathers: lines of loads in loops that wait for a load of the same iteration.
        accepted: findings that the plan's row accepts, by name, with the reason.
        exempt: why they need not be `wgmma`; empty: they must.
        problems: why the verdict is not ok.
    """

    op: str
    kernel: str
    dk: int
    dv: int
    group: int
    dtype: str
    constants: dict[str, Any]
    shared_bytes: int | None
    registers: int | None
    local_bytes: int | None
    spills_in_loops: int | None
    products: str | None
    excess_work: float | None
    narrowest: int | None
    narrow_lines: tuple[str, ...] | None
    serialised: bool | None
    waiting_gathers: tuple[str, ...] | None
    exempt: str
    accepted: dict[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        return "; ".join(self.problems) or "ok"


@dataclass(frozen=True)
class Job:
    """A kernel to compile: with which constants, `planned` being those of the tile plan."""

    entry: KernelEntry
    point: Point
    planned: dict[str, Any]
    arguments: dict[str, Any]
    accepts: dict[str, str]


def job_at(entry: KernelEntry, point: Point, device: str = "h200") -> Job:
    """The job of a kernel at one call.

    Raises:
        PlanError: the kernel has no plan on `device` for this call.
    """
    planned = plans.find(device, entry.op, **asdict(point))[entry.planned]
    shape = Shape(point.dk, point.dv, point.group, planned)
    accepts = plans.accepted(device, entry.op, entry.planned, **asdict(point))
    return Job(entry, point, planned, entry.constants(shape), accepts)


def jobs(
    entries: Iterable[KernelEntry] = EVERY_KERNEL, *, device: str = "h200", full: bool = False
) -> list[Job]:
    """What `plan_points.points` names for `entries`, once for equal constants.

    Raises:
        PlanError: a kernel has no plan on `device`.
    """
    found: dict[tuple[str, ...], Job] = {}
    for entry in entries:
        for point in points(entry, device, full=full):
            job = job_at(entry, point, device)
            key = (entry.op, entry.label, point.dtype, repr(sorted(job.arguments.items())))
            found.setdefault(key, job)
    return list(found.values())


def run(todo: Iterable[Job], processes: int = 1) -> Iterator[Row]:
    """Compiles the jobs, in order.

    Args:
        processes: how many compile at once; 1: this one.

    Raises:
        ToolchainError: Triton is not installed.
    """
    if processes == 1:
        yield from map(compile_job, todo)
        return
    # How constants are derived is a function, which does not travel between processes.
    settled = [replace(job, entry=replace(job.entry, derive=_settled)) for job in todo]
    # Forking a process in which torch or a progress bar has threads can deadlock.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(compile_job, settled)


def compile_job(job: Job) -> Row:
    """The row of one job."""
    entry, point = job.entry, job.point
    function = getattr(_kernels().load(entry.module), entry.kernel)
    measured, problems, accepted = _measure(function, job)
    exempt = entry.products(point.dtype, job.arguments)[1]
    if measured["products"] == "wgmma":
        exempt = ""
    return Row(
        entry.op, entry.label, point.dk, point.dv, point.group, point.dtype, job.planned,
        **measured, exempt=exempt, accepted=accepted, problems=problems,
    )  # fmt: skip


@functools.cache
def _kernels() -> KernelPackage:
    return KernelPackage("cuda_kernels", distribution=DISTRIBUTION)


def _settled(shape: Shape) -> Mapping[str, Any]:
    raise AssertionError(f"constants were derived before, for {shape}")


def _measure(function: Any, job: Job) -> tuple[dict[str, Any], tuple[str, ...], dict[str, str]]:
    """What `compile_kernel` reads, the problems with it and what the plan's row accepts of them.

    A refusal of Triton is a problem too.

    The other kernels are still worth compiling then, and Triton's versions differ in what they
    refuse.
    """
    import triton
    from triton.errors import TritonError

    try:
        measured = compile_kernel(function, job.entry, job.arguments, job.point.dtype)
    # Failed compiler passes are plain RuntimeErrors.
    except (TritonError, RuntimeError) as error:
        # A CompilationError's text begins with the kernel's source up to the bad line.
        reason = " ".join(str(getattr(error, "error_message", None) or error).split())
        problem = f"Triton {triton.__version__} does not compile it: {reason[:_REASON_LIMIT]}"
        return dict.fromkeys(_MEASURED), (problem,), {}
    problems = find_problems(job.entry, job.arguments, job.point.dtype, measured)
    more, accepted = sift(find_slow(measured), job.accepts)
    return measured, problems + more, accepted


def compile_kernel(
    function: Any, entry: KernelEntry, arguments: dict[str, Any], dtype: str
) -> dict[str, Any]:
    """Compiles one kernel for sm_90 and reads its resources from the cubin.

    Args:
        arguments: constants by name; `num_warps` and `num_stages` among them are the compiler's.

    Returns:
        the fields of `Row` that are read from the machine code.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {k: v for k, v in arguments.items() if k in ("num_warps", "num_stages")}
    known = {name: value for name, value in arguments.items() if name in function.arg_names}
    signature: dict[str, str] = {}
    aligned: dict[tuple[int], list[list[Any]]] = {}
    for index, name in enumerate(function.arg_names):
        signature[name] = "constexpr" if name in known else entry.type_of(name)
        signature[name] = signature[name].replace("dtype", _TRITON_DTYPES[dtype])
        if entry.is_aligned(name, signature[name]):
            aligned[(index,)] = [["tt.divisibility", 16]]
    constexprs = {(function.arg_names.index(name),): value for name, value in known.items()}
    source = ASTSource(function, signature, constexprs, aligned)
    log = io.StringIO()
    with triton.knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = True
        # A kernel from Triton's cache has no log: what ptxas said of it would be lost.
        with triton.knobs.compilation.scope():
            triton.knobs.compilation.always_compile = True
            target = GPUTarget("cuda", 90, 32)
            compiled = triton.compile(source, target=target, options=options)
    found = gpu_ir.products(compiled.asm["ttgir"])
    usage, listing = _disassemble(compiled.asm["cubin"])
    return {
        "shared_bytes": int(compiled.metadata.shared),
        "registers": int(_field("REG", usage)),
        "local_bytes": int(_field("STACK", usage)) + int(_field("LOCAL", usage)),
        "spills_in_loops": spills_in_loops(listing),
        "products": "wgmma" if "HGMMA" in listing else "mma" if "HMMA" in listing else "fma",
        "excess_work": gpu_ir.excess_work(found),
        "narrowest": min((p.width for p in found), default=0),
        "narrow_lines": tuple(sorted({p.line for p in found if p.width < NARROW})),
        "serialised": is_serialised(log.getvalue()),
        "waiting_gathers": tuple(gpu_ir.waiting_gathers(compiled.asm["ttgir"])),
    }


def is_serialised(log: str) -> bool:
    """Whether ptxas lets a kernel's wgmma wait for each other."""
    return any(words in log for words in SERIALISED)


def spills_in_loops(listing: str) -> int:
    """Counts local-memory loads and stores (LDL, STL) between a backward branch and its target.

    Args:
        listing: SASS as `cuobjdump -sass` prints it.
    """
    instructions = [(int(m[1], 16), m[2], m[3]) for m in _INSTRUCTION.finditer(listing)]
    loops = []
    for address, name, operands in instructions:
        target = _TARGET.search(operands) if name.startswith("BRA") else None
        # The kernel ends with a branch to itself, which is no loop.
        if target and int(target[1], 16) < address:
            loops.append((int(target[1], 16), address))
    return sum(
        name.startswith(("LDL", "STL")) and any(low <= address <= high for low, high in loops)
        for address, name, _ in instructions
    )


def find_problems(
    entry: KernelEntry, arguments: dict[str, Any], dtype: str, measured: dict[str, Any]
) -> tuple[str, ...]:
    """What a GPU would refuse, or what would slow it down, of what `compile_kernel` measured."""
    problems = []
    if measured["shared_bytes"] > SHARED_MEMORY_LIMIT:
        problems.append(f"shared memory {measured['shared_bytes']} > {SHARED_MEMORY_LIMIT} bytes")
    if measured["spills_in_loops"]:
        problems.append(f"{measured['spills_in_loops']} spill instructions inside loops")
    wanted, reason = entry.products(dtype, arguments)
    if PRODUCTS.index(measured["products"]) < PRODUCTS.index(wanted):
        problems.append(f"matrix products are {measured['products']}, not {wanted}")
    if reason == IEEE_PRODUCT and measured["products"] != "fma":
        problems.append(f"IEEE float32 products are {measured['products']}: not exact")
    return tuple(problems)


def find_slow(measured: dict[str, Any]) -> dict[str, str]:
    """What a GPU would run, but slowly: the finding's name, and a sentence with the lines."""
    found = {}
    if measured["serialised"]:
        found["serialised"] = "wgmma are serialised (ptxas C75..)"
    if measured["excess_work"] > 1:
        found["excess"] = f"{measured['excess_work']:.2f} times the products that the tiles need"
    if lines := measured["narrow_lines"]:
        width = measured["narrowest"]
        found["narrow"] = f"wgmma of {width} < {NARROW} columns at {', '.join(lines)}"
    if lines := measured["waiting_gathers"]:
        found["gather"] = f"a gather waits for a load of its own iteration at {', '.join(lines)}"
    return found


def sift(found: dict[str, str], accepts: dict[str, str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Findings that are problems, and by name those that a plan's row accepts, with its reasons."""
    problems = tuple(text for name, text in found.items() if name not in accepts)
    return problems, {k: f"{text}: {accepts[k]}" for k, text in found.items() if k in accepts}


def outlived(todo: Iterable[Job], rows: Iterable[Row]) -> list[str]:
    """What plan rows accept although none of their compiled calls has it: a reason without cause.

    Args:
        todo: the jobs of `rows`, in their order.
    """
    needed: dict[tuple[str, str, str], dict[str, bool]] = {}
    for job, row in zip(todo, rows, strict=True):
        names = needed.setdefault((row.op, job.entry.planned, str(sorted(job.planned.items()))), {})
        for name in job.accepts:
            names[name] = names.get(name, False) or name in row.accepted
    return [
        f"{op} {kernel}: the plan accepts '{name}', which no call of it shows: {constants}"
        for (op, kernel, constants), names in needed.items()
        for name, seen in names.items()
        if not seen
    ]


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """Resource usage and SASS listing of a cubin, by the cuobjdump inside the triton wheel."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        outputs = [
            subprocess.run([tool, flag, path], check=True, capture_output=True, text=True).stdout
            for flag in ("--dump-resource-usage", "-sass")
        ]
    return outputs[0], outputs[1]


def _field(name: str, usage: str) -> str:
    found = re.search(rf"\b{name}:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump printed no '{name}:' in: {usage!r}")
    return found[1]
