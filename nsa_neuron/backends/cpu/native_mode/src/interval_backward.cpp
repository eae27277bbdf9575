// Backward pass of attention in which every query sees one run of keys: causal, window, compressed.
//
// Five products per tile and chunk. Queries are cut in parts, which depends on sizes only; each part
// sums dk and dv of its keys in a buffer of its own, and the buffers are added up in the order of
// the parts: the same bits at any number of threads.
#include "gradients.h"
#include "kernels.h"

namespace nsa {
namespace {

constexpr int64_t KEYS = 64;       // of a packed block
constexpr int64_t CHUNK = 128;     // keys at once
constexpr int64_t MAX_ROWS = 128;  // queries times heads
constexpr int64_t PARTS = 16;      // of a sequence at most, but for windows

// Some queries of a sequence and lane, and where the sums over their keys [low, high) lie.
struct Part {
  Tile tile;
  int64_t low, high, at;
};

// Parts by sequence, batch and head; those of one lie between two entries of `starts`.
struct Parts {
  std::vector<Part> all;
  std::vector<int64_t> starts;
};

Parts cut_parts(const Call& call) {
  Parts parts;
  int64_t at = 0;
  for (int64_t i = 0; i < call.sequence_count; i++) {
    const Sequence& sequence = call.sequences[i];
    // Parts longer than the window, so that neighbours share few keys.
    const int64_t longest = call.window < sequence.q_count ? 2 * call.window : 0;
    const int64_t step = std::max<int64_t>({(sequence.q_count + PARTS - 1) / PARTS, longest, 64});
    for (int64_t b = 0; b < call.batch; b++)
      for (int64_t h = 0; h < call.kv_heads; h++) {
        parts.starts.push_back(parts.all.size());
        for (int64_t first = 0; first < sequence.q_count; first += step) {
          const int64_t count = std::min(step, sequence.q_count - first), t = sequence.offset + first;
          const int64_t low = seen(call, sequence, t).low / KEYS * KEYS;
          const int64_t high = std::max(low, rounded_end(sequence, seen(call, sequence, t + count - 1).high));
          parts.all.push_back({{i, b, h, first, count, double(count) * double(high - low)}, low, high, at});
          at += (high - low) * (call.dk_dim + call.dv_dim);
        }
      }
  }
  parts.starts.push_back(parts.all.size());
  return parts;
}

struct Work {
  const Call& call;
  const PackedKeys& keys;
  float* sums;
  int64_t heads, rows, pitch;
  Buffer q, q_columns, gradient, gradient_columns, p, ds, dq, lse, shift;

  Work(const Call& call, const PackedKeys& keys, float* sums, int64_t rows, int64_t heads)
      : call(call), keys(keys), sums(sums), heads(heads), rows(rows), pitch(round_up(rows * heads, WIDTH)),
        q(pitch * call.dk_dim), q_columns(pitch * call.dk_dim), gradient(pitch * call.dv_dim),
        gradient_columns(pitch * call.dv_dim), p(CHUNK * pitch), ds(CHUNK * pitch), dq(call.dk_dim * pitch),
        lse(pitch), shift(pitch) {}

  void run(const Part& part) {
    float* dk = sums + part.at;
    float* dv = dk + (part.high - part.low) * call.dk_dim;
    std::fill(dk, dv + (part.high - part.low) * call.dv_dim, 0.f);
    for (int64_t from = 0; from < part.tile.count; from += rows) {
      Tile tile = part.tile;
      tile.first += from;
      tile.count = std::min(rows, part.tile.count - from);
      for (int64_t head = 0; head < call.group; head += heads)
        differentiate(part, tile, head, std::min(heads, call.group - head), dk, dv);
    }
  }

  void differentiate(const Part& part, const Tile& tile, int64_t head, int64_t count, float* dk, float* dv) {
    const Sequence& sequence = call.sequences[tile.sequence];
    const int64_t t0 = sequence.offset + tile.first;
    gather(tile, head, count);
    std::fill(dq.get(), dq.get() + call.dk_dim * pitch, 0.f);
    const int64_t low = seen(call, sequence, t0).low / KEYS * KEYS;
    const int64_t high = rounded_end(sequence, seen(call, sequence, t0 + tile.count - 1).high);
    for (int64_t from = low; from < high; from += CHUNK) {
      const int64_t to = std::min(from + CHUNK, high), at = from - part.low;
      step(tile, count, from, to, dk + at * call.dk_dim, dv + at * call.dv_dim);
    }
    for (int64_t i = 0; i < tile.count; i++)
      for (int64_t g = 0; g < count; g++)
        write_dq(call, tile.b, sequence.q_first + tile.first + i, tile.h * call.group + head + g,
                 dq.get() + i * count + g, pitch);
  }

  void gather(const Tile& tile, int64_t head, int64_t count) {
    const Sequence& sequence = call.sequences[tile.sequence];
    const int64_t m = tile.count * count;
    std::fill(lse.get(), lse.get() + pitch, -MINUS_INFINITY);
    std::fill(shift.get(), shift.get() + pitch, 0.f);
    gather_queries(call, tile, head, count, q.get());
    for (int64_t i = 0; i < tile.count; i++) {
      const int64_t s = sequence.q_first + tile.first + i, first = tile.h * call.group + head;
      for (int64_t g = 0; g < count; g++)
        gather_gradient(call, tile.b, s, first + g, gradient.get() + (i * count + g) * call.dv_dim);
      gather_statistics(call, tile.b, s, first, count, lse.get() + i * count, shift.get() + i * count);
    }
    transpose(q.get(), m, call.dk_dim, q_columns.get(), pitch);
    transpose(gradient.get(), m, call.dv_dim, gradient_columns.get(), pitch);
  }

  // Keys [from, to) of the sequence.
  void step(const Tile& tile, int64_t count, int64_t from, int64_t to, float* dk, float* dv) {
    const Sequence& sequence = call.sequences[tile.sequence];
    const int64_t n = to - from, m = tile.count * count, lane = tile.b * call.kv_heads + tile.h;
    gemm(n, pitch, call.dk_dim, call.k.at(tile.b, sequence.k_first + from, tile.h), call.k.token,
         q_columns.get(), pitch, p.get(), pitch, false);
    gemm(n, pitch, call.dv_dim, call.v.at(tile.b, sequence.k_first + from, tile.h), call.v.token,
         gradient_columns.get(), pitch, ds.get(), pitch, false);
    probabilities_and_slopes(p.get(), ds.get(), n, pitch, pitch, lse.get(), shift.get());
    for (int64_t i = 0; i < tile.count; i++) {
      const Span span = seen(call, sequence, sequence.offset + tile.first + i);
      const int64_t low = std::min(std::max<int64_t>(span.low - from, 0), n);
      const int64_t high = std::min(std::max(span.high - from, low), n);
      hide_columns(p.get(), ds.get(), pitch, 0, low, i * count, count);
      hide_columns(p.get(), ds.get(), pitch, high, n, i * count, count);
    }
    gemm(n, call.dv_dim, m, p.get(), pitch, gradient.get(), call.dv_dim, dv, call.dv_dim, true);
    gemm(n, call.dk_dim, m, ds.get(), pitch, q.get(), call.dk_dim, dk, call.dk_dim, true);
    for (int64_t j = 0; j < n; j += KEYS)
      gemm(call.dk_dim, pitch, std::min(KEYS, n - j), keys.block(tile.sequence, lane, (from + j) / KEYS), KEYS,
           ds.get() + j * pitch, pitch, dq.get(), pitch, true);
  }
};

// Adds up the parts' sums of one lane and sequence, for keys [from, to), into dk and dv.
void merge(const Call& call, const Parts& parts, const float* sums, const Tile& keys) {
  const Sequence& sequence = call.sequences[keys.sequence];
  const int64_t group = (keys.sequence * call.batch + keys.b) * call.kv_heads + keys.h;
  for (int64_t t = keys.first; t < keys.first + keys.count; t++) {
    float* dk = call.dk.at(keys.b, sequence.k_first + t, keys.h);
    float* dv = call.dv.at(keys.b, sequence.k_first + t, keys.h);
    std::fill(dk, dk + call.dk_dim, 0.f);
    std::fill(dv, dv + call.dv_dim, 0.f);
    for (int64_t i = parts.starts[group]; i < parts.starts[group + 1]; i++) {
      const Part& part = parts.all[i];
      if (t < part.low || t >= part.high) continue;
      const float* a = sums + part.at + (t - part.low) * call.dk_dim;
      const float* b = sums + part.at + (part.high - part.low) * call.dk_dim + (t - part.low) * call.dv_dim;
      for (int64_t c = 0; c < call.dk_dim; c++) dk[c] += a[c];
      for (int64_t c = 0; c < call.dv_dim; c++) dv[c] += b[c];
    }
  }
}

}  // namespace

void interval_backward(const Call& call) {
  std::vector<int64_t> first;
  for (int64_t i = 0; i < call.sequence_count; i++)
    first.push_back(seen(call, call.sequences[i], call.sequences[i].offset).low / KEYS);
  const PackedKeys keys(call, call.k, call.dk_dim, KEYS, KEYS, first);
  const Parts parts = cut_parts(call);
  std::vector<Part> longest_first = parts.all;
  std::stable_sort(longest_first.begin(), longest_first.end(),
                   [](const Part& x, const Part& y) { return x.tile.cost > y.tile.cost; });
  const Part& last = parts.all.back();
  const Buffer sums(last.at + (last.high - last.low) * (call.dk_dim + call.dv_dim));
  const int64_t heads = std::min(call.group, MAX_ROWS), rows = std::max<int64_t>(1, MAX_ROWS / heads);
  parallel(longest_first.size(), [&] {
    auto work = std::make_shared<Work>(call, keys, sums.get(), rows, heads);
    return [&longest_first, work](int64_t task) { work->run(longest_first[task]); };
  });
  std::vector<Tile> merges;
  for (int64_t i = 0; i < call.sequence_count; i++)
    for (int64_t b = 0; b < call.batch; b++)
      for (int64_t h = 0; h < call.kv_heads; h++)
        for (int64_t t = 0; t < call.sequences[i].k_count; t += 256)
          merges.push_back({i, b, h, t, std::min<int64_t>(256, call.sequences[i].k_count - t), 0});
  parallel(merges.size(), [&] {
    return [&](int64_t task) { merge(call, parts, sums.get(), merges[task]); };
  });
}

}  // namespace nsa
