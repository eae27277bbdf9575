// Backward pass of selected attention: dq query by query, dk and dv block by block.
//
// Seven products where one pass would need five: a pass that does all would have to add to the keys
// of other threads' queries, in an order that changes, or keep a copy of dk and dv for each.
#include "gradients.h"
#include "kernels.h"
#include "readers.h"

namespace nsa {
namespace {

constexpr int64_t MAX_HEADS = 32;   // of a group, at once, for dq
constexpr int64_t QUERIES = 16;     // per task
constexpr int64_t MAX_ROWS = 128;   // readers times heads, for dk and dv
constexpr int64_t LONGEST = 1024;   // readers of an item

// dq of a tile of queries.
struct QueryWork {
  const Call& call;
  const PackedKeys &keys, &values;
  int64_t heads, width;
  Chosen chosen;
  Buffer q, gradient, p, dp, dq, lse, shift;

  QueryWork(const Call& call, const PackedKeys& keys, const PackedKeys& values)
      : call(call), keys(keys), values(values), heads(std::min(call.group, MAX_HEADS)),
        width(round_up(call.select_block, WIDTH)), chosen(call), q(heads * call.dk_dim),
        gradient(heads * call.dv_dim), p(heads * width), dp(heads * width), dq(heads * call.dk_dim),
        lse(heads), shift(heads) {}

  void run(const Tile& tile) {
    for (int64_t i = 0; i < tile.count; i++) {
      const Tile one{tile.sequence, tile.b, tile.h, tile.first + i, 1, 0};
      chosen.of(one);
      for (int64_t head = 0; head < call.group; head += heads)
        differentiate(one, head, std::min(heads, call.group - head));
    }
  }

  void differentiate(const Tile& one, int64_t head, int64_t count) {
    const int64_t s = call.sequences[one.sequence].q_first + one.first, first = one.h * call.group + head;
    gather_queries(call, one, head, count, q.get());
    for (int64_t g = 0; g < count; g++)
      gather_gradient(call, one.b, s, first + g, gradient.get() + g * call.dv_dim);
    gather_statistics(call, one.b, s, first, count, lse.get(), shift.get());
    std::fill(dq.get(), dq.get() + count * call.dk_dim, 0.f);
    for (const Chosen::Block& block : chosen.blocks) add(one, count, block);
    for (int64_t g = 0; g < count; g++)
      write_dq(call, one.b, s, first + g, dq.get() + g * call.dk_dim, 1);
  }

  // Adds what one block gives.
  void add(const Tile& one, int64_t count, const Chosen::Block& block) {
    const int64_t lane = one.b * call.kv_heads + one.h, index = block.first / call.select_block;
    gemm(count, width, call.dk_dim, q.get(), call.dk_dim, keys.block(one.sequence, lane, index), width, p.get(),
         width, false);
    gemm(count, width, call.dv_dim, gradient.get(), call.dv_dim, values.block(one.sequence, lane, index), width,
         dp.get(), width, false);
    for (int64_t g = 0; g < count; g++) {
      float *row = p.get() + g * width, *slope = dp.get() + g * width;
      for (int64_t x = 0; x < width; x += WIDTH) {
        const Vec weight = exponential(load(row + x) - splat(lse.get()[g]));
        store(slope + x, weight * (load(slope + x) - splat(shift.get()[g])));
      }
      std::fill(slope + block.visible, slope + width, 0.f);
    }
    const Sequence& sequence = call.sequences[one.sequence];
    gemm(count, call.dk_dim, block.tokens, dp.get(), width, call.k.at(one.b, sequence.k_first + block.first, one.h),
         call.k.token, dq.get(), call.dk_dim, true);
  }
};

// Every query's scaled q and gated gradient as columns [channel, head]: readers' columns are then
// put side by side by copies of whole groups.
class Columns {
 public:
  explicit Columns(const Call& call)
      : call_(call), size_((call.dk_dim + call.dv_dim) * call.group), data_(call.lanes() * call.queries * size_) {
    parallel(call.lanes() * call.queries, [&] {
      return [&](int64_t task) {
        const int64_t lane = task / call_.queries;
        fill(lane / call_.kv_heads, lane % call_.kv_heads, task % call_.queries);
      };
    });
  }

  const float* q(int64_t b, int64_t h, int64_t s) const {
    return data_.get() + ((b * call_.kv_heads + h) * call_.queries + s) * size_;
  }
  const float* gradient(int64_t b, int64_t h, int64_t s) const { return q(b, h, s) + call_.dk_dim * call_.group; }

 private:
  void fill(int64_t b, int64_t h, int64_t s) {
    float* out = const_cast<float*>(q(b, h, s));
    const float scale = static_cast<float>(call_.scale);
    const int64_t group = call_.group;
    for (int64_t g = 0; g < group; g++) {
      const float* row = call_.q.at(b, s, h * group + g);
      for (int64_t c = 0; c < call_.dk_dim; c++) out[c * group + g] = row[c] * scale;
    }
    out += call_.dk_dim * group;
    for (int64_t g = 0; g < group; g++) {
      const float* row = call_.grad_o.at(b, s, h * group + g);
      const float gate = gate_of(call_, b, s, h * group + g);
      for (int64_t c = 0; c < call_.dv_dim; c++) out[c * group + g] = row[c] * gate;
    }
  }

  const Call& call_;
  int64_t size_;
  Buffer data_;
};

// dk and dv of the blocks of items.
struct BlockWork {
  const Call& call;
  const Columns& columns;
  float* slots;
  int64_t readers, pitch;
  Buffer q, q_columns, gradient, gradient_columns, p, ds, lse, shift, own;

  BlockWork(const Call& call, const Columns& columns, float* slots)
      : call(call), columns(columns), slots(slots), readers(std::max<int64_t>(1, MAX_ROWS / call.group)),
        pitch(round_up(readers * call.group, WIDTH)), q(pitch * call.dk_dim), q_columns(pitch * call.dk_dim),
        gradient(pitch * call.dv_dim), gradient_columns(pitch * call.dv_dim), p(call.select_block * pitch),
        ds(call.select_block * pitch), lse(pitch), shift(pitch), own(slot_size(call)) {}

  // Floats of the sums of one block: dk, then dv.
  static int64_t slot_size(const Call& call) { return call.select_block * (call.dk_dim + call.dv_dim); }

  void run(const Readers::Item& item) {
    float* sums = item.slot < 0 ? own.get() : slots + item.slot * slot_size(call);
    std::fill(sums, sums + slot_size(call), 0.f);
    for (int64_t from = 0; from < item.count; from += readers)
      add(item, item.queries + from, std::min(readers, item.count - from), sums);
    if (item.slot < 0) write(call, item, sums, false);
  }

  // Sets, or adds to, dk and dv of a block.
  static void write(const Call& call, const Readers::Item& item, const float* sums, bool more) {
    const Sequence& sequence = call.sequences[item.sequence];
    const int64_t first = item.block * call.select_block;
    const int64_t tokens = std::min(call.select_block, sequence.k_count - first);
    const float* values = sums + call.select_block * call.dk_dim;
    for (int64_t t = 0; t < tokens; t++) {
      float* dk = call.dk.at(item.b, sequence.k_first + first + t, item.h);
      float* dv = call.dv.at(item.b, sequence.k_first + first + t, item.h);
      for (int64_t c = 0; c < call.dk_dim; c++) dk[c] = sums[t * call.dk_dim + c] + (more ? dk[c] : 0.f);
      for (int64_t c = 0; c < call.dv_dim; c++) dv[c] = values[t * call.dv_dim + c] + (more ? dv[c] : 0.f);
    }
  }

 private:
  void add(const Readers::Item& item, const int64_t* queries, int64_t count, float* sums) {
    const Sequence& sequence = call.sequences[item.sequence];
    const int64_t first = item.block * call.select_block, m = count * call.group, n = round_up(m, WIDTH);
    const int64_t tokens = std::min(call.select_block, sequence.k_count - first);
    gather(item, queries, count, n);
    gemm(tokens, n, call.dk_dim, call.k.at(item.b, sequence.k_first + first, item.h), call.k.token, q_columns.get(),
         pitch, p.get(), pitch, false);
    gemm(tokens, n, call.dv_dim, call.v.at(item.b, sequence.k_first + first, item.h), call.v.token,
         gradient_columns.get(), pitch, ds.get(), pitch, false);
    probabilities_and_slopes(p.get(), ds.get(), tokens, n, pitch, lse.get(), shift.get());
    for (int64_t i = 0; i < count; i++) {
      const int64_t visible = std::min(tokens, sequence.offset + queries[i] - first + 1);
      hide_columns(p.get(), ds.get(), pitch, visible, tokens, i * call.group, call.group);
    }
    float* values = sums + call.select_block * call.dk_dim;
    gemm(tokens, call.dv_dim, m, p.get(), pitch, gradient.get(), call.dv_dim, values, call.dv_dim, true);
    gemm(tokens, call.dk_dim, m, ds.get(), pitch, q.get(), call.dk_dim, sums, call.dk_dim, true);
  }

  // Readers' q, gradients and statistics, as rows and as n columns.
  void gather(const Readers::Item& item, const int64_t* queries, int64_t count, int64_t n) {
    const Sequence& sequence = call.sequences[item.sequence];
    const int64_t group = call.group;
    for (int64_t i = 0; i < count; i++) {
      const int64_t s = sequence.q_first + queries[i];
      side_by_side(columns.q(item.b, item.h, s), call.dk_dim, q_columns.get() + i * group);
      side_by_side(columns.gradient(item.b, item.h, s), call.dv_dim, gradient_columns.get() + i * group);
      gather_queries(call, {item.sequence, item.b, item.h, queries[i], 1, 0}, 0, group,
                     q.get() + i * group * call.dk_dim);
      for (int64_t g = 0; g < group; g++)
        gather_gradient(call, item.b, s, item.h * group + g, gradient.get() + (i * group + g) * call.dv_dim);
      gather_statistics(call, item.b, s, item.h * group, group, lse.get() + i * group, shift.get() + i * group);
    }
    // Columns behind the last reader: finite, with probability 0.
    std::fill(lse.get() + count * group, lse.get() + n, -MINUS_INFINITY);
    std::fill(shift.get() + count * group, shift.get() + n, 0.f);
    clear_columns(q_columns.get(), call.dk_dim, count * group, n);
    clear_columns(gradient_columns.get(), call.dv_dim, count * group, n);
  }

  void side_by_side(const float* source, int64_t channels, float* out) const {
    for (int64_t c = 0; c < channels; c++)
      std::memcpy(out + c * pitch, source + c * call.group, call.group * sizeof(float));
  }
  void clear_columns(float* out, int64_t channels, int64_t from, int64_t to) const {
    if (from < to)
      for (int64_t c = 0; c < channels; c++) std::fill(out + c * pitch + from, out + c * pitch + to, 0.f);
  }
};

void query_pass(const Call& call) {
  const std::vector<int64_t> all(call.sequence_count, 0);
  const int64_t width = round_up(call.select_block, WIDTH);
  const PackedKeys keys(call, call.k, call.dk_dim, call.select_block, width, all);
  const PackedKeys values(call, call.v, call.dv_dim, call.select_block, width, all);
  const std::vector<Tile> tiles = cut(call, QUERIES);
  parallel(tiles.size(), [&] {
    auto work = std::make_shared<QueryWork>(call, keys, values);
    return [&tiles, work](int64_t task) { work->run(tiles[task]); };
  });
}

void block_pass(const Call& call) {
  const Readers readers(call, LONGEST);
  const Columns columns(call);
  const Buffer slots(readers.slots * BlockWork::slot_size(call));
  std::vector<Readers::Item> items = readers.items;
  std::stable_sort(items.begin(), items.end(),
                   [](const Readers::Item& x, const Readers::Item& y) { return x.count > y.count; });
  parallel(items.size(), [&] {
    auto work = std::make_shared<BlockWork>(call, columns, slots.get());
    return [&items, work](int64_t task) { work->run(items[task]); };
  });
  // The sums of a block that was cut, in the order of its readers: items [first, second) are its.
  std::vector<std::pair<size_t, size_t>> runs;
  for (size_t i = 0; i < readers.items.size(); i++) {
    const Readers::Item& item = readers.items[i];
    if (item.slot < 0) continue;
    if (i > 0 && readers.items[i - 1].of_the_block_of(item))
      runs.back().second = i + 1;
    else
      runs.push_back({i, i + 1});
  }
  parallel(runs.size(), [&] {
    return [&](int64_t task) {
      for (size_t i = runs[task].first; i < runs[task].second; i++) {
        const Readers::Item& item = readers.items[i];
        BlockWork::write(call, item, slots.get() + item.slot * BlockWork::slot_size(call), i > runs[task].first);
      }
    };
  });
}

}  // namespace

void selected_backward(const Call& call) {
  query_pass(call);
  block_pass(call);
}

}  // namespace nsa
