"""The compiled kernels in this process: loaded once, called through ctypes.

ctypes lets go of the interpreter's lock during a call. Kernels return a status and a message; they
never throw into Python and never end the process.
"""

from __future__ import annotations

import ctypes
from functools import cache

from nsa_neuron.backends.cpu.native_mode import build
from nsa_neuron.backends.cpu.native_mode.call import Call
from nsa_neuron.errors import BackendUnavailable, ContractViolation, InvalidArgument

KERNELS = (
    "interval_forward",
    "interval_backward",
    "compressed_forward",
    "selected_forward",
    "selected_backward",
    "few_queries",
    "few_queries_whole",
    "gated_sum",
    "gated_sum_backward",
)
MESSAGE_BYTES = 512
OK, BAD_IDS, NO_MEMORY, FAILED, BAD_TABLE = range(5)


@cache
def load() -> ctypes.CDLL:
    """The library.

    Raises:
        BackendUnavailable: it cannot be compiled or loaded.
    """
    path = build.library()
    try:
        library = ctypes.CDLL(str(path))
        if library.nsa_call_size() != ctypes.sizeof(Call):
            raise OSError("its record of a call differs from Python's")
        for name in KERNELS:
            function = getattr(library, f"nsa_{name}")
            function.argtypes = (ctypes.POINTER(Call), ctypes.c_char_p, ctypes.c_int64)
            function.restype = ctypes.c_int
    except (OSError, AttributeError) as error:
        raise BackendUnavailable(
            f"cpu:native cannot run here: {path} cannot be loaded: {error}; delete it"
        ) from error
    return library


def run(kernel: str, call: Call | ctypes.Array[Call], op: str) -> None:
    """Runs a kernel.

    Args:
        kernel: one of `KERNELS`.
        call: its record, or those of the branches; whatever they point to is alive.
        op: the op's name, for errors.

    Raises:
        InvalidArgument: block ids that name no block, tables that lead outside the pools.
        MemoryError: no memory for the kernel's buffers.
        ContractViolation: the kernel failed.
    """
    message = ctypes.create_string_buffer(MESSAGE_BYTES)
    first = ctypes.cast(ctypes.byref(call), ctypes.POINTER(Call))
    status = getattr(load(), f"nsa_{kernel}")(first, message, MESSAGE_BYTES)
    if status == OK:
        return
    text = message.value.decode(errors="replace")
    if status == BAD_IDS:
        found, _, expected = text.partition("|")
        raise InvalidArgument(op, "block_indices", found, expected)
    if status == BAD_TABLE:
        raise InvalidArgument(op, "seqlens", f"given with tables of which {text}", "within them")
    if status == NO_MEMORY:
        raise MemoryError(f"{op} on cpu:native: {text}")
    raise ContractViolation(f"{op} on cpu:native failed: {text}")
