"""Compiles the Triton kernels at every shipped tile plan for an H200, on a machine without a GPU.

What a GPU would refuse or slow down is visible in the machine code: more shared memory than a block
may have, registers spilled to local memory inside a loop, matrix products that are not `wgmma`.
`run()` compiles each kernel of `nsa_neuron.backends.cuda.kernel_table` for sm_90 with the plans of
device `h200` and gives one `Row` per kernel and plan. Nothing is executed: this says that a
kernel fits the machine, not how fast or how right it is.
"""

from __future__ import annotations

import functools
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nsa_neuron.backends.cuda import plans
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
_MEASURED = ("shared_bytes", "registers", "local_bytes", "spills_in_loops", "products")
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
    exempt: str
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


def job_at(entry: KernelEntry, point: Point, device: str = "h200") -> Job:
    """The job of a kernel at one call.

    Raises:
        PlanError: the kernel has no plan on `device` for this call.
    """
    planned = plans.find(device, entry.op, **asdict(point))[entry.planned]
    shape = Shape(point.dk, point.dv, point.group, planned)
    return Job(entry, point, planned, entry.constants(shape))


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
    measured, problems = _measure(function, entry, job.arguments, point.dtype)
    exempt = entry.products(point.dtype, job.arguments)[1]
    if measured["products"] == "wgmma":
        exempt = ""
    return Row(
        entry.op, entry.label, point.dk, point.dv, point.group, point.dtype, job.planned,
        **measured, exempt=exempt, problems=problems,
    )  # fmt: skip


@functools.cache
def _kernels() -> KernelPackage:
    return KernelPackage("cuda_kernels", distribution=DISTRIBUTION)


def _settled(shape: Shape) -> Mapping[str, Any]:
    raise AssertionError(f"constants were derived before, for {shape}")


def _measure(
    function: Any, entry: KernelEntry, arguments: dict[str, Any], dtype: str
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What `compile_kernel` reads and the problems with it; a refusal of Triton is a problem too.

    The other kernels are still worth compiling then, and Triton's versions differ in what they
    refuse.
    """
    import triton
    from triton.errors import TritonError

    try:
        measured = compile_kernel(function, entry, arguments, dtype)
    # Failed compiler passes are plain RuntimeErrors.
    except (TritonError, RuntimeError) as error:
        # A CompilationError's text begins with the kernel's source up to the bad line.
        reason = " ".join(str(getattr(error, "error_message", None) or error).split())
        problem = f"Triton {triton.__version__} does not compile it: {reason[:_REASON_LIMIT]}"
        return dict.fromkeys(_MEASURED), (problem,)
    return measured, find_problems(entry, arguments, dtype, measured)


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
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    usage, listing = _disassemble(compiled.asm["cubin"])
    return {
        "shared_bytes": int(compiled.metadata.shared),
        "registers": int(_field("REG", usage)),
        "local_bytes": int(_field("STACK", usage)) + int(_field("LOCAL", usage)),
        "spills_in_loops": spills_in_loops(listing),
        "products": "wgmma" if "HGMMA" in listing else "mma" if "HMMA" in listing else "fma",
    }


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
