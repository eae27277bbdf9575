"""Attention of each query over the tokens of its selected blocks: forward and backward.

Two designs, chosen by the launcher from the plan (see `by_query` and `by_block`):

- `by_query`: a tile of a few adjacent queries x G heads walks the union of their blocks. For large
  G, where a tile holds few queries and these select mostly the same blocks.
- `by_block`: a block of keys walks the list of queries that selected it. For small G, and for
  dk, dv always.
"""

from ..common import backward_delta as backward_delta
from .by_block import combine as combine
from .by_block import forward_by_block as forward_by_block
from .by_block_backward import backward_dkv as backward_dkv
from .by_block_backward import backward_dq_by_block as backward_dq_by_block
from .by_block_backward import reduce_dkv as reduce_dkv
from .by_block_backward import sum_dq as sum_dq
from .by_query import backward_dq as backward_dq
from .by_query import forward as forward
from .by_query import union_blocks as union_blocks
