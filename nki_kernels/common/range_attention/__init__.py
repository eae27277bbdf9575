"""Softmax attention where each query sees one contiguous range of keys [lo, hi).

Causal, windowed and compressed attention are this, packed or not. The range of query t comes twice:

- `bounds` [S, 2], float32 in HBM: lo and hi of each query (exact up to 2**24 keys). The masks are
  made of it, so it is always right.
- `reach` = (hi_add, lo_add, step, exact), compile-time: hi <= (t + hi_add) // step and
  lo >= (t + lo_add) // step. Which tiles of keys a tile of queries visits hangs on it; with `exact`
  (unpacked input) both are equalities, and tiles that every query sees need no mask.

Modules: `geometry` (tiles of queries, chunks of keys), `operands` (loads, transposes, shifts,
masks), `source` (keys and values by chunks), `forward` with its two ways `fast` and `exact`,
`backward_dq`, `backward_dkv`, `backward`; `loops` and `looped_forward`, `looped_dq`, `looped_dkv`.

Short calls run unrolled programs: per 512 rows the forward has about 130 instructions and 21 for
each 128 keys, both ways counted, the gradients of keys 40 and 36; AWS's compiler takes 5,000,000 of
one program. Longer ones, and packed sequences, run in hardware loops, at most 6,000 instructions a
kv head at any length. Modelled at 192/128, G = 16, bfloat16, per 512 rows and 128 keys: the inner
loops take 0.58 us forward, 1.44 dq, 0.84 per 128 rows and 256 keys dk and dv, against 0.57, 1.66
and 0.92 unrolled. A group of 128 queries takes 21 us more forward, and 24 for its masked edge, so
that causal attention is 8 % slower than unrolled at 64K tokens, 1 % at 256K. Windows pay more, 2.3
times: nearly all chunks that they touch are masked edges.
"""
