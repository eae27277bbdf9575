// Queries cut in tiles, keys packed for products: what attention kernels share.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "call.h"
#include "runtime.h"
#include "simd.h"

namespace nsa {

// Keys that a query at position t sees: [low, high) of its sequence.
struct Span {
  int64_t low, high;
};
inline Span seen(const Call& call, const Sequence& sequence, int64_t t) {
  const int64_t complete = t + 1 - call.length;
  int64_t high = complete < 0 ? 0 : std::min(sequence.k_count, complete / call.stride + 1);
  int64_t low = t + 1 > call.window ? t + 1 - call.window : 0;
  return {std::min(low, high), high};
}

// The end of a run of keys in whole vectors where the sequence has them: products of few lengths,
// each of which torch compiles once, at the price of keys whose probabilities are zero.
inline int64_t rounded_end(const Sequence& sequence, int64_t high) {
  return std::min(round_up(high, 16), sequence.k_count);
}

// Some queries of one sequence and lane (batch and kv head).
struct Tile {
  int64_t sequence, b, h, first, count;  // `first` counts within the sequence
  double cost;
};

// Tiles of at most `rows` queries, the most expensive first: threads then end together.
inline std::vector<Tile> cut(const Call& call, int64_t rows) {
  std::vector<Tile> tiles;
  for (int64_t i = 0; i < call.sequence_count; i++) {
    const Sequence& sequence = call.sequences[i];
    for (int64_t first = 0; first < sequence.q_count; first += rows) {
      const int64_t count = std::min(rows, sequence.q_count - first);
      const Span last = seen(call, sequence, sequence.offset + first + count - 1);
      const double cost = double(count) * double(last.high - last.low + 64);
      for (int64_t b = 0; b < call.batch; b++)
        for (int64_t h = 0; h < call.kv_heads; h++) tiles.push_back({i, b, h, first, count, cost});
    }
  }
  std::stable_sort(tiles.begin(), tiles.end(),
                   [](const Tile& x, const Tile& y) { return x.cost > y.cost; });
  return tiles;
}

// Keys of every sequence as blocks [lane, block, channel, width], the right-hand side of q @ k^T.
// A block holds `tokens` keys, the first one starts with its sequence; other columns are zero.
class PackedKeys {
 public:
  // Of sequence i only the blocks from first_block[i] on are packed.
  PackedKeys(const Call& call, const Rows& rows, int64_t dim, int64_t tokens, int64_t width,
             const std::vector<int64_t>& first_block)
      : dim_(dim), tokens_(tokens), width_(width), first_(first_block) {
    for (int64_t i = 0; i < call.sequence_count; i++) {
      base_.push_back(total_);
      const int64_t blocks = (call.sequences[i].k_count + tokens - 1) / tokens;
      total_ += std::max<int64_t>(0, blocks - first_[i]);
    }
    base_.push_back(total_);
    buffer_.grow(call.lanes() * total_ * dim * width);
    fill(call, rows);
  }

  const float* block(int64_t sequence, int64_t lane, int64_t index) const {
    return at(lane, base_[sequence] + index - first_[sequence]);
  }

 private:
  float* at(int64_t lane, int64_t index) const {
    return buffer_.get() + (lane * total_ + index) * dim_ * width_;
  }

  void fill(const Call& call, const Rows& rows) {
    parallel(call.lanes() * total_, [&] {
      return [&](int64_t task) {
        const int64_t lane = task / total_, index = task % total_;
        int64_t i = std::upper_bound(base_.begin(), base_.end(), index) - base_.begin() - 1;
        const Sequence& sequence = call.sequences[i];
        const int64_t first = (index - base_[i] + first_[i]) * tokens_;
        const int64_t count = std::min(tokens_, sequence.k_count - first);
        const int64_t b = lane / call.kv_heads, h = lane % call.kv_heads;
        const float* source = rows.at(b, sequence.k_first + first, h);
        float* target = at(lane, index);
        for (int64_t c = 0; c < dim_; c++) {
          for (int64_t t = 0; t < count; t++) target[c * width_ + t] = source[t * rows.token + c];
          std::fill(target + c * width_ + count, target + (c + 1) * width_, 0.f);
        }
      };
    });
  }

  int64_t dim_, tokens_, width_, total_ = 0;
  std::vector<int64_t> first_, base_;
  Buffer buffer_;
};

// The scaled queries of a tile and some heads, [count * heads, Dk], row i * heads + g.
inline void gather_queries(const Call& call, const Tile& tile, int64_t head, int64_t heads, float* out) {
  const Sequence& sequence = call.sequences[tile.sequence];
  const float scale = static_cast<float>(call.scale);
  for (int64_t i = 0; i < tile.count; i++)
    for (int64_t g = 0; g < heads; g++, out += call.dk_dim) {
      const float* q = call.q.at(tile.b, sequence.q_first + tile.first + i, tile.h * call.group + head + g);
      for (int64_t c = 0; c < call.dk_dim; c++) out[c] = q[c] * scale;
    }
}

// Writes one row of results, weighted by its gate where there are gates; the first branch sets o,
// later ones add to it.
inline void write_row(const Call& call, int64_t b, int64_t s, int64_t head, const float* row, float factor) {
  float* o = call.o.at(b, s, head);
  if (!call.gates) {
    for (int64_t c = 0; c < call.dv_dim; c++) o[c] = row[c] * factor;
    return;
  }
  factor *= call.gates[call.row(b, s, head) * 3 + call.branch];
  if (call.branch == 0)
    for (int64_t c = 0; c < call.dv_dim; c++) o[c] = row[c] * factor;
  else
    for (int64_t c = 0; c < call.dv_dim; c++) o[c] += row[c] * factor;
}

}  // namespace nsa
