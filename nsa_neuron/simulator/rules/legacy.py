"""Names and keywords that NKI had once, and what to write instead; read by lint and by `misuse`.

Source: SDK nki/migration/index.rst, and the 0.1 API pages it replaces.
"""

from __future__ import annotations

_SLICES = "slice with integers, t[0:128, 0:512], or nl.ds(start, size); .ap(...) for other patterns"
_ADDRESS = "nl.ndarray(shape, dtype, buffer=nl.sbuf, address=(partition, byte))"

# Attributes of `nki`, `nki.language` and `nki.isa`, by their last name.
NAMES = {
    "arange": _SLICES,
    "mgrid": _SLICES,
    "par_dim": "dim 0 is the partition dim; a block dim becomes a Python list of tensors, or a "
    "free dim",
    "spmd_dim": "kernel[2](...) for two cores; loop inside the kernel over everything else",
    "nc": "kernel[2](...) for two cores",
    "atomic_rmw": "nisa.dma_compute(dst, [src, dst], reduce_op=nl.add)",
    "loop_reduce": "accumulate in an SBUF or PSUM tensor made before the loop",
    "static_cast": "nl.copy(x, dtype=...)",
    "simulate_kernel": "nki.simulate(kernel)(...)",
    "baremetal": "@nki.jit with NumPy arguments",
    "benchmark": "`nsa profile FILE.py::kernel` models time; neuron-profile measures on hardware",
    "tensor_copy_dynamic_src": "nisa.tensor_copy(dst, src.ap(pattern, scalar_offset=index))",
    "tensor_copy_dynamic_dst": "nisa.tensor_copy(dst.ap(pattern, scalar_offset=index), src)",
    "psum_mod": _ADDRESS,
    "sb_mod": _ADDRESS,
    "mod_alloc": _ADDRESS,
    "multi_buffer": "allocate inside the loop, or a Python list of tensors",
    "trace": "@nki.jit",
    "load_transpose": "nl.load_transpose2d(src)",
    "activation_with_reduce": "nisa.activation_reduce(dst, op, data, reduce_op, reduce_res)",
}

# Keywords of instructions, each with the words that replace it.
KEYWORDS = {
    "mask": "slice the operands to the valid range; masks went with NKI 0.1",
    "dtype": "the dst tensor decides the dtype",
    "psumAccumulateFlag": "accumulate=True/False",
    "psum_accumulate_flag": "accumulate=True/False",
    "is_moving_zero": "is_moving_onezero",
    "dst_rmw_op": "nisa.dma_compute(dst, srcs, reduce_op=nl.add)",
    "use_gpsimd_dma": "dma_engine=nisa.dma_engine.gpsimd_dma",
    "imm": "nisa.register_move(dst, src)",
    "num_channels": "channel_ids=[...]",
}

# Attributes people look for on a tensor.
TENSOR_ATTRIBUTES = {
    "T": "nisa.nc_transpose(dst, data) moves data; t.permute(dims) reorders free dims",
    "astype": "nisa.tensor_copy(dst, src) into a tensor of the dtype; t.view(dtype) keeps the bits",
    "assert_shape": "assert t.shape == (...)",
    "broadcast_to": "t.broadcast(dim, size) repeats a size-1 dim; nl.broadcast_to(t, shape)",
    "transpose": "t.permute(dims) reorders free dims; nisa.nc_transpose(dst, data) moves data",
    "expand_dims": "t.expand_dim(dim)",
    "squeeze": "t.squeeze_dim(dim)",
    "item": "nisa.register_load(register, t) reads a (1, 1) tensor into a register",
    "numpy": "nl.device_print('name', t) prints; return the tensor to see it outside",
    "copy": "nl.copy(t), or nisa.tensor_copy(dst, t)",
    "sum": "nisa.tensor_reduce(dst, nl.add, t, axis=...)",
    "max": "nisa.tensor_reduce(dst, nl.maximum, t, axis=...)",
    "fill": "nisa.memset(t, value)",
    "size_bytes": "t.size * t.dtype.itemsize",
}
