"""Compression of overlapping blocks to one token each: mean, linear, mlp, and their gradients.

Dimensions: x [B, T, H, D]; N blocks of l tokens, one every d tokens; weights [l * D, F]. d divides
l, so tokens come in chunks of d, and block i is the chunks i .. i + l/d - 1: whatever is loaded or
transposed once serves every block that overlaps it.

Mean (`mean.py`): tokens on partitions, as they lie in HBM; a block sum is a matmul of 128 tokens
with a 0/1 band [128 tokens, 128 blocks], exact in every dtype, scaled by 1/l at the end. The
gradient uses the same bands with blocks on partitions.
Linear layer (`linear.py`): x^T [D, place in chunk, chunk], made by TensorE transposes; block rows
r = a * d + s of 128 blocks are the contiguous slice [:, s, a : a + 128], the stationary operand;
the weight's rows [D, F] are the moving one and stay in SBUF if they fit:

    for tile of up to 512 blocks:
        load and transpose (512 + l/d - 1) * d tokens                       DMA, PE
        for r in range(l), each 128 channels: sums[blocks, F] += ...        PE
        bias and position encoding are one row, made once, added at the end VectorE
        (gelu), round, store                                                ScalarE, DMA

The mlp is two such layers (the second has l = d = 1); its hidden tensor is 1/16 of x and goes
through HBM. Gradients (`gradients.py`): of x, each place s gathers l/d shifted products, so nothing
is scattered; of the weight, sums stay in PSUM while x passes by once. Every sum has one fixed
order, so two runs, and 1 or 2 cores, give the same bits.

Cost at 64K tokens, 4 heads, D = F = 192, 32/16, bfloat16, one core (arithmetic, not measured): mean
reads 100 MB, 0.28 ms of HBM at 354 GB/s, PE as long; a linear layer is 39 GF, 0.5 ms at 79 TF, 0.8
ms with the 64 of 192 channels that leave half the array idle, plus 0.3 ms of transposes; backward
is about three times that. All of it is below 2 % of the attention that follows. Options weighed:
W stationary with 512 blocks moving needs 2 x 512 columns where this needs 4 x 192; transposing
by DMA instead of PE would save 0.3 ms of PE and cost 2-byte descriptors.

Programs are unrolled over tiles: about 25 instructions per 1024 tokens and head for a mean, 50 for
a layer, 150 for its gradients, so 0.2 to 0.6 million at 1M tokens and 4 heads.
"""

from nki_kernels.compress.gradients import (
    column_sum,
    encoding_gradient,
    input_gradient,
    weight_gradient,
)
from nki_kernels.compress.linear import hidden_backward, linear_forward
from nki_kernels.compress.mean import mean_backward, mean_forward

__all__ = [
    "column_sum",
    "encoding_gradient",
    "hidden_backward",
    "input_gradient",
    "linear_forward",
    "mean_backward",
    "mean_forward",
    "weight_gradient",
]
