// Compressed attention and the selection of blocks, fused: both need the same probabilities.
//
// A few queries' whole rows of logits lie in L2, are normalised there, summed over the heads of the
// group for the scores, and multiplied with the values. Bound by the two products.
#include "kernels.h"
#include "softmax.h"
#include "tiles.h"
#include "top_blocks.h"

namespace nsa {
namespace {

constexpr int64_t KEYS = 64;
constexpr int64_t VALUES = 256;             // keys per product with values
constexpr int64_t MAX_ROWS = 128;           // queries times heads
constexpr int64_t MAX_HEADS = 16;           // at once
constexpr int64_t L2_FLOATS = 768 * 1024 / 4;

struct Work {
  const Call& call;
  const PackedKeys& keys;
  int64_t heads, width;  // floats of a row of logits
  TopBlocks top;
  int64_t stride;  // floats between the group's probabilities of two queries
  Buffer queries, logits, results, group;

  Work(const Call& call, const PackedKeys& keys, int64_t rows, int64_t heads, int64_t width)
      : call(call), keys(keys), heads(heads), width(width), top(call),
        stride(round_up(top.lead(), WIDTH) + width + 2 * call.select_block / call.stride + WIDTH),
        queries(rows * heads * call.dk_dim), logits(rows * heads * width),
        results(rows * heads * call.dv_dim), group(rows * stride) {}

  float* probabilities(int64_t i) { return group.get() + i * stride + round_up(top.lead(), WIDTH); }

  void run(const Tile& tile) {
    if (call.ids) std::fill(group.get(), group.get() + tile.count * stride, 0.f);
    for (int64_t head = 0; head < call.group; head += heads)
      attend(tile, head, std::min(heads, call.group - head));
    if (!call.ids) return;
    const Sequence& sequence = call.sequences[tile.sequence];
    for (int64_t i = 0; i < tile.count; i++) {
      const int64_t s = sequence.q_first + tile.first + i;
      int32_t* ids = call.ids + ((tile.b * call.queries + s) * call.kv_heads + tile.h) * call.selected;
      top.choose(probabilities(i), sequence.offset + tile.first + i, ids);
    }
  }

  void attend(const Tile& tile, int64_t head, int64_t count) {
    const Sequence& sequence = call.sequences[tile.sequence];
    const int64_t m = tile.count * count, lane = tile.b * call.kv_heads + tile.h;
    const int64_t last = sequence.offset + tile.first + tile.count - 1;
    const int64_t high = rounded_end(sequence, seen(call, sequence, last).high);
    const int64_t length = round_up(high, KEYS);
    gather_queries(call, tile, head, count, queries.get());
    for (int64_t j = 0; j < length; j += KEYS)
      gemm(m, KEYS, call.dk_dim, queries.get(), call.dk_dim, keys.block(tile.sequence, lane, j / KEYS),
           KEYS, logits.get() + j, width, false);
    for (int64_t i = 0; i < tile.count; i++)
      for (int64_t g = 0; g < count; g++) normalise(tile, head, i, g, count, length);
    if (!call.o.data) return;
    std::fill(results.get(), results.get() + m * call.dv_dim, 0.f);
    for (int64_t from = 0; from < high; from += VALUES)
      gemm(m, call.dv_dim, std::min(VALUES, high - from), logits.get() + from, width,
           call.v.at(tile.b, sequence.k_first + from, tile.h), call.v.token, results.get(), call.dv_dim, true);
    for (int64_t i = 0; i < tile.count; i++)
      for (int64_t g = 0; g < count; g++)
        write_row(call, tile.b, sequence.q_first + tile.first + i, tile.h * call.group + head + g,
                  results.get() + (i * count + g) * call.dv_dim, 1.f);
  }

  // Logits of a row become probabilities, which are added to the group's.
  void normalise(const Tile& tile, int64_t head, int64_t i, int64_t g, int64_t count, int64_t length) {
    const Sequence& sequence = call.sequences[tile.sequence];
    const int64_t s = sequence.q_first + tile.first + i;
    float* row = logits.get() + (i * count + g) * width;
    float* lse = call.lse + call.row(tile.b, s, tile.h * call.group + head + g);
    hide(row, length, 0, seen(call, sequence, sequence.offset + tile.first + i).high);
    float factor = 1.f;
    if (call.o.data) {
      Running running;
      running.take(row, length);
      *lse = running.lse();
      factor = running.inverse();
    } else {
      exponentials(row, length, *lse == MINUS_INFINITY ? 0.f : *lse);
    }
    float* total = probabilities(i);
    for (int64_t x = 0; x < length; x += WIDTH) {
      const Vec p = load(row + x) * factor;
      store(row + x, p);
      if (call.ids) store(total + x, load(total + x) + p);
    }
  }
};

}  // namespace

void compressed_forward(const Call& call) {
  const PackedKeys keys(call, call.k, call.dk_dim, KEYS, KEYS, std::vector<int64_t>(call.sequence_count, 0));
  int64_t most = 0;
  for (int64_t i = 0; i < call.sequence_count; i++) most = std::max(most, call.sequences[i].k_count);
  // A cache line more than a round number: rows must not fall on the same sets of a cache.
  const int64_t width = round_up(most, KEYS) + WIDTH, heads = std::min(call.group, MAX_HEADS);
  const int64_t fit = std::min(MAX_ROWS / heads, L2_FLOATS / (heads * width));
  const int64_t rows = std::max<int64_t>(1, fit);
  const std::vector<Tile> tiles = cut(call, rows);
  parallel(tiles.size(), [&] {
    auto work = std::make_shared<Work>(call, keys, rows, heads, width);
    return [&tiles, work](int64_t task) { work->run(tiles[task]); };
  });
}

}  // namespace nsa
