// The blocks that one query chose, checked.
#pragma once
#include <algorithm>
#include <string>
#include <vector>

#include "runtime.h"
#include "tiles.h"

namespace nsa {

class Chosen {
 public:
  // A block with a visible token.
  struct Block {
    int64_t first;    // token of the sequence
    int64_t tokens;   // of it that exist
    int64_t visible;  // of these, those not after the query
  };
  std::vector<Block> blocks;

  explicit Chosen(const Call& call) : call_(call) { blocks.reserve(call.selected); }

  // Reads the ids of a tile of one query. An id that names no block is refused here, where it would
  // be used: nothing is read outside the keys whatever the ids are.
  void of(const Tile& one) {
    const Sequence& sequence = call_.sequences[one.sequence];
    of(one.b, sequence.q_first + one.first, one.h, sequence.offset + one.first, sequence.k_count);
  }

  // The same for row s of the query axis, at position t of a sequence of so many keys.
  void of(int64_t b, int64_t s, int64_t h, int64_t t, int64_t keys) {
    const int64_t m = call_.select_block, limit = (keys + m - 1) / m;
    const int32_t* ids = call_.ids + ((b * call_.queries + s) * call_.kv_heads + h) * call_.selected;
    blocks.clear();
    for (int64_t j = 0; j < call_.selected; j++) {
      const int64_t id = ids[j];
      if (id < -1 || id >= limit)
        throw BadIds("with id " + std::to_string(id) + " of query " + std::to_string(s) + "|in [-1, " +
                      std::to_string(limit) + ")");
      const int64_t first = id * m;
      if (id < 0 || first > t) continue;
      const int64_t tokens = std::min(m, keys - first);
      blocks.push_back({first, tokens, std::min(tokens, t - first + 1)});
    }
    refuse_repetition(ids, s);
  }

 private:
  void refuse_repetition(const int32_t* ids, int64_t s) {
    bool ascending = true;
    int32_t last = -1;
    for (int64_t j = 0; j < call_.selected; j++) {
      if (ids[j] < 0) continue;
      ascending = ascending && ids[j] > last;
      last = ids[j];
    }
    if (ascending) return;
    sorted_.assign(ids, ids + call_.selected);
    std::sort(sorted_.begin(), sorted_.end());
    for (size_t j = 1; j < sorted_.size(); j++)
      if (sorted_[j] >= 0 && sorted_[j] == sorted_[j - 1])
        throw BadIds("repeating id " + std::to_string(sorted_[j]) + " for query " + std::to_string(s) +
                      "|distinct per row");
  }

  const Call& call_;
  std::vector<int32_t> sorted_;
};

}  // namespace nsa
