"""Random numbers: the generators of the Vector and the GpSimd Engine.

Their sequences are not published: results are reproducible here, equal to hardware's nowhere.
"""

from collections import namedtuple

from ...issue.spec import Spec
from ...issue.timing import GpSimd, Vector, timing
from ...machine import dtypes as dt
from ...machine.dtypes import store_bits
from ...semantics import prng
from ..binding import core_of, instruction, load_scalar, save
from .constants import engine as engines
from .dve_select import FLOATS
from .pool import sbuf_only
from .shared import elements, engine_for, engine_of, on_chip, operand, same_dtype, same_tiles

RandomParams = namedtuple("RandomParams", "engine")

_BITS = (dt.int8, dt.int16, dt.int32, dt.uint8, dt.uint16, dt.uint32)


def _dve_state(core):
    return core.state.setdefault("dve-generator", prng.DveState())


def _pool_state(core):
    found = core.state.get("pool-generator")
    if found is None:
        found = core.state["pool-generator"] = prng.xorwow_default(core.machine.partitions)
    return found


def _check_rng(c):
    on_chip(c, "dst")
    c.dtypes("dst", _BITS)
    return engine_for(c, c.params.engine, "vector", "vector", "gpsimd")


def _run_rng(core, payload, writes, reads, params):
    dst = writes[0]
    if params.engine is engines.gpsimd:
        state = _pool_state(core)
        first, lanes = dst.access().partition, dst.shape[0]
        part = slice(first, first + lanes)
        words, state[part] = prng.xorwow_bits(state[part], dst.size // lanes)
    else:
        words, core.state["dve-generator"] = prng.dve_bits(_dve_state(core), dst.shape)
    store_bits(dst.array(), words)


RNG = Spec(
    "rng", ("dst",), (), _check_rng, _run_rng, timing(Vector.UNPUBLISHED, GpSimd.UNPUBLISHED)
)


@instruction
def rng(dst, engine=engines.vector, name=None):
    """dst = random bits; narrow types keep the low ones."""
    return core_of("rng").issue(RNG, (dst,), (), RandomParams(engine_of(engine, "rng")), name)


def _check_seed(c):
    c.tensors("src_seeds")
    on_chip(c, "src_seeds")
    seeds = c["src_seeds"]
    c.require(
        seeds.layout.size == 1,
        "shape",
        "is one element",
        "src_seeds",
        value=seeds.shape,
        limit=(1, 1),
    )
    c.dtypes("src_seeds", (dt.uint32, dt.int32, dt.float32))
    return "vector"


def _run_seed(core, payload, writes, reads, params):
    bits = dt.bits(reads[0].array()).reshape(-1)[0]
    core.state["dve-generator"] = prng.DveState(int(bits), 0)


SEED = Spec("set_rng_seed", (), ("src_seeds",), _check_seed, _run_seed, timing(Vector.UNPUBLISHED))


@instruction
def set_rng_seed(src_seeds, name=None):
    """Seed the Vector Engine's generator with 32 bits."""
    return core_of("set_rng_seed").issue(SEED, (), (src_seeds,), (), name)


def _check_state(c, role):
    c.require(
        c.params.engine is not engines.vector,
        "generation",
        "the Vector Engine's state is accessible from NeuronCore-v4 on",
        "engine",
        value="vector",
        limit="gpsimd",
    )
    c.tensors(role)
    sbuf_only(c, role)
    c.dtypes(role, (dt.uint32,))
    elements(c, role, prng.XORWOW_WORDS)
    return c.choose_engine(c.params.engine, "gpsimd", "gpsimd", "vector")


def _lanes(tensor):
    first = tensor.access().partition
    return slice(first, first + tensor.shape[0])


def _run_set_state(core, payload, writes, reads, params):
    seeds = reads[0]
    words = seeds.array().reshape(seeds.shape[0], -1)
    _pool_state(core)[_lanes(seeds)] = words[:, : prng.XORWOW_WORDS]


SET_STATE = Spec(
    "rand_set_state",
    (),
    ("src_seeds",),
    lambda c: _check_state(c, "src_seeds"),
    _run_set_state,
    timing(GpSimd.UNPUBLISHED, Vector.UNPUBLISHED),
)


@instruction
def rand_set_state(src_seeds, engine=engines.gpsimd, name=None):
    """Set the GpSimd generator's six words per partition."""
    params = RandomParams(engine_of(engine, "rand_set_state"))
    return core_of("rand_set_state").issue(SET_STATE, (), (src_seeds,), params, name)


def _run_get_state(core, payload, writes, reads, params):
    store_bits(writes[0].array(), _pool_state(core)[_lanes(writes[0])])


GET_STATE = Spec(
    "rand_get_state",
    ("dst",),
    (),
    lambda c: _check_state(c, "dst"),
    _run_get_state,
    timing(GpSimd.UNPUBLISHED, Vector.UNPUBLISHED),
)


@instruction
def rand_get_state(dst, engine=engines.gpsimd, name=None):
    """dst = the GpSimd generator's six words per partition."""
    params = RandomParams(engine_of(engine, "rand_get_state"))
    return core_of("rand_get_state").issue(GET_STATE, (dst,), (), params, name)


def _check_dropout(c):
    c.tensors("data")
    same_tiles(c, "dst", "data")
    same_dtype(c, "data", "dst")
    operand(c, "prob", *((dt.float32,) if c["data"].dtype.is_integer else FLOATS))
    return "vector"


def _run_dropout(core, payload, writes, reads, params):
    data, prob = reads
    values, core.state["dve-generator"] = prng.dropout(
        data.array(), load_scalar(prob), _dve_state(core)
    )
    save(core, writes[0], values)


DROPOUT = Spec(
    "dropout", ("dst",), ("data", "prob"), _check_dropout, _run_dropout, timing(Vector.STREAM)
)


@instruction
def dropout(dst, data, prob, name=None):
    """dst = data with elements replaced by zero with probability prob; kept ones unscaled."""
    return core_of("dropout").issue(DROPOUT, (dst,), (data, prob), (), name)
