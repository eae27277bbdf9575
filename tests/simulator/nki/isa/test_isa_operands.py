"""Every operand of every computing instruction, one thing about it changed: what refuses it.

The table was written with docs/trainium2.md 3 beside it; "runs" where the documents allow it.
"""

from __future__ import annotations

import pytest
from isa_helpers import simulated

from nsa_neuron.simulator import SimulationError
from nsa_neuron.simulator.nki import isa as nisa
from nsa_neuron.simulator.nki import language as nl

DTYPES = {"f32": nl.float32, "bf16": nl.bfloat16, "i32": nl.int32, "u8": nl.uint8, "u32": nl.uint32,
          "u16": nl.uint16}  # fmt: skip
TRIED = ("bf16", "i32", "u8", "u32")
CHANGES = ("hbm", "psum", "none", "number", "rows", "more", *TRIED)
BOTH = nisa.reduce_cmd.reset_reduce
GREATER, LESS = nl.greater_equal, nl.less

# instruction: how it is called, and each operand's (partitions, elements, dtype)
WIDE, COLUMN = (32, 16, "f32"), (32, 1, "f32")
CALLS = {
    "tensor_copy": (lambda dst, src: nisa.tensor_copy(dst, src), (WIDE, WIDE)),
    "memset": (lambda dst: nisa.memset(dst, 1), (WIDE,)),
    "tensor_tensor": (
        lambda dst, data1, data2: nisa.tensor_tensor(dst, data1, data2, nl.add), (WIDE,) * 3,
    ),
    "tensor_scalar": (
        lambda dst, data, operand0, operand1: nisa.tensor_scalar(
            dst, data, nl.add, operand0, op1=nl.multiply, operand1=operand1
        ),
        (WIDE, WIDE, COLUMN, COLUMN),
    ),
    "scalar_tensor_tensor": (
        lambda dst, data, operand0, operand1: nisa.scalar_tensor_tensor(
            dst, data, nl.add, operand0, nl.multiply, operand1
        ),
        (WIDE, WIDE, COLUMN, WIDE),
    ),
    "reciprocal": (lambda dst, data: nisa.reciprocal(dst, data), (WIDE, WIDE)),
    "activation": (
        lambda dst, data, bias, scale: nisa.activation(dst, nl.exp, data, bias=bias, scale=scale),
        (WIDE, WIDE, COLUMN, COLUMN),
    ),
    "activation_reduce": (
        lambda dst, data, reduce_res: nisa.activation_reduce(dst, nl.exp, data, nl.add, reduce_res),
        (WIDE, WIDE, COLUMN),
    ),
    "tensor_scalar_reduce": (
        lambda dst, data, operand0, reduce_res: nisa.tensor_scalar_reduce(
            dst, data, nl.add, operand0, nl.add, reduce_res
        ),
        (WIDE, WIDE, COLUMN, COLUMN),
    ),
    "tensor_scalar_cumulative": (
        lambda dst, src, imm0: nisa.tensor_scalar_cumulative(dst, src, nl.add, nl.add, imm0),
        (WIDE, WIDE, COLUMN),
    ),
    "tensor_reduce": (lambda dst, data: nisa.tensor_reduce(dst, nl.add, data, 1), (COLUMN, WIDE)),
    "tensor_tensor_scan": (
        lambda dst, data0, data1, initial: nisa.tensor_tensor_scan(
            dst, data0, data1, initial, nl.multiply, nl.add
        ),
        (WIDE, WIDE, WIDE, COLUMN),
    ),
    "bn_stats": (lambda dst, data: nisa.bn_stats(dst, data), ((32, 6, "f32"), WIDE)),
    "bn_aggr": (lambda dst, data: nisa.bn_aggr(dst, data), ((32, 2, "f32"), (32, 12, "f32"))),
    "max8": (lambda dst, src: nisa.max8(dst, src), ((32, 8, "f32"), WIDE)),
    "nc_find_index8": (
        lambda dst, data, vals: nisa.nc_find_index8(dst, data, vals),
        ((32, 8, "u32"), WIDE, (32, 8, "f32")),
    ),
    "nc_match_replace8": (
        lambda dst, data, vals, dst_idx: nisa.nc_match_replace8(dst, data, vals, 0.0, dst_idx),
        (WIDE, WIDE, (32, 8, "f32"), (32, 8, "u32")),
    ),
    "nc_stream_shuffle": (
        lambda dst, src: nisa.nc_stream_shuffle(dst, src, [0] * 32), (WIDE, WIDE),
    ),
    "tensor_copy_predicated": (
        lambda dst, src, predicate: nisa.tensor_copy_predicated(dst, src, predicate),
        (WIDE, WIDE, (32, 16, "u8")),
    ),
    "select_reduce": (
        lambda dst, predicate, on_true, on_false, reduce_res: nisa.select_reduce(
            dst, predicate, on_true, on_false, reduce_res, BOTH
        ),
        (WIDE, (32, 16, "u8"), WIDE, COLUMN, COLUMN),
    ),
    "range_select": (
        lambda dst, on_true_tile, bound0, bound1, reduce_res: nisa.range_select(
            dst, on_true_tile, GREATER, LESS, bound0, bound1, reduce_res=reduce_res
        ),
        (WIDE, WIDE, COLUMN, COLUMN, COLUMN),
    ),
    "iota": (lambda dst: nisa.iota(dst, [[1, 16]]), ((32, 16, "i32"),)),
    "affine_select": (
        lambda dst, on_true_tile: nisa.affine_select(dst, [[1, 16]], 1, on_true_tile, 0.0),
        (WIDE, WIDE),
    ),
    "local_gather": (
        lambda dst, src_buffer, index: nisa.local_gather(dst, src_buffer, index),
        (WIDE, WIDE, (32, 1, "u16")),
    ),
    "nc_n_gather": (
        lambda dst, data, indices: nisa.nc_n_gather(dst, data, indices),
        (WIDE, WIDE, (32, 16, "u32")),
    ),
    "sequence_bounds": (
        lambda dst, segment_ids: nisa.sequence_bounds(dst, segment_ids),
        ((1, 32, "f32"), (1, 16, "f32")),
    ),
    "nonzero_with_count": (
        lambda dst, src: nisa.nonzero_with_count(dst, src), ((32, 17, "i32"), WIDE),
    ),
    "tensor_partition_reduce": (
        lambda dst, data: nisa.tensor_partition_reduce(dst, nl.add, data), ((1, 16, "f32"), WIDE),
    ),
    "nc_transpose": (
        lambda dst, data: nisa.nc_transpose(dst, data, engine=nisa.engine.vector),
        ((16, 32, "f32"), WIDE),
    ),
    "rng": (lambda dst: nisa.rng(dst), ((32, 16, "u32"),)),
    "set_rng_seed": (lambda src_seeds: nisa.set_rng_seed(src_seeds), ((1, 1, "u32"),)),
    "rand_set_state": (lambda src_seeds: nisa.rand_set_state(src_seeds), ((32, 6, "u32"),)),
    "rand_get_state": (lambda dst: nisa.rand_get_state(dst), ((32, 6, "u32"),)),
    "dropout": (
        lambda dst, data, prob: nisa.dropout(dst, data, prob), (WIDE, WIDE, COLUMN),
    ),
}  # fmt: skip


def made(shape, buffer=nl.sbuf):
    rows, columns, dtype = shape
    if buffer is nl.sbuf:
        return nl.zeros((rows, columns), DTYPES[dtype])
    tensor = nl.ndarray((rows, columns), DTYPES[dtype], buffer=buffer)
    if buffer is nl.hbm:
        nisa.dma_copy(tensor, nl.zeros((rows, columns), DTYPES[dtype]))
    else:
        nisa.tensor_copy(tensor, nl.zeros((rows, columns), DTYPES[dtype]))
    return tensor


def changed(shape, change):
    rows, columns, _ = shape
    if change == "none":
        return None
    if change == "number":
        return 0.5
    if change in ("hbm", "psum"):
        return made(shape, getattr(nl, change))
    if change == "rows":
        return made((rows // 2 or 2, columns, shape[2]))
    if change == "more":
        return made((rows, columns + 1, shape[2]))
    return made((rows, columns, change))


def roles_of(instruction):
    call, shapes = CALLS[instruction]
    return call.__code__.co_varnames[: len(shapes)]


def outcome(call, operands):
    try:
        call(*operands)
    except SimulationError as error:
        return error.rule
    return "runs"


def outcomes(instruction):
    """By operand, the rule that refuses each change, or "runs"."""
    call, shapes = CALLS[instruction]
    found = {}

    def kernel():
        assert outcome(call, [made(s) for s in shapes]) == "runs"
        for place, role in enumerate(roles_of(instruction)):
            rules = []
            for change in CHANGES:
                operands = [made(s) for s in shapes]
                operands[place] = changed(shapes[place], change)
                same = change == shapes[place][2]
                rules.append("same" if same else outcome(call, operands))
            found[role] = " ".join(rules)
        return made(WIDE)

    simulated(kernel)
    return found


# Of dtypes: one word, or one for each that is tried ("same": it is the operand's own).
SHORT = {
    "one": "partition-limit",
    "partitions": "partition-match",
    "elements": "element-count",
    "same-dtype": "dtype-match",
}
TABLE = """
# instruction operand: hbm psum none number rows more dtypes
tensor_copy dst buffer runs usage usage partitions elements runs
tensor_copy src buffer runs usage usage partitions elements runs
memset dst buffer runs usage usage runs runs runs
tensor_tensor dst buffer runs usage usage partitions elements runs
tensor_tensor data1 buffer runs usage usage partitions elements runs
tensor_tensor data2 buffer runs usage usage partitions elements runs
tensor_scalar dst buffer runs usage usage partitions elements runs
tensor_scalar data buffer runs usage usage partitions elements runs
tensor_scalar operand0 buffer runs usage runs partitions shape dtype
tensor_scalar operand1 buffer runs usage runs partitions shape dtype
scalar_tensor_tensor dst buffer runs usage usage partitions elements runs
scalar_tensor_tensor data buffer runs usage usage partitions elements runs
scalar_tensor_tensor operand0 buffer runs usage runs partitions shape runs
scalar_tensor_tensor operand1 buffer runs usage usage partitions elements runs
reciprocal dst buffer runs usage usage partitions elements runs
reciprocal data buffer runs usage usage partitions elements runs
activation dst buffer runs usage usage partitions elements runs
activation data buffer runs usage usage partitions elements runs
activation bias buffer runs runs runs partitions shape runs
activation scale buffer runs usage runs partitions shape dtype
activation_reduce dst buffer runs usage usage partitions elements runs
activation_reduce data buffer runs usage usage partitions elements runs
activation_reduce reduce_res buffer runs runs usage partitions shape runs
tensor_scalar_reduce dst buffer runs usage usage partitions elements runs
tensor_scalar_reduce data buffer runs usage usage partitions elements runs
tensor_scalar_reduce operand0 buffer runs usage runs partitions shape dtype
tensor_scalar_reduce reduce_res buffer runs runs usage partitions shape runs
tensor_scalar_cumulative dst buffer runs usage usage partitions elements runs dtype runs dtype
tensor_scalar_cumulative src buffer runs usage usage partitions elements runs dtype runs dtype
tensor_scalar_cumulative imm0 buffer runs usage runs partitions shape dtype
tensor_reduce dst buffer runs usage usage partitions elements runs
tensor_reduce data buffer runs usage usage partitions runs runs
tensor_tensor_scan dst buffer runs usage usage partitions elements runs
tensor_tensor_scan data0 buffer runs usage usage partitions elements runs
tensor_tensor_scan data1 buffer runs usage usage partitions elements runs
tensor_tensor_scan initial buffer runs usage runs partitions shape runs
bn_stats dst buffer runs usage usage partitions elements runs
bn_stats data buffer runs usage usage partitions runs runs
bn_aggr dst buffer runs usage usage partitions elements runs
bn_aggr data buffer runs usage usage partitions shape runs
max8 dst buffer runs usage usage partitions elements runs
max8 src buffer runs usage usage partitions runs runs
nc_find_index8 dst buffer runs usage usage partitions elements dtype
nc_find_index8 data buffer runs usage usage partitions runs runs
nc_find_index8 vals buffer runs usage usage partitions elements runs
nc_match_replace8 dst buffer runs usage usage partitions elements runs
nc_match_replace8 data buffer runs usage usage partitions elements runs
nc_match_replace8 vals buffer runs usage usage partitions elements runs
nc_match_replace8 dst_idx buffer runs runs usage partitions elements dtype
nc_stream_shuffle dst buffer runs usage usage runs elements same-dtype
nc_stream_shuffle src buffer runs usage usage runs elements same-dtype
tensor_copy_predicated dst buffer runs usage usage partitions elements same-dtype
tensor_copy_predicated src buffer runs usage runs partitions elements same-dtype
tensor_copy_predicated predicate buffer runs usage usage partitions elements dtype dtype same runs
select_reduce dst buffer runs usage usage partitions elements runs
select_reduce predicate buffer runs usage usage partitions elements dtype
select_reduce on_true buffer runs usage usage partitions elements runs dtype runs dtype
select_reduce on_false buffer runs usage runs partitions shape runs
select_reduce reduce_res buffer runs runs usage partitions shape runs dtype dtype dtype
range_select dst buffer runs usage usage partitions elements runs
range_select on_true_tile buffer runs usage usage partitions elements runs dtype dtype dtype
range_select bound0 buffer runs usage usage partitions shape dtype
range_select bound1 buffer runs usage usage partitions shape dtype
range_select reduce_res buffer runs runs usage partitions shape runs
iota dst buffer buffer usage usage runs elements runs
affine_select dst buffer buffer usage usage partitions elements runs
affine_select on_true_tile buffer buffer usage usage partitions elements runs
local_gather dst buffer buffer usage usage partitions elements same-dtype
local_gather src_buffer buffer buffer usage usage partitions runs same-dtype
local_gather index buffer buffer usage usage partitions elements dtype
nc_n_gather dst buffer buffer usage usage partitions elements same-dtype
nc_n_gather data buffer buffer usage usage partitions runs same-dtype
nc_n_gather indices buffer buffer usage usage partitions elements dtype
sequence_bounds dst buffer buffer usage usage one elements dtype runs dtype dtype
sequence_bounds segment_ids buffer buffer usage usage one elements dtype runs dtype dtype
nonzero_with_count dst buffer buffer usage usage partitions elements dtype
nonzero_with_count src buffer buffer usage usage partitions elements dtype runs dtype dtype
tensor_partition_reduce dst buffer buffer usage usage partitions elements runs
tensor_partition_reduce data buffer buffer usage usage runs elements runs
nc_transpose dst shape runs usage usage shape shape same-dtype
nc_transpose data shape runs usage usage shape shape same-dtype
rng dst buffer runs usage usage runs runs dtype runs runs same
set_rng_seed src_seeds buffer runs usage usage shape shape dtype runs dtype same
rand_set_state src_seeds buffer buffer usage usage runs elements dtype
rand_get_state dst buffer buffer usage usage runs elements dtype
dropout dst buffer runs usage usage partitions elements same-dtype
dropout data buffer runs usage usage partitions elements same-dtype
dropout prob buffer runs usage runs partitions shape runs dtype dtype dtype
"""


def expected(instruction):
    found = {}
    for line in TABLE.strip().splitlines()[1:]:
        name, role, *rules = (SHORT.get(word, word) for word in line.split())
        if name == instruction:
            own = dict(zip(roles_of(name), CALLS[name][1], strict=True))[role][2]
            one = [rules[-1]] * len(TRIED)
            dtypes = rules[6:] if len(rules) == len(CHANGES) else one
            same = ["same" if d == own else rule for d, rule in zip(TRIED, dtypes, strict=True)]
            found[role] = " ".join(rules[:6] + same)
    return found


@pytest.mark.parametrize("instruction", CALLS)
def test_operands_changed_in_one_thing(instruction):
    assert outcomes(instruction) == expected(instruction)


@pytest.mark.parametrize("instruction", CALLS)
def test_no_operand_has_64_bits(instruction):
    call, shapes = CALLS[instruction]
    rules = []

    def kernel():
        for place in range(len(shapes)):
            operands = [made(s) for s in shapes]
            operands[place] = nl.ndarray(shapes[place][:2], nl.int64)
            rules.append(outcome(call, operands))
        return made(WIDE)

    simulated(kernel, nki="0.7")
    assert set(rules) == {"dtype"}
