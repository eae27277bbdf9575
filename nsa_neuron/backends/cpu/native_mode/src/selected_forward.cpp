// Forward pass of selected attention: a query's chosen blocks make one row of logits per head.
//
// One query times its group at a time, since neighbours need not share blocks: products of G rows,
// which run near the machine's rate from G = 16 on, and keys that stay in L2 where neighbours do
// share. Softmax in two passes over G x n*m logits (64 KiB at the default sizes).
#include "chosen.h"
#include "kernels.h"
#include "softmax.h"
#include "tiles.h"

namespace nsa {
namespace {

constexpr int64_t MAX_HEADS = 32;  // of a group, at once
constexpr int64_t QUERIES = 16;    // per task

struct Work {
  const Call& call;
  const PackedKeys* keys;  // null: few queries, keys are read as they lie
  int64_t heads, width, pitch;  // width: columns of a block, a multiple of WIDTH
  Chosen chosen;
  Buffer queries, transposed, logits, columns, results;

  Work(const Call& call, const PackedKeys* keys)
      : call(call), keys(keys), heads(std::min(call.group, MAX_HEADS)),
        width(round_up(call.select_block, WIDTH)), pitch(call.selected * width + WIDTH), chosen(call),
        queries(heads * call.dk_dim), transposed(heads * call.dk_dim), logits(heads * pitch),
        columns(heads * width), results(heads * call.dv_dim) {}

  void run(const Tile& tile) {
    for (int64_t i = 0; i < tile.count; i++) {
      const Tile one{tile.sequence, tile.b, tile.h, tile.first + i, 1, 0};
      chosen.of(one);
      for (int64_t head = 0; head < call.group; head += heads)
        attend(one, head, std::min(heads, call.group - head));
    }
  }

  void attend(const Tile& one, int64_t head, int64_t count) {
    const Sequence& sequence = call.sequences[one.sequence];
    const int64_t s = sequence.q_first + one.first, blocks = chosen.blocks.size();
    gather_queries(call, one, head, count, queries.get());
    if (!keys) transpose(queries.get(), count, call.dk_dim, transposed.get());
    for (int64_t j = 0; j < blocks; j++) block_logits(one, count, j);
    std::fill(results.get(), results.get() + count * call.dv_dim, 0.f);
    Running running[MAX_HEADS];
    for (int64_t g = 0; g < count; g++) running[g].take(logits.get() + g * pitch, blocks * width);
    for (int64_t j = 0; j < blocks; j++) {
      const Chosen::Block& block = chosen.blocks[j];
      gemm(count, call.dv_dim, block.tokens, logits.get() + j * width, pitch,
           call.v.at(one.b, sequence.k_first + block.first, one.h), call.v.token, results.get(), call.dv_dim,
           true);
    }
    for (int64_t g = 0; g < count; g++) {
      const int64_t at = one.h * call.group + head + g;
      write_row(call, one.b, s, at, results.get() + g * call.dv_dim, running[g].inverse());
      if (call.lse) call.lse[call.row(one.b, s, at)] = running[g].lse();
    }
  }

  // Logits of one block for every head, -inf past what the query sees.
  void block_logits(const Tile& one, int64_t count, int64_t j) {
    const Chosen::Block& block = chosen.blocks[j];
    float* out = logits.get() + j * width;
    if (keys) {
      const float* packed = keys->block(one.sequence, one.b * call.kv_heads + one.h, block.first / call.select_block);
      gemm(count, width, call.dk_dim, queries.get(), call.dk_dim, packed, width, out, pitch, false);
    } else {
      const Sequence& sequence = call.sequences[one.sequence];
      gemm(block.tokens, count, call.dk_dim, call.k.at(one.b, sequence.k_first + block.first, one.h),
           call.k.token, transposed.get(), count, columns.get(), count, false);
      for (int64_t g = 0; g < count; g++)
        for (int64_t x = 0; x < block.tokens; x++) out[g * pitch + x] = columns.get()[x * count + g];
    }
    for (int64_t g = 0; g < count; g++) hide(out + g * pitch, width, 0, block.visible);
  }

  static void transpose(const float* x, int64_t rows, int64_t columns, float* out) {
    for (int64_t i = 0; i < rows; i++)
      for (int64_t j = 0; j < columns; j++) out[j * rows + i] = x[i * columns + j];
  }
};

}  // namespace

void selected_forward(const Call& call) {
  const int64_t width = round_up(call.select_block, WIDTH);
  int64_t blocks = 0;
  for (int64_t i = 0; i < call.sequence_count; i++)
    blocks += (call.sequences[i].k_count + call.select_block - 1) / call.select_block;
  // Packing pays once a block is read a few times.
  std::unique_ptr<PackedKeys> keys;
  if (call.queries * call.selected >= 4 * blocks)
    keys = std::make_unique<PackedKeys>(call, call.k, call.dk_dim, call.select_block, width,
                                        std::vector<int64_t>(call.sequence_count, 0));
  const std::vector<Tile> tiles = cut(call, QUERIES);
  parallel(tiles.size(), [&] {
    auto work = std::make_shared<Work>(call, keys.get());
    return [&tiles, work](int64_t task) { work->run(tiles[task]); };
  });
}

}  // namespace nsa
