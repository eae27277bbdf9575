// The gated sum and its gradients, each in one pass: bound by memory.
#include <algorithm>

#include "kernels.h"
#include "runtime.h"
#include "simd.h"

namespace nsa {
namespace {

constexpr int64_t ROWS = 256;  // per task

// Runs `each(row)` for every row of [B, S, Hq].
template <typename Each>
void for_rows(const Call& call, const Each& each) {
  const int64_t rows = call.batch * call.queries * call.heads();
  parallel((rows + ROWS - 1) / ROWS, [&] {
    return [&](int64_t task) {
      for (int64_t i = task * ROWS; i < std::min(rows, (task + 1) * ROWS); i++) each(i);
    };
  });
}

float dot(const float* a, const float* b, int64_t count) {
  Vec total = Vec{};
  int64_t i = 0;
  for (; i + WIDTH <= count; i += WIDTH) total += load(a + i) * load(b + i);
  float sum = sum_of(total);
  for (; i < count; i++) sum += a[i] * b[i];
  return sum;
}

}  // namespace

void gated_sum(const Call& call) {
  const int64_t dim = call.dv_dim;
  for_rows(call, [&](int64_t i) {
    const float *a = call.q.data + i * dim, *b = call.k.data + i * dim, *c = call.v.data + i * dim;
    const float* gate = call.gates + i * 3;
    float* o = call.o.data + i * dim;
    for (int64_t x = 0; x < dim; x++) o[x] = gate[0] * a[x] + gate[1] * b[x] + gate[2] * c[x];
  });
}

void gated_sum_backward(const Call& call) {
  const int64_t dim = call.dv_dim;
  const float* branches[3] = {call.q.data, call.k.data, call.v.data};
  float* gradients[3] = {call.dq.data, call.dk.data, call.dv.data};
  for_rows(call, [&](int64_t i) {
    const float* gradient = call.grad_o.data + i * dim;
    for (int64_t branch = 0; branch < 3; branch++) {
      call.lse[i * 3 + branch] = dot(gradient, branches[branch] + i * dim, dim);
      if (!gradients[branch]) continue;
      const float gate = call.gates[i * 3 + branch];
      float* out = gradients[branch] + i * dim;
      for (int64_t x = 0; x < dim; x++) out[x] = gradient[x] * gate;
    }
  });
}

}  // namespace nsa
