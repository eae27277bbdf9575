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

Modelled for 16K tokens of one kv head, D = F = 192, 32/16, bfloat16, us (low / central / high of
the cycle model, and what PE and VectorE are busy; not run on hardware):

| kernel | time | PE | VectorE |
|---|---|---|---|
| mean_forward | 24 / 32 / 45 | 15 | 2 |
| mean_backward | 32 / 37 / 82 | 27 | 4 |
| linear_forward, first layer | 86 / 104 / 222 | 69 | 40 |
| second layer; hidden_backward | 11 / 12 / 16; 9 / 11 / 18 | 5; 5 | 7; 4 |
| weight_gradient, first layer | 80 / 85 / 156 | 70 | 29 |
| input_gradient | 64 / 67 / 75 | 47 | 49 |
| encoding_gradient, column_sum | 15 / 17 / 25, 4 / 5 / 8 | 13, 2 | 9, 1 |

So 64K tokens and 4 heads take 1.9 ms forward (mlp), 4.5 ms backward: about 1 % of the attention
that follows, which is why the simple design stays. A mean is bound by HBM (6.3 MB, 18 us); a layer
by PE: 9.7 GF are 31 us at 79 TF, 41 with the 64 of 192 channels that leave half the array idle,
plus 11 of transposes; what is above that is the start, where one load and its transposes wait for
each other. Options weighed: W stationary and 512 blocks moving needs 2 x 512 columns where this
needs 4 x 192; transposing by DMA would spare PE and VectorE and cost 2-byte descriptors; adding pe
to every block before the product would cost VectorE l passes instead of one row.

Programs are unrolled over tiles: at 1M tokens and 4 heads, 0.06 million instructions for a mean,
0.24 for a layer, 0.3 for each of its gradients.
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
