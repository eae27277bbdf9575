// Runs every kernel on random calls, with one thread and with four, and compares bits. Buffers are
// exactly as large as the contract says, so that a sanitizer sees every step outside.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#include "kernels.h"
#include "runtime.h"

namespace nsa {
extern int64_t threads;
}

namespace {

using nsa::Call;
using nsa::Rows;
using nsa::Sequence;
using Floats = std::vector<float>;

std::mt19937 gen(1);

int64_t pick(std::initializer_list<int64_t> values) {
  return values.begin()[std::uniform_int_distribution<size_t>(0, values.size() - 1)(gen)];
}
Floats normal(int64_t count) {
  std::normal_distribution<float> draw;
  Floats x(count);
  for (float& each : x) each = draw(gen);
  return x;
}
Rows rows(Floats& x, int64_t tokens, int64_t heads, int64_t dim) {
  return {x.data(), tokens * heads * dim, heads * dim, dim, Rows::FLOAT32};
}

// One random problem and every buffer that a kernel may ask for.
struct Problem {
  int64_t batch = pick({1, 2}), hkv = pick({1, 2}), group = pick({1, 3, 16}), dk = pick({1, 8, 20}),
          dv = pick({1, 16}), s = pick({1, 7, 33, 90}), tokens = s + pick({0, 5, 64}), d = pick({1, 2, 4}),
          l = d * pick({1, 2, 3}), m = d * pick({3, 5, 8}), n = pick({3, 5, 40}), hq = hkv * group,
          blocks = tokens < l ? 0 : (tokens - l) / d + 1;
  Floats q = normal(batch * s * hq * dk), k = normal(batch * tokens * hkv * dk), v = normal(batch * tokens * hkv * dv),
         kc = normal(batch * blocks * hkv * dk), vc = normal(batch * blocks * hkv * dv),
         grad_o = normal(batch * s * hq * dv), gates = normal(batch * s * hq * 3);
  Floats o = Floats(batch * s * hq * dv), lse = Floats(batch * s * hq), shift = normal(batch * s * hq),
         dq = Floats(q.size()), dk_ = Floats(k.size()), dv_ = Floats(v.size()), dkc = Floats(kc.size()),
         dvc = Floats(vc.size()), dgates = Floats(gates.size());
  std::vector<int32_t> ids = std::vector<int32_t>(batch * s * hkv * n);
  Sequence raw{0, s, 0, tokens, tokens - s}, compressed{0, s, 0, blocks, tokens - s};

  Call call(bool on_compressed) {
    Call c{};
    c.q = rows(q, s, hq, dk);
    c.o = rows(o, s, hq, dv);
    c.grad_o = rows(grad_o, s, hq, dv);
    c.dq = rows(dq, s, hq, dk);
    const int64_t t = on_compressed ? blocks : tokens;
    c.k = rows(on_compressed ? kc : k, t, hkv, dk);
    c.v = rows(on_compressed ? vc : v, t, hkv, dv);
    c.dk = rows(on_compressed ? dkc : dk_, t, hkv, dk);
    c.dv = rows(on_compressed ? dvc : dv_, t, hkv, dv);
    c.sequences = on_compressed ? &compressed : &raw;
    c.sequence_count = 1;
    c.batch = batch, c.queries = s, c.kv_heads = hkv, c.group = group, c.dk_dim = dk, c.dv_dim = dv;
    c.scale = 0.3;
    c.length = on_compressed ? l : 1, c.stride = on_compressed ? d : 1;
    c.window = int64_t(1) << 62;
    c.lse = lse.data(), c.shift = shift.data();
    c.pages = batch, c.page = std::max<int64_t>(1, t);
    return c;
  }
  Call choosing() {
    Call c = call(true);
    c.ids = ids.data(), c.selected = n, c.select_block = m, c.initial = 1, c.local = 2;
    return c;
  }
  Call reading() {
    Call c = call(false);
    c.ids = ids.data(), c.selected = n, c.select_block = m;
    return c;
  }
  Call window() {
    Call c = call(false);
    c.window = 9;
    return c;
  }
  Call gated() {
    Call c = call(false);
    c.q = c.k = c.v = rows(grad_o, s, hq, dv);
    c.gates = gates.data();
    return c;
  }

  // Everything, in an order in which each kernel finds what it needs; the bits of all results.
  std::vector<Floats> run() {
    std::vector<Floats> seen;
    const auto keep = [&](std::initializer_list<Floats*> results) {
      for (Floats* each : results) seen.push_back(*each);
    };
    const auto keep_ids = [&] { seen.emplace_back(ids.begin(), ids.end()); };
    nsa::interval_forward(window());
    keep({&o, &lse});
    nsa::interval_backward(window());
    keep({&dq, &dk_, &dv_});
    nsa::compressed_forward(choosing());
    keep({&o, &lse});
    keep_ids();
    nsa::interval_backward(call(true));
    keep({&dq, &dkc, &dvc});
    nsa::selected_forward(reading());
    keep({&o, &lse});
    nsa::selected_backward(reading());
    keep({&dq, &dk_, &dv_});
    Call whole[3] = {choosing(), reading(), window()};
    for (int64_t i = 0; i < 3; i++) whole[i].gates = gates.data(), whole[i].branch = i;
    nsa::few_queries(whole, 3);
    keep({&o, &lse});
    keep_ids();
    nsa::gated_sum(gated());
    keep({&o});
    Call gradient = gated();
    gradient.lse = dgates.data(), gradient.dq = gradient.dk = gradient.dv = Rows{};
    nsa::gated_sum_backward(gradient);
    keep({&dgates});
    return seen;
  }
};

// The first result that differs, -1 if none does.
int first_difference(const std::vector<Floats>& a, const std::vector<Floats>& b) {
  for (size_t i = 0; i < a.size(); i++)
    if (!a[i].empty() && std::memcmp(a[i].data(), b[i].data(), a[i].size() * sizeof(float))) return int(i);
  return -1;
}

}  // namespace

int main(int, char** argv) {
  const int problems = std::atoi(argv[1]);
  for (int i = 0; i < problems; i++) {
    Problem problem;
    nsa::threads = 1;
    const auto one = problem.run();
    nsa::threads = 4;
    const int wrong = first_difference(one, problem.run());
    if (wrong >= 0) {
      std::printf("problem %d: four threads give other bits than one in result %d\n", i, wrong);
      return 1;
    }
  }
  std::printf("%d problems, every kernel, one thread and four: the same bits\n", problems);
  return 0;
}
