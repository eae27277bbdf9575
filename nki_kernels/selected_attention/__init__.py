"""Selected attention: attention of each query over the tokens of the blocks that it has chosen.

Queries are taken in tiles. What a tile's queries have chosen between them is listed once
(`union_lists`), gathered by DMA with run-time addresses, and masked per query.

Kernels: `union_lists`, `forward`, `backward`, `backward_sum`. Modules: `lists`; `tile` (queries,
masks), `gather` (blocks), used by both passes; `softmax` of `forward`; `gradients` and `sums` of
`backward`.
"""

from nki_kernels.selected_attention.backward import backward as backward
from nki_kernels.selected_attention.forward import forward as forward
from nki_kernels.selected_attention.lists import union_lists as union_lists
from nki_kernels.selected_attention.sums import backward_sum as backward_sum
