// What Python hands to a kernel. Mirrored, field by field, in native_mode/call.py.
#pragma once
#include <cstdint>

namespace nsa {

// Rows [batch, token, head, channel]; strides in elements, channels adjacent. Only few_queries reads
// types other than float32: it reads once what others read many times.
struct Rows {
  enum Type : int64_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
  float* data;
  int64_t batch, token, head, type;

  int64_t offset(int64_t b, int64_t t, int64_t h) const { return b * batch + t * token + h * head; }
  float* at(int64_t b, int64_t t, int64_t h) const { return data + offset(b, t, h); }
};

// One sequence: its rows of the query and key axes, and where its first query stands in it.
struct Sequence {
  int64_t q_first, q_count, k_first, k_count, offset;
};

// A call. Pointers that a kernel does not need are null.
struct Call {
  Rows q, k, v;
  Rows o, grad_o, dq, dk, dv;
  const Sequence* sequences;
  int64_t sequence_count;
  int64_t batch, queries, kv_heads, group, dk_dim, dv_dim;
  double scale;
  // A query at t sees keys [t - window + 1, (t + 1 - length) / stride] of its sequence: length and
  // stride are l and d for compressed keys, 1 and 1 for raw ones.
  int64_t length, stride, window;
  float* lse;          // [B, S, Hq]; written by forward passes, read by others
  const float* shift;  // [B, S, Hq]; backward: rowsum(dO * O) - dlse
  // Gates [B, S, Hq, 3] of the whole attention: o is (or, to a later branch, is added to by) the
  // gate of `branch` times the branch's result. Null: o is the result.
  const float* gates;
  int64_t branch;
  // Selection: int32 ids [B, S, Hkv, n].
  int32_t* ids;
  int64_t select_block, selected, initial, local;  // local is 0 where ids are given, not chosen
  // Paged keys: k and v are pools whose batch axis is pages of `page` rows; row i of sequence b is in
  // page table[b, i / page]. Null: page b is sequence b.
  const int32_t* table;
  int64_t pages, page, table_width;
  const int32_t* lengths;  // [B], tokens of each sequence

  bool chooses() const { return ids && local > 0; }
  bool reads_ids() const { return ids && local == 0; }
  int64_t heads() const { return kv_heads * group; }
  int64_t lanes() const { return batch * kv_heads; }
  // Index of a row of [B, S, Hq, ...].
  int64_t row(int64_t b, int64_t s, int64_t head) const { return (b * queries + s) * heads() + head; }
};

}  // namespace nsa
