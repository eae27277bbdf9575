"""Decode: a few new tokens per sequence against paged caches, in two launches.

Launch 1, `score`: splits of the compressed branch and, because they need nothing from it, splits of
the window branch. The program that finishes last for a (token, kv head) merges the compressed
splits and selects the blocks. Launch 2, `attend`: splits of the selected blocks; the last program
merges them with the window's splits and the compressed result, with the gates.

Two launches, since the selection needs every compressed logit and the selected branch needs the
selection; one launch would have to wait for other programs inside a kernel, which only works as
long as all of them are resident. "Last" is decided by a counter per (token, kv head): an atomic
whose order changes nothing, since the last program, whichever it is, adds the splits by number.
Groups of more than 16 heads are cut into parts, which run side by side and share keys through L2.

Bound by bytes: with 64/4/192/128 at 64K tokens 2.6 MB of compressed and 1.0 MB of raw keys and
values per sequence and kv head, 3 us per sequence. Tensor cores run mostly empty (16 rows), which
costs nothing here. The largest intermediate is the importance per head, 1 / 40 of that.
"""

from .attend import attend as attend
from .score import score as score
