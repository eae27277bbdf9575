"""GpSimd Engine: iota."""

from math import prod

from ...operands import Spec
from ...registers import scalar
from ...semantics import gpsimd as semantics
from ..binding import core_of, instruction, save


def _check_iota(c):
    pattern, _ = c.params
    c.buffers("dst", "sbuf")
    c.require(
        1 <= len(pattern) <= 4 and all(len(p) == 2 for p in pattern),
        "value",
        "is up to four [step, count] pairs",
        "pattern",
        value=pattern,
    )
    count = prod(p[1] for p in pattern)
    c.require(
        count == c["dst"].n,
        "element-count",
        f"makes {count} elements",
        "pattern",
        value=count,
        limit=c["dst"].n,
    )
    return "gpsimd"


def _run_iota(core, payload, writes, reads, params):
    dst = writes[0]
    pattern, multiplier = params
    values = semantics.iota(dst.shape[0], pattern, scalar(reads[0]), multiplier)
    save(core, dst, values.reshape(dst.shape))


IOTA = Spec("iota", ("dst",), ("offset",), _check_iota, _run_iota)


@instruction
def iota(dst, pattern, offset=0, channel_multiplier=0, name=None):
    """dst[p, i...] = offset + p * channel_multiplier + sum(step * i)."""
    params = (tuple(tuple(p) for p in pattern), channel_multiplier)
    return core_of("iota").issue(IOTA, (dst,), (offset,), params, name)
