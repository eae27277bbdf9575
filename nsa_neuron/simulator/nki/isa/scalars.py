"""Run-time scalars of NKI 0.7: an integer is read from a tensor, computed with, written back."""

import numpy as np

from ...issue.spec import Spec
from ...issue.timing import Sync, timing
from ...machine.dtypes import int32, int64
from ...rules.registers import NkiScalar
from ...rules.session import violation
from ...rules.versions import require
from ..binding import core_of, instruction, save
from .dma import REACH


def _check_element(c, role):
    """One integer of 32 or 64 bits, as [1, 1]."""
    c.tensors(role)
    c.buffers(role, *REACH)
    o = c[role]
    c.require(o.shape == (1, 1), "scalar", "is one element", role, value=o.shape, limit="(1, 1)")
    c.require(
        o.dtype in (int32, int64),
        "scalar",
        "holds a signed integer of 32 or 64 bits",
        role,
        value=o.dtype.name,
        limit=("int32", "int64"),
        hint=".view(nl.int32) of an unsigned tensor" if o.dtype.name == "uint32" else "",
    )


def _check_load(c):
    _check_element(c, "src")
    return "sync"


def _run_load(core, payload, writes, reads, params):
    core.state["scalar"] = int(reads[0].array().reshape(-1)[0])


LOAD = Spec(
    "scalar_load", (), ("src",), _check_load, _run_load, timing(Sync.REGISTER_LOAD), wide=True
)


@instruction
def scalar_load(src):
    """The one element of src as an NkiScalar of its dtype."""
    require("nisa.scalar_load", "scalar_load")
    core = core_of("scalar_load")
    load = core.issue(LOAD, (), (src,))
    return NkiScalar(core.state.pop("scalar", None), src.dtype, (load,))


def _check_store(c):
    _check_element(c, "dst")
    return "sync"


def _run_store(core, payload, writes, reads, params):
    save(core, writes[0], np.full((1, 1), reads[0].read(), np.int64))


STORE = Spec(
    "scalar_store",
    ("dst",),
    ("value",),
    _check_store,
    _run_store,
    timing(Sync.REGISTER_STORE),
    wide=True,
)


@instruction
def scalar_store(dst, value):
    """The one element of dst = value, an NkiScalar of its dtype."""
    require("nisa.scalar_store", "scalar_store")
    if not isinstance(value, NkiScalar):
        plain = isinstance(value, int)
        raise violation(
            "scalar",
            "is an NkiScalar",
            instruction="scalar_store",
            operand="value",
            value=type(value).__name__,
            limit="NkiScalar",
            hint="nisa.memset(dst, value)" if plain else "the result of nisa.scalar_load",
        )
    core = core_of("scalar_store")
    width = getattr(dst, "dtype", value.dtype)
    if width != value.dtype:
        raise violation(
            "scalar",
            "has the dtype of the scalar",
            instruction="scalar_store",
            operand="dst",
            value=str(width),
            limit=str(value.dtype),
        )
    core.issue(STORE, (dst,), (value,))
