"""Instructions of NeuronCore-v4 (Trainium3): trn2 refuses them, whatever their arguments."""

from ...issue.current import require_core
from ...rules.session import violation
from ..binding import instruction
from .constants import reduce_cmd as commands


def _refuse(name, instead):
    core = require_core(f"nisa.{name}")
    raise violation(
        "generation",
        "exists from NeuronCore-v4 on",
        instruction=name,
        value=core.options.target,
        limit="trn3",
        hint=instead,
    )


@instruction
def activate2(
    dst,
    op,
    data,
    imm0,
    imm1,
    op0,
    op1,
    relu_param=0.0,
    reverse0=False,
    reverse1=False,
    reduce_op=None,
    reduce_res=None,
    reduce_cmd=commands.idle,
    name=None,
):
    """dst = op((data op0 imm0) op1 imm1) with an optional reduction."""
    _refuse("activate2", "nisa.activation(dst, op, data, bias, scale)")


@instruction
def exponential(
    dst,
    src,
    max_value=0.0,
    reduce_res=None,
    reduce_cmd=commands.idle,
    reduce_init=0.0,
    name=None,
):
    """dst = exp(src - max_value) on the Vector Engine."""
    _refuse("exponential", "nisa.activation(dst, nl.exp, src, bias=-max_value)")


@instruction
def nc_matmul_mx(
    dst,
    stationary,
    moving,
    stationary_scale,
    moving_scale,
    tile_position=None,
    tile_size=None,
    accumulate=None,
    name=None,
):
    """Matrix product of MXFP8 or MXFP4 operands."""
    _refuse("nc_matmul_mx", "nisa.nc_matmul with float8 operands and perf_mode double_row")


@instruction
def quantize_mx(dst, src, dst_scale, name=None):
    """Quantize to MXFP8."""
    _refuse("quantize_mx", "scale, and nisa.tensor_copy to float8_e4m3")


@instruction
def rand2(dst, min, max, name=None):
    """Uniform random numbers."""
    _refuse("rand2", "nisa.rng, then nisa.tensor_scalar to the range")
