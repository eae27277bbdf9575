"""Attention of query t over the keys t-w+1 .. t: exactly w of them, t included.

The kernels are those of `attention.py` with WINDOW = w. Cost per query and head, forward: w keys,
2 * (Dk + Dv) FLOP each, plus the tile edges: with BLOCK_M (token, head) rows the union of their
windows is w + BLOCK_M / G - 1 keys, so at G = 16, w = 512 a tile of 128 rows looks at 519 keys,
where 128 rows of one head would look at 639.
"""

from .attention import backward_delta as backward_delta
from .attention import backward_dkv as backward_dkv
from .attention import backward_dq as backward_dq
from .attention import forward as forward
