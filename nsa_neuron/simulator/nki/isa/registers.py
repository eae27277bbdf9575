"""Registers and queries."""

import numpy as np

from ...issue.current import current_core
from ...issue.spec import Spec
from ...issue.timing import Sync, timing
from ...memory.tensor import NkiTensor
from ...rules.registers import VirtualRegister
from ...rules.session import violation
from ..binding import core_of, instruction, save
from .constants import nc_version
from .dma import REACH


@instruction
def register_alloc(x=None):
    """A register, optionally holding an immediate (or a one-element tensor's value)."""
    register = VirtualRegister()
    if isinstance(x, NkiTensor):
        register_load(register, x)
    elif x is not None:
        register_move(register, x)
    return register


@instruction
def register_move(dst, src):
    """dst = src, an integer or another register."""
    _register(dst, "register_move")
    if isinstance(src, VirtualRegister):
        dst.write(src.value)
        dst.loads = src.loads
        return
    if not isinstance(src, int) or not -(2**31) <= src < 2**32:
        raise violation(
            "register",
            "src is a 32-bit integer or a register",
            operand="src",
            instruction="register_move",
            value=src,
        )
    dst.write(src)
    dst.loads = ()


def _register(value, name):
    if not isinstance(value, VirtualRegister):
        raise violation(
            "register",
            "must be a register",
            instruction=name,
            operand="dst",
            value=type(value).__name__,
            hint="nisa.register_alloc()",
        )


def _check_load(c):
    c.tensors("src")
    c.buffers("src", *REACH)
    src = c["src"]
    c.require(
        src.layout.size == 1 and src.dtype.itemsize <= 4,
        "register",
        "must be one element of at most 32 bits",
        "src",
        value=src.shape,
        limit="(1, 1)",
    )
    return "sync"


def _run_load(core, payload, writes, reads, params):
    register, src = core.state["register"], reads[0]
    value = src.array().reshape(-1)[0]
    register.write(float(value) if src.dtype.is_float else int(value))


LOAD = Spec("register_load", (), ("src",), _check_load, _run_load, timing(Sync.REGISTER_LOAD))


@instruction
def register_load(dst, src):
    """dst = the one element of src."""
    core = core_of("register_load")
    _register(dst, "register_load")
    core.state["register"] = dst
    dst.loads = (core.issue(LOAD, (), (src,)),)
    if not core.data:
        dst.write(None)


def _check_store(c):
    c.buffers("dst", *REACH)
    dst = c["dst"]
    c.require(
        dst.layout.size == 1 and dst.dtype.itemsize <= 4,
        "register",
        "must be one element of at most 32 bits",
        "dst",
        value=dst.shape,
        limit="(1, 1)",
    )
    return "sync"


def _run_store(core, payload, writes, reads, params):
    dst = writes[0]
    value = reads[0].read()
    save(core, dst, np.full(dst.shape, value, np.int64 if isinstance(value, int) else np.float32))


STORE = Spec(
    "register_store", ("dst",), ("src",), _check_store, _run_store, timing(Sync.REGISTER_STORE)
)


@instruction
def register_store(dst, src):
    """The one element of dst = src, a register."""
    _register(src, "register_store")
    core_of("register_store").issue(STORE, (dst,), (src,))


def get_nc_version():
    """Generation of the target."""
    core = current_core()
    return nc_version(core.machine.generation if core else 3)


def get_nc_sub_version():
    """Silicon revision of the target."""
    return 0
