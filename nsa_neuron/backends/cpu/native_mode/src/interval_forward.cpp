// Forward pass of attention in which every query sees one run of keys: causal, window, compressed.
//
// A tile of queries times the heads of a group passes over its run in chunks with a running softmax.
// Bound by the two products; logits of a chunk (128 x 256 floats) stay in L2.
#include "kernels.h"
#include "softmax.h"
#include "tiles.h"

namespace nsa {
namespace {

constexpr int64_t KEYS = 64;      // of a packed block
constexpr int64_t CHUNK = 256;    // keys per step of the running softmax
constexpr int64_t MAX_ROWS = 128; // queries times heads

struct Work {
  const Call& call;
  const PackedKeys& keys;
  int64_t heads;  // of the group, at once
  Buffer queries, logits, sums;
  std::vector<Running> running;

  Work(const Call& call, const PackedKeys& keys, int64_t rows, int64_t heads)
      : call(call), keys(keys), heads(heads), queries(rows * heads * call.dk_dim),
        logits(rows * heads * CHUNK), sums(rows * heads * call.dv_dim), running(rows * heads) {}

  void run(const Tile& tile) {
    for (int64_t head = 0; head < call.group; head += heads)
      attend(tile, head, std::min(heads, call.group - head));
  }

  void attend(const Tile& tile, int64_t head, int64_t count) {
    const Sequence& sequence = call.sequences[tile.sequence];
    const int64_t m = tile.count * count;
    gather_queries(call, tile, head, count, queries.get());
    std::fill(running.begin(), running.begin() + m, Running());
    std::fill(sums.get(), sums.get() + m * call.dv_dim, 0.f);
    const int64_t t0 = sequence.offset + tile.first;
    const int64_t low = seen(call, sequence, t0).low / KEYS * KEYS;
    const int64_t high = rounded_end(sequence, seen(call, sequence, t0 + tile.count - 1).high);
    for (int64_t from = low; from < high; from += CHUNK) step(tile, count, from, std::min(from + CHUNK, high));
    for (int64_t i = 0; i < tile.count; i++)
      for (int64_t g = 0; g < count; g++) {
        const Running& row = running[i * count + g];
        const int64_t s = sequence.q_first + tile.first + i, at = tile.h * call.group + head + g;
        write_row(call, tile.b, s, at, sums.get() + (i * count + g) * call.dv_dim, row.inverse());
        if (call.lse) call.lse[call.row(tile.b, s, at)] = row.lse();
      }
  }

  // Keys [from, to) of the sequence.
  void step(const Tile& tile, int64_t count, int64_t from, int64_t to) {
    const Sequence& sequence = call.sequences[tile.sequence];
    const int64_t m = tile.count * count, lane = tile.b * call.kv_heads + tile.h;
    const int64_t length = round_up(to - from, KEYS);
    for (int64_t j = 0; j < length; j += KEYS)
      gemm(m, KEYS, call.dk_dim, queries.get(), call.dk_dim,
           keys.block(tile.sequence, lane, (from + j) / KEYS), KEYS, logits.get() + j, CHUNK, false);
    for (int64_t i = 0; i < tile.count; i++) {
      const Span span = seen(call, sequence, sequence.offset + tile.first + i);
      for (int64_t g = 0; g < count; g++) {
        const int64_t at = i * count + g;
        float* row = logits.get() + at * CHUNK;
        hide(row, length, span.low - from, span.high - from);
        const float fade = running[at].take(row, length);
        if (fade == 1.f) continue;
        float* sum = sums.get() + at * call.dv_dim;
        for (int64_t c = 0; c < call.dv_dim; c++) sum[c] *= fade;
      }
    }
    gemm(m, call.dv_dim, to - from, logits.get(), CHUNK, call.v.at(tile.b, sequence.k_first + from, tile.h),
         call.v.token, sums.get(), call.dv_dim, true);
  }
};

}  // namespace

void interval_forward(const Call& call) {
  std::vector<int64_t> first;
  for (int64_t i = 0; i < call.sequence_count; i++)
    first.push_back(seen(call, call.sequences[i], call.sequences[i].offset).low / KEYS);
  const PackedKeys keys(call, call.k, call.dk_dim, KEYS, KEYS, first);
  const int64_t heads = std::min(call.group, MAX_ROWS);
  const int64_t rows = std::max<int64_t>(1, MAX_ROWS / heads);
  const std::vector<Tile> tiles = cut(call, rows);
  parallel(tiles.size(), [&] {
    auto work = std::make_shared<Work>(call, keys, rows, heads);
    return [&tiles, work](int64_t task) { work->run(tiles[task]); };
  });
}

}  // namespace nsa
