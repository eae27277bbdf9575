"""Softmax attention where each query sees one contiguous range of keys [lo, hi).

Causal, windowed and compressed attention are this, packed or not. The range of query t comes twice:

- `bounds` [S, 2], float32 in HBM: lo and hi of each query (exact up to 2**24 keys). The masks are
  made of it, so it is always right.
- `reach` = (hi_add, lo_add, step, exact), compile-time: hi <= (t + hi_add) // step and
  lo >= (t + lo_add) // step. Which tiles of keys a tile of queries visits hangs on it; with `exact`
  (unpacked input) both are equalities, and tiles that every query sees need no mask.

Modules: `geometry` (tiles of queries, chunks of keys), `operands` (loads, transposes, shifts,
masks), `forward` with its two ways `fast` and `exact`, `backward_dq`, `backward_dkv`.

Programs are unrolled: per 512 rows the forward has about 130 instructions and 21 for each 128 keys,
both ways counted, the gradients of keys 40 and 36. AWS's compiler takes 5,000,000 of one program:
64 heads reach 16K tokens of causal attention in one call, or any length in chunks of queries.
"""
