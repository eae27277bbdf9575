"""Attention of each query over the tokens of its selected blocks: forward and backward.

Two designs, chosen from the plan or, where that depends on the ids, on the device (see `union`):

- `by_query`: a tile of a few adjacent queries x G heads walks the union of their blocks. For large
  G, and where neighbours select mostly the same blocks.
- `by_block`: a block of keys walks the list of queries that selected it. For small G, where
  neighbours disagree, and for dk, dv always.
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
from .lists import count_pairs as count_pairs
from .lists import cut_lists as cut_lists
from .lists import place_pairs as place_pairs
from .lists import sum_chunks as sum_chunks
from .union import BY_BLOCK as BY_BLOCK
from .union import BY_QUERY as BY_QUERY
from .union import choose_strategy as choose_strategy
from .union import union_blocks as union_blocks
