// What backward kernels share. Logits are made transposed, [keys, queries * heads]: softmax needs no
// sums over keys any more, since lse is known, and every product then finds its operands as they lie.
#pragma once
#include <limits>

#include "tiles.h"

namespace nsa {

// p = exp(p - lse), ds = p * (dp - shift), in place over rows of keys; `columns` is a multiple of
// WIDTH. A column whose lse is +inf gives zeros.
inline void probabilities_and_slopes(float* p, float* dp, int64_t rows, int64_t columns, int64_t pitch,
                                     const float* lse, const float* shift) {
  for (int64_t c = 0; c < rows; c++)
    for (int64_t x = 0; x < columns; x += WIDTH) {
      const Vec weight = exponential(load(p + c * pitch + x) - load(lse + x));
      store(p + c * pitch + x, weight);
      store(dp + c * pitch + x, weight * (load(dp + c * pitch + x) - load(shift + x)));
    }
}

// out[j * pitch + i] = x[i * columns + j]; columns of out behind the rows of x are zero.
inline void transpose(const float* x, int64_t rows, int64_t columns, float* out, int64_t pitch) {
  for (int64_t j = 0; j < columns; j++) {
    for (int64_t i = 0; i < rows; i++) out[j * pitch + i] = x[i * columns + j];
    std::fill(out + j * pitch + rows, out + (j + 1) * pitch, 0.f);
  }
}

// Zeros in columns [first, first + count) of rows [from, to): what these queries do not see.
inline void hide_columns(float* p, float* ds, int64_t pitch, int64_t from, int64_t to, int64_t first, int64_t count) {
  for (int64_t c = from; c < to; c++) {
    std::fill_n(p + c * pitch + first, count, 0.f);
    std::fill_n(ds + c * pitch + first, count, 0.f);
  }
}

// lse and shift of one query's heads; a dead row's lse becomes +inf, which makes its exps zero.
inline void gather_statistics(const Call& call, int64_t b, int64_t s, int64_t head, int64_t heads, float* lse,
                              float* shift) {
  const int64_t row = call.row(b, s, head);
  for (int64_t g = 0; g < heads; g++) {
    lse[g] = call.lse[row + g] == MINUS_INFINITY ? -MINUS_INFINITY : call.lse[row + g];
    shift[g] = call.shift[row + g];
  }
}

// The gradient that reaches a branch's result, one row: that of o, times the gate.
inline float gate_of(const Call& call, int64_t b, int64_t s, int64_t head) {
  return call.gates ? call.gates[call.row(b, s, head) * 3 + call.branch] : 1.f;
}
inline void gather_gradient(const Call& call, int64_t b, int64_t s, int64_t head, float* out) {
  const float* source = call.grad_o.at(b, s, head);
  const float gate = gate_of(call, b, s, head);
  for (int64_t c = 0; c < call.dv_dim; c++) out[c] = source[c] * gate;
}

// Gradient of a query, times the scale: set by the first branch, added to by later ones.
inline void write_dq(const Call& call, int64_t b, int64_t s, int64_t head, const float* row, int64_t step) {
  float* dq = call.dq.at(b, s, head);
  const float scale = static_cast<float>(call.scale);
  const bool add = call.gates && call.branch > 0;
  for (int64_t c = 0; c < call.dk_dim; c++) dq[c] = row[c * step] * scale + (add ? dq[c] : 0.f);
}

}  // namespace nsa
