"""Compiles the Triton kernels at every shipped tile plan for an H200, on a machine without a GPU.

What a GPU would refuse or slow down is visible in the machine code: more shared memory than a block
may have, registers spilled to local memory inside a loop, matrix products that are not `wgmma`.
`run()` compiles each kernel of `nsa_neuron.backends.cuda.kernel_table` for sm_90 with the plans of
device `h200` and returns one `Row` per kernel and plan. Nothing is executed: this says that a
kernel fits the machine, not how fast or how right it is.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nsa_neuron.backends.cuda import plans
from nsa_neuron.backends.cuda.kernel_table import KERNELS, PACKED_KERNELS, KernelEntry, Shape
from nsa_neuron.toolchain import KernelPackage

SHARED_MEMORY_LIMIT = 232_448
"""Bytes of shared memory one block may use on sm_90 (CUDA C++ Programming Guide, table of compute
capabilities: 227 KiB)."""

HEAD_DIMS = ((128, 128), (192, 128))
DTYPES = ("bfloat16",)
GROUPS = (16, 1)

_TRITON_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_MEASURED = ("shared_bytes", "registers", "local_bytes", "spills_in_loops", "wgmma")
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
        wgmma: whether matrix products use the warpgroup instruction.
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
    wgmma: bool | None
    problems: tuple[str, ...] = field(default=())

    @property
    def verdict(self) -> str:
        return "; ".join(self.problems) or "ok"


def run(
    entries: Iterable[KernelEntry] = KERNELS + PACKED_KERNELS,
    *,
    device: str = "h200",
    head_dims: Iterable[tuple[int, int]] = HEAD_DIMS,
    dtypes: Iterable[str] = DTYPES,
    groups: Iterable[int] = GROUPS,
) -> list[Row]:
    """Compiles `entries` for every combination of head dims, dtype and group size.

    Kernels that do not depend on a dimension are compiled once for equal constants.

    Raises:
        PlanError: a kernel has no plan on `device`.
        ToolchainError: Triton is not installed.
    """
    return list(iterate(entries, device, list(head_dims), list(dtypes), list(groups)))


def iterate(
    entries: Iterable[KernelEntry],
    device: str,
    head_dims: list[tuple[int, int]],
    dtypes: list[str],
    groups: list[int],
) -> Iterator[Row]:
    """`run` row by row, so that a table can grow while kernels compile."""
    package = KernelPackage("cuda_kernels")
    seen = set()
    for entry in entries:
        function = getattr(package.load(entry.module), entry.kernel)
        for (dk, dv), dtype, group in (
            (dims, dtype, group) for dims in head_dims for dtype in dtypes for group in groups
        ):
            if not entry.min_group <= group <= entry.max_group:
                continue
            found = plans.find(device, entry.op, dk=dk, dv=dv, dtype=dtype, group=group)
            constants = found[entry.plan or entry.kernel]
            arguments = entry.constants(Shape(dk, dv, group, constants))
            key = (entry.op, entry.kernel, dtype, repr(sorted(arguments.items())))
            if key in seen:
                continue
            seen.add(key)
            measured, problems = _measure(function, entry, arguments, dtype)
            yield Row(
                entry.op, entry.label, dk, dv, group, dtype, constants, **measured,
                problems=problems,
            )  # fmt: skip


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
    return measured, _problems(entry, dtype, measured)


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
        "wgmma": "HGMMA" in listing,
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


def _problems(entry: KernelEntry, dtype: str, measured: dict[str, Any]) -> tuple[str, ...]:
    problems = []
    if measured["shared_bytes"] > SHARED_MEMORY_LIMIT:
        problems.append(f"shared memory {measured['shared_bytes']} > {SHARED_MEMORY_LIMIT} bytes")
    if measured["spills_in_loops"]:
        problems.append(f"{measured['spills_in_loops']} spill instructions inside loops")
    # float32 products are made exact by ordinary multiply-adds; there is no float32 wgmma.
    if entry.wants_wgmma and dtype != "float32" and not measured["wgmma"]:
        problems.append("matrix products do not use wgmma")
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
