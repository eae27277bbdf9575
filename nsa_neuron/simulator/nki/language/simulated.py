"""`nl.divide`, `nl.mod`, `nl.fmod`: in simulation only, with no hardware lowering."""

from ...issue.current import require_core
from ...issue.spec import Spec
from ...issue.timing import Vector, timing
from ...memory.tensor import NkiTensor
from ...semantics import alu
from ..binding import load, load_scalar, save
from .making import broadcast_pair, new_tile, promote, require_tile


def _check(c):
    c.buffers("dst", "sbuf", "psum")
    c.same_partitions("dst", "data1", "data2")
    return "vector"


def _run(core, payload, writes, reads, params):
    a, b = (load(x) if isinstance(x, NkiTensor) else load_scalar(x) for x in reads)
    save(core, writes[0], alu.BINARY[params[0]](a, b))


SIMULATED = Spec(
    "simulated_arithmetic", ("dst",), ("data1", "data2"), _check, _run, timing(Vector.COMPOSED)
)


def binary(name, x, y, dtype):
    """x op y of an operator no engine has, with a warning in the run's record."""
    core = require_core(f"nl.{name}")
    tiles = [t for t in (x, y) if isinstance(t, NkiTensor)]
    for tile in tiles or (x,):
        require_tile(tile, name, "x" if tile is x else "y")
    if len(tiles) == 2:
        x, y, shape = broadcast_pair(x, y, name)
        kind = promote(x.dtype, y.dtype)
    else:
        shape, kind = tiles[0].shape, tiles[0].dtype
    out = new_tile(shape, dtype or kind)
    core.warn(f"nl.{name} runs in simulation only: no engine has the operation")
    core.issue(SIMULATED, (out,), (x, y), (name,))
    return out
