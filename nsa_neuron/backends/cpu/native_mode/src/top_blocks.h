// Scores of selection blocks from compressed probabilities, and the choice of the best.
#pragma once
#include <algorithm>
#include <vector>

#include "call.h"
#include "simd.h"

namespace nsa {

class TopBlocks {
 public:
  explicit TopBlocks(const Call& call)
      : call_(call), ratio_(call.select_block / call.stride), lead_(call.length / call.stride - 1) {
    // Tap a: tokens that compressed block (a - lead) after a selection block's first shares with it.
    for (int64_t a = 0; a < lead_ + ratio_; a++) {
      const int64_t start = (a - lead_) * call.stride;
      const int64_t shared = std::min(start + call.length, call.select_block) - std::max<int64_t>(start, 0);
      weights_.push_back(float(shared) / float(call.stride));
    }
  }

  // Floats before and behind a query's probabilities that `choose` reads: zeros.
  int64_t lead() const { return lead_; }
  int64_t reach(int64_t t) const { return (t / call_.select_block + 1) * ratio_; }

  // Ids of a query at t, ascending, -1 behind them.
  // p: summed probabilities of its group, zero from -lead() and up to reach(t).
  void choose(const float* p, int64_t t, int32_t* ids) {
    const int64_t own = t / call_.select_block;
    const int64_t low = std::min(call_.initial, own + 1);
    const int64_t high = std::max(own + 1 - call_.local, low);
    int64_t room = call_.selected - low - (own + 1 - high), count = 0;
    for (int64_t j = 0; j < low; j++) ids[count++] = int32_t(j);
    best_.clear();
    if (room > 0) collect(p, low, high, room);
    std::sort(best_.begin(), best_.end(), [](const Block& x, const Block& y) { return x.id < y.id; });
    for (const Block& block : best_) ids[count++] = block.id;
    for (int64_t j = high; j <= own; j++) ids[count++] = int32_t(j);
    std::fill(ids + count, ids + call_.selected, -1);
  }

 private:
  struct Block {
    float score;
    int32_t id;
    bool before(const Block& other) const {
      return score > other.score || (score == other.score && id < other.id);
    }
  };

  float score(const float* p, int64_t j) const {
    const float* first = p + j * ratio_ - lead_;
    float total = 0;
    for (size_t a = 0; a < weights_.size(); a++) total += first[a] * weights_[a];
    return total >= 0 ? total : 0;  // NaN has no order, which sorting needs
  }

  // The best `room` of blocks [low, high) into best_: a heap whose top is the worst of them.
  void collect(const float* p, int64_t low, int64_t high, int64_t room) {
    const auto order = [](const Block& x, const Block& y) { return x.before(y); };
    for (int64_t j = low; j < high; j++) {
      const Block block{score(p, j), int32_t(j)};
      if (int64_t(best_.size()) < room) {
        best_.push_back(block);
        std::push_heap(best_.begin(), best_.end(), order);
      } else if (block.before(best_.front())) {
        std::pop_heap(best_.begin(), best_.end(), order);
        best_.back() = block;
        std::push_heap(best_.begin(), best_.end(), order);
      }
    }
  }

  const Call& call_;
  int64_t ratio_, lead_;
  std::vector<float> weights_;
  std::vector<Block> best_;
};

}  // namespace nsa
