// Which queries read a block: the inverse of the block ids, in the order of the queries.
#pragma once
#include <vector>

#include "chosen.h"

namespace nsa {

class Readers {
 public:
  // Some readers of one block; `slot` says where their sums lie, -1: straight in dk and dv.
  struct Item {
    int64_t sequence, b, h, block;
    const int64_t* queries;  // rows of the query axis, counted within the sequence
    int64_t count, slot;

    bool of_the_block_of(const Item& other) const {
      return sequence == other.sequence && b == other.b && h == other.h && block == other.block;
    }
  };
  std::vector<Item> items;  // of one block next to each other
  int64_t slots = 0;

  // Lists longer than `longest` are cut, whatever the number of threads.
  Readers(const Call& call, int64_t longest) {
    Chosen chosen(call);
    for (int64_t i = 0; i < call.sequence_count; i++) {
      const int64_t blocks = (call.sequences[i].k_count + call.select_block - 1) / call.select_block;
      bases_.push_back(lists_.size());
      lists_.resize(lists_.size() + call.lanes() * blocks);
      for (int64_t lane = 0; lane < call.lanes(); lane++)
        for (int64_t s = 0; s < call.sequences[i].q_count; s++) {
          chosen.of({i, lane / call.kv_heads, lane % call.kv_heads, s, 1, 0});
          for (const Chosen::Block& block : chosen.blocks)
            lists_[bases_[i] + lane * blocks + block.first / call.select_block].push_back(s);
        }
      for (int64_t lane = 0; lane < call.lanes(); lane++)
        for (int64_t j = 0; j < blocks; j++) add(call, i, lane, j, lists_[bases_[i] + lane * blocks + j], longest);
    }
  }

 private:
  void add(const Call& call, int64_t i, int64_t lane, int64_t block, const std::vector<int64_t>& list, int64_t longest) {
    const int64_t count = list.size();
    for (int64_t from = 0; from < count; from += longest) {
      const int64_t slot = count > longest ? slots++ : -1;
      items.push_back({i, lane / call.kv_heads, lane % call.kv_heads, block, list.data() + from,
                       std::min(longest, count - from), slot});
    }
  }

  std::vector<int64_t> bases_;
  std::vector<std::vector<int64_t>> lists_;
};

}  // namespace nsa
