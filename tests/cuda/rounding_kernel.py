"""A kernel that rounds to bfloat16 as ours round their operands, loaded for simulation."""

import triton
import triton.language as tl

from nsa_neuron.toolchain import KernelPackage, triton_interpreter

narrow = KernelPackage("cuda_kernels", triton_interpreter).load("common").narrow

with triton_interpreter():

    @triton.jit
    def rounded(x, out, N: tl.constexpr):
        at = tl.arange(0, N)
        tl.store(out + at, narrow(tl.load(x + at), tl.bfloat16, True).to(tl.float32))
