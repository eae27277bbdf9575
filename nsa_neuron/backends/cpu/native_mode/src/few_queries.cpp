// Attention of a few queries per sequence: a decode step.
//
// Bound by the bytes of the keys and values that are seen: these are read once, as they lie, and
// nothing else is. A query's run of keys is cut in pieces, whose softmax is made separately and then
// put together in their order; so all threads work on one query, and their number changes nothing.
#include "chosen.h"
#include "half.h"
#include "kernels.h"
#include "softmax.h"
#include "tiles.h"
#include "top_blocks.h"

namespace nsa {
namespace {

constexpr int64_t LONGEST = 256;  // keys of a piece

// Consecutive keys that lie in one page.
struct Piece {
  int64_t problem, page, row, first, count;  // `first`: index of the first key in the sequence
};

// Rows as products take them: where they lie, or converted.
struct Floats {
  const float* data;
  int64_t pitch;
};
Floats floats(const Rows& rows, const Piece& piece, int64_t h, int64_t channels, Buffer& converted) {
  if (rows.type == Rows::FLOAT32) return {rows.at(piece.page, piece.row, h), rows.token};
  converted.grow(LONGEST * channels);
  const uint16_t* source = reinterpret_cast<const uint16_t*>(rows.data) + rows.offset(piece.page, piece.row, h);
  for (int64_t i = 0; i < piece.count; i++) {
    const uint16_t* row = source + i * rows.token;
    float* out = converted.get() + i * channels;
    if (rows.type == Rows::BFLOAT16)
      from_bfloat16(row, out, channels);
    else
      from_float16(row, out, channels);
  }
  return {converted.get(), channels};
}

// One query's group of heads in one branch.
struct Problem {
  int64_t b, s, h, t;
  int64_t begin, end;  // its pieces
};

// One branch of the call: its problems, pieces, and what pieces give.
class Branch {
 public:
  explicit Branch(const Call& call) : call_(call), chosen_(call), problems_() {}

  // Cuts every query's keys in pieces; ids, if this branch reads them, are known by now.
  void plan() {
    for (int64_t b = 0; b < call_.batch; b++)
      for (int64_t s = 0; s < call_.queries; s++)
        for (int64_t h = 0; h < call_.kv_heads; h++) add_problem(b, s, h);
    const int64_t group = call_.group;
    queries_.grow(problems_.size() * call_.dk_dim * group);
    running_.resize(pieces_.size() * group);
    results_.grow(call_.o.data ? pieces_.size() * group * call_.dv_dim : 0);
    // Probabilities of pieces lie side by side, for the scores of selection.
    offsets_.resize(pieces_.size() + 1, 0);
    for (size_t i = 0; i < pieces_.size(); i++) offsets_[i + 1] = offsets_[i] + round_up(pieces_[i].count, WIDTH);
    if (call_.chooses()) probabilities_.grow(offsets_.back() * group);
    parallel(problems_.size(), [&] {
      return [&](int64_t task) { gather(task); };
    });
  }

  int64_t pieces() const { return pieces_.size(); }
  int64_t problems() const { return problems_.size(); }

  struct Scratch {
    Buffer columns, rows, converted;
    explicit Scratch(int64_t group) : columns(LONGEST * group), rows((LONGEST + WIDTH) * group) {}
  };

  void run(int64_t index, Scratch& scratch) {
    const Piece& piece = pieces_[index];
    const Problem& problem = problems_[piece.problem];
    const int64_t group = call_.group, pitch = round_up(piece.count, WIDTH);
    const Floats keys = floats(call_.k, piece, problem.h, call_.dk_dim, scratch.converted);
    gemm(piece.count, group, call_.dk_dim, keys.data, keys.pitch,
         queries_.get() + piece.problem * call_.dk_dim * group, group, scratch.columns.get(), group, false);
    float* rows = call_.chooses() ? probabilities_.get() + offsets_[index] * group : scratch.rows.get();
    for (int64_t g = 0; g < group; g++) {
      float* row = rows + g * pitch;
      for (int64_t x = 0; x < piece.count; x++) row[x] = scratch.columns.get()[x * group + g];
      std::fill(row + piece.count, row + pitch, MINUS_INFINITY);
      Running& running = running_[index * group + g];
      running = Running();
      running.take(row, pitch);
    }
    if (!call_.o.data) return;
    float* out = results_.get() + index * group * call_.dv_dim;
    const Floats values = floats(call_.v, piece, problem.h, call_.dv_dim, scratch.converted);
    gemm(group, call_.dv_dim, piece.count, rows, pitch, values.data, values.pitch, out, call_.dv_dim, false);
  }

  // Chooses the blocks of a problem from the probabilities of its pieces.
  void choose(int64_t index) {
    const Problem& problem = problems_[index];
    int32_t* ids = call_.ids + ((problem.b * call_.queries + problem.s) * call_.kv_heads + problem.h) * call_.selected;
    if (problem.t < 0) {
      std::fill(ids, ids + call_.selected, -1);
      return;
    }
    TopBlocks top(call_);
    const int64_t lead = round_up(top.lead(), WIDTH);
    int64_t keys = 0;
    for (int64_t i = problem.begin; i < problem.end; i++) keys += pieces_[i].count;
    Buffer sums(lead + std::max(keys, top.reach(problem.t)) + WIDTH);
    std::fill(sums.get(), sums.get() + lead + std::max(keys, top.reach(problem.t)) + WIDTH, 0.f);
    for (int64_t g = 0; g < call_.group; g++) {
      const Running whole = merged(problem, g);
      for (int64_t i = problem.begin; i < problem.end; i++) {
        const float factor = fade(running_[i * call_.group + g], whole) * whole.inverse();
        const int64_t pitch = round_up(pieces_[i].count, WIDTH);
        const float* row = probabilities_.get() + offsets_[i] * call_.group + g * pitch;
        float* out = sums.get() + lead + pieces_[i].first;
        for (int64_t x = 0; x < pieces_[i].count; x++) out[x] += row[x] * factor;
      }
    }
    top.choose(sums.get() + lead, problem.t, ids);
  }

  // Puts the results of a problem's pieces together and writes them.
  void write(int64_t index, Buffer& sum) {
    const Problem& problem = problems_[index];
    sum.grow(call_.dv_dim);
    for (int64_t g = 0; g < call_.group; g++) {
      const Running whole = merged(problem, g);
      std::fill(sum.get(), sum.get() + call_.dv_dim, 0.f);
      for (int64_t i = problem.begin; i < problem.end; i++) {
        const float factor = fade(running_[i * call_.group + g], whole);
        const float* part = results_.get() + (i * call_.group + g) * call_.dv_dim;
        for (int64_t c = 0; c < call_.dv_dim; c++) sum.get()[c] += part[c] * factor;
      }
      const int64_t head = problem.h * call_.group + g;
      write_row(call_, problem.b, problem.s, head, sum.get(), whole.inverse());
      if (call_.lse) call_.lse[call_.row(problem.b, problem.s, head)] = whole.lse();
    }
  }

  const Call& call() const { return call_; }

 private:
  // What a piece's exps are multiplied with to be relative to the whole's maximum.
  static float fade(const Running& part, const Running& whole) {
    return part.top == whole.top ? 1.f : std::exp(part.top - whole.top);
  }

  Running merged(const Problem& problem, int64_t g) const {
    Running whole;
    for (int64_t i = problem.begin; i < problem.end; i++)
      whole.top = std::max(whole.top, running_[i * call_.group + g].top);
    for (int64_t i = problem.begin; i < problem.end; i++) {
      const Running& part = running_[i * call_.group + g];
      whole.total += part.total * fade(part, whole);
    }
    return whole;
  }

  void add_problem(int64_t b, int64_t s, int64_t h) {
    const int64_t tokens = call_.lengths ? call_.lengths[b] : call_.sequences[0].k_count;
    const int64_t t = call_.lengths ? tokens - call_.queries + s : call_.sequences[0].offset + s;
    Problem problem{b, s, h, t, int64_t(pieces_.size()), 0};
    const Sequence sequence = call_.lengths ? sequence_of(tokens) : call_.sequences[0];
    if (t >= 0 && !call_.reads_ids()) {
      const Span span = seen(call_, sequence, t);
      cut(b, span.low, span.high);
    } else if (t >= 0) {
      chosen_.of(b, s, h, t, sequence.k_count);
      for (const Chosen::Block& block : chosen_.blocks) cut(b, block.first, block.first + block.visible);
    }
    problem.end = pieces_.size();
    problems_.push_back(problem);
  }

  Sequence sequence_of(int64_t tokens) const {
    const int64_t complete = tokens - call_.length;
    return {0, call_.queries, 0, complete < 0 ? 0 : complete / call_.stride + 1, 0};
  }

  // Pieces of keys [low, high): within pages, and in powers of two, so that few sizes of products
  // occur, each of which torch compiles once.
  void cut(int64_t b, int64_t low, int64_t high) {
    while (low < high) {
      const int64_t slot = low / call_.page, row = low % call_.page;
      const int64_t room = std::min(high - low, call_.page - row);
      int64_t count = LONGEST;
      while (count > room) count /= 2;
      pieces_.push_back({int64_t(problems_.size()), page_of(b, slot), row, low, count});
      low += count;
    }
  }

  int64_t page_of(int64_t b, int64_t slot) const {
    if (!call_.table) return b;
    if (slot >= call_.table_width) throw BadTable("a sequence is longer than its table of pages");
    const int64_t page = call_.table[b * call_.table_width + slot];
    if (page < 0 || page >= call_.pages) throw BadTable("a table names page " + std::to_string(page));
    return page;
  }

  void gather(int64_t index) {
    const Problem& problem = problems_[index];
    const float scale = static_cast<float>(call_.scale);
    float* out = queries_.get() + index * call_.dk_dim * call_.group;
    for (int64_t g = 0; g < call_.group; g++) {
      const float* q = call_.q.at(problem.b, problem.s, problem.h * call_.group + g);
      for (int64_t c = 0; c < call_.dk_dim; c++) out[c * call_.group + g] = q[c] * scale;
    }
  }

  const Call& call_;
  Chosen chosen_;
  std::vector<Problem> problems_;
  std::vector<Piece> pieces_;
  std::vector<int64_t> offsets_;
  std::vector<Running> running_;
  Buffer queries_, results_, probabilities_;
};

// Plans some branches and runs their pieces in one go.
void run_pieces(const std::vector<Branch*>& branches) {
  int64_t total = 0, group = 1;
  for (Branch* branch : branches) {
    branch->plan();
    total += branch->pieces();
    group = branch->call().group;
  }
  parallel(total, [&] {
    auto scratch = std::make_shared<Branch::Scratch>(group);
    return [&branches, scratch](int64_t task) {
      for (Branch* branch : branches) {
        if (task < branch->pieces()) return branch->run(task, *scratch);
        task -= branch->pieces();
      }
    };
  });
}

}  // namespace

void few_queries(const Call* calls, int64_t count) {
  std::vector<std::unique_ptr<Branch>> branches;
  std::vector<Branch*> first, reading;
  for (int64_t i = 0; i < count; i++) {
    branches.push_back(std::make_unique<Branch>(calls[i]));
    (calls[i].reads_ids() ? reading : first).push_back(branches.back().get());
  }
  run_pieces(first);
  for (Branch* branch : first)
    if (branch->call().chooses())
      parallel(branch->problems(), [&] { return [&](int64_t task) { branch->choose(task); }; });
  run_pieces(reading);
  // In the order of the branches, since later ones add to what the first has set.
  parallel(branches[0]->problems(), [&] {
    auto sum = std::make_shared<Buffer>();
    return [&branches, sum](int64_t task) {
      for (const auto& branch : branches)
        if (branch->call().o.data) branch->write(task, *sum);
    };
  });
}

}  // namespace nsa
