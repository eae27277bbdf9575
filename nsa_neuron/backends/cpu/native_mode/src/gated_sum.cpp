// o = g0 * a + g1 * b + g2 * c in one pass: bound by memory.
#include <algorithm>

#include "kernels.h"
#include "runtime.h"

namespace nsa {

void gated_sum(const Call& call) {
  constexpr int64_t ROWS = 256;  // per task
  const int64_t dim = call.dv_dim, rows = call.batch * call.queries * call.heads();
  parallel((rows + ROWS - 1) / ROWS, [&] {
    return [&](int64_t task) {
      for (int64_t i = task * ROWS; i < std::min(rows, (task + 1) * ROWS); i++) {
        const float *a = call.q.data + i * dim, *b = call.k.data + i * dim, *c = call.v.data + i * dim;
        const float* gate = call.gates + i * 3;
        float* o = call.o.data + i * dim;
        for (int64_t x = 0; x < dim; x++) o[x] = gate[0] * a[x] + gate[1] * b[x] + gate[2] * c[x];
      }
    };
  });
}

}  // namespace nsa
