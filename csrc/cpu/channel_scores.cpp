// channel_scores_ on the CPU: cuts the tensors into blocks, streams them on all threads, and adds the blocks' sums in
// one fixed order. The cut depends on the shapes alone, so the number of threads never changes a bit.
#include "channel_scores.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "cpu/features.h"
#include "cpu/score_block.h"
#include "cpu/threads.h"

namespace diffprune {
namespace {

constexpr int64_t MAX_COLS = 16384;        // the column accumulators of a block stay in the second-level cache
constexpr int64_t MIN_BLOCK = 1 << 16;     // elements: below, handing a block out costs more than it is worth
constexpr int64_t MAX_BLOCK = 1 << 20;     // above, nothing is gained and the last block is waited for
constexpr int64_t PER_THREAD = 1 << 18;    // a thread takes as long to start as this many elements take one to read
constexpr int64_t BLOCKS_PER_TENSOR = 16;  // so that a single layer keeps several threads busy

struct Cut {  // of one entry
  ScoreEntry entry;
  int64_t cols, tile_cols, tiles, block_rows, blocks;
  int64_t first_item = 0, n_items;
  bool runs;  // channels_last: the row is `trailing` runs of all inner indices

  explicit Cut(ScoreEntry e) : entry(e) {
    if (e.inner * e.trailing == 1) {  // a vector: one row of many columns rather than many rows of one
      std::swap(entry.outer, entry.inner);
      std::swap(entry.row_units, entry.col_units);
      entry.inner_stride = 1;
      entry.trailing_stride = entry.inner;
    }
    cols = entry.inner * entry.trailing;
    // a tile holds whole inner indices (contiguous) or whole runs of them (channels_last)
    runs = entry.inner_stride == 1 && entry.trailing > 1;
    const int64_t unit = runs ? entry.inner : entry.trailing;
    tile_cols = std::min(cols, std::max<int64_t>(1, MAX_COLS / unit) * unit);
    tiles = (cols + tile_cols - 1) / tile_cols;
    const int64_t wanted = std::clamp(entry.outer * cols / BLOCKS_PER_TENSOR, MIN_BLOCK, MAX_BLOCK);
    block_rows = std::max<int64_t>(4, (wanted / tile_cols + 3) / 4 * 4);
    blocks = (entry.outer + block_rows - 1) / block_rows;
    n_items = blocks * tiles;
  }

  int64_t tile_inner(int64_t tile) const {
    if (runs) return entry.inner;
    return std::min(tile_cols, cols - tile * tile_cols) / entry.trailing;
  }
  int64_t tile_first_inner(int64_t tile) const { return runs ? 0 : tile * tile_cols / entry.trailing; }
  // Partial sums of an item: block_rows doubles for its rows, then its columns.
  int64_t partial_size() const { return block_rows + (runs ? entry.inner : tile_cols / entry.trailing); }
};

struct Sums {  // of one entry, while the call runs
  std::once_flag allocated;
  std::atomic<int64_t> left{0};
  std::unique_ptr<double[]> partials, totals;
};

int64_t dtype_size(Dtype d) { return d == Dtype::f64 ? 8 : d == Dtype::f32 ? 4 : 2; }

ScoreBlockFn block_function(Dtype dtype, Criterion criterion, bool stacked) {
#if defined(__x86_64__)
  if (simd_level() == Simd::avx512) return score_block_avx512(dtype, criterion, stacked);
  if (simd_level() == Simd::avx2) return score_block_avx2(dtype, criterion, stacked);
#endif
  return score_block_baseline(dtype, criterion, stacked);
}

void run_item(const ScoreCall& call, const Cut& cut, int64_t item, double* partial, void* scratch) {
  const ScoreEntry& e = cut.entry;
  const int64_t block = item / cut.tiles, tile = item % cut.tiles;
  const int64_t row = block * cut.block_rows, col = tile * cut.tile_cols;
  const int64_t offset = (row * cut.cols + col) * dtype_size(e.dtype);
  ScoreBlock b;
  b.theta = static_cast<const char*>(e.theta) + offset;
  b.grad = e.grad ? static_cast<char*>(e.grad) + offset : nullptr;
  b.rows = std::min(cut.block_rows, e.outer - row);
  b.cols = std::min(cut.tile_cols, cut.cols - col);
  b.row_stride = cut.cols;
  b.steps = call.steps;
  b.step_stride = e.outer * cut.cols;
  b.timestep_weights = call.timestep_weights;
  b.zero_grad = call.zero_grad;
  b.fold_inner = cut.tile_inner(tile);
  b.fold_trailing = b.cols / b.fold_inner;
  b.inner_stride = e.inner_stride;
  b.trailing_stride = e.trailing_stride;
  b.scratch = scratch;
  b.row_sums = partial;
  b.col_sums = partial + cut.block_rows;
  block_function(e.dtype, call.criterion, call.timestep_weights != nullptr)(b);
}

// The entry's row sums, then its column sums, from its items' in ascending order.
void combine(const Cut& cut, const double* partials, double* totals) {
  const ScoreEntry& e = cut.entry;
  std::fill(totals, totals + e.outer + e.inner, 0.0);
  double* cols = totals + e.outer;
  for (int64_t item = 0; item < cut.n_items; ++item) {
    const double* p = partials + item * cut.partial_size();
    const int64_t row = item / cut.tiles * cut.block_rows, tile = item % cut.tiles;
    const int64_t rows = std::min(cut.block_rows, e.outer - row);
    for (int64_t r = 0; r < rows; ++r) totals[row + r] += p[r];
    const int64_t first = cut.tile_first_inner(tile), n = cut.tile_inner(tile);
    for (int64_t i = 0; i < n; ++i) cols[first + i] += p[cut.block_rows + i];
  }
}

template <class Score>
void scatter(const Cut& cut, const double* totals, Score* scores) {
  const ScoreEntry& e = cut.entry;
  const int32_t* units[2] = {e.row_units, e.col_units};
  const int64_t sizes[2] = {e.outer, e.inner};
  for (int side = 0; side < 2; ++side) {
    if (units[side])
      for (int64_t i = 0; i < sizes[side]; ++i)
        if (units[side][i] >= 0) {
          Score& score = scores[units[side][i]];
          score = static_cast<Score>(static_cast<double>(score) + totals[i] * e.weight);
        }
    totals += sizes[side];
  }
}

// Consecutive items worth at least MIN_BLOCK elements: norms and biases are handed out many at a time.
std::vector<int64_t> portions(const std::vector<Cut>& cuts) {
  std::vector<int64_t> starts{0};
  int64_t items = 0, elements = 0;
  for (const Cut& cut : cuts)
    for (int64_t i = 0; i < cut.n_items; ++i) {
      elements += std::min(cut.block_rows, cut.entry.outer) * cut.tile_cols;
      ++items;
      if (elements >= MIN_BLOCK) {
        starts.push_back(items);
        elements = 0;
      }
    }
  if (starts.back() != items) starts.push_back(items);
  return starts;
}

template <class Score>
void channel_scores(const ScoreCall& call, Score* scores) {
  std::vector<Cut> cuts;
  cuts.reserve(call.n_entries);
  int64_t items = 0, widest = 0, elements = 0;
  for (int64_t i = 0; i < call.n_entries; ++i) {
    cuts.emplace_back(call.entries[i]);
    cuts.back().first_item = items;
    items += cuts.back().n_items;
    widest = std::max(widest, cuts.back().tile_cols);
    elements += cuts.back().entry.outer * cuts.back().cols * call.steps;
  }
  if (!items) return;
  std::unique_ptr<Sums[]> sums(new Sums[cuts.size()]);
  for (size_t i = 0; i < cuts.size(); ++i) sums[i].left = cuts[i].n_items;
  const std::vector<int64_t> starts = portions(cuts);

  const auto threads = static_cast<int>(std::min<int64_t>(call.threads, 1 + elements / PER_THREAD));
  parallel(static_cast<int64_t>(starts.size()) - 1, threads, [&](int64_t portion) {
    thread_local std::vector<double> scratch;
    scratch.resize(std::max<size_t>(scratch.size(), scratch_bytes(widest) / 8 + 8));
    void* aligned = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(scratch.data()) + 63) / 64 * 64);
    auto after = std::upper_bound(cuts.begin(), cuts.end(), starts[portion],
                                  [](int64_t item, const Cut& cut) { return item < cut.first_item; });
    size_t i = after - cuts.begin() - 1;
    for (int64_t item = starts[portion]; item < starts[portion + 1]; ++item) {
      while (item >= cuts[i].first_item + cuts[i].n_items) ++i;
      const Cut& cut = cuts[i];
      Sums& sum = sums[i];
      std::call_once(sum.allocated, [&] {
        sum.totals.reset(new double[cut.entry.outer + cut.entry.inner]);
        sum.partials.reset(new double[cut.n_items * cut.partial_size()]);
      });
      const int64_t local = item - cut.first_item;
      run_item(call, cut, local, sum.partials.get() + local * cut.partial_size(), aligned);
      if (sum.left.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        combine(cut, sum.partials.get(), sum.totals.get());
        sum.partials.reset();
      }
    }
  });
  for (size_t i = 0; i < cuts.size(); ++i) scatter(cuts[i], sums[i].totals.get(), scores);
}

}  // namespace

void channel_scores_cpu(const ScoreCall& call, double* scores) { channel_scores(call, scores); }
void channel_scores_cpu(const ScoreCall& call, float* scores) { channel_scores(call, scores); }

}  // namespace diffprune
