// From tensors and what stays of them to the table that the slicing kernel walks. Host code; the CPU tests drive it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "slice_index.h"

namespace diffprune {

// One tensor as Python hands it over.
struct GivenTensor {
  int64_t address;
  int64_t element;  // bytes
  int64_t dims;
  int64_t scale_kind;  // 0: no scale; -1: one that the kernel can't apply
  int64_t factors;
};

// One dim of it: its keep is a row of the table of kept indices, -1 where the dim stays whole.
struct GivenDim {
  int64_t size, stride, keep;
};

// A table of kept indices: how many, and where it will lie, 1 + its place among all indices.
struct GivenKeep {
  int64_t count, place;
};

constexpr int kMaxDims = 16;
constexpr int64_t kRowBytes = 64;  // what stays together in one row from here on is copied as a row
enum Outcome : int64_t { kLeft = -1, kUnchanged = 0 };  // in place of the number of tiles

namespace table_detail {

// Fills `order` with a tensor's dims from the slowest to the fastest in memory, as ops/reference.py memory_order does.
inline void memory_order(const GivenDim* d, int n, int* order) {
  for (int i = 0; i < n; ++i) order[i] = i;
  int64_t step = 1;
  bool plain = true;
  for (int i = n; i-- > 0; step *= d[i].size) plain = plain && (d[i].size == 1 || d[i].stride == step);
  if (plain) return;
  std::stable_sort(order, order + n, [d](int x, int y) {
    if (d[x].stride != d[y].stride) return d[x].stride > d[y].stride;
    return (d[x].size == 1) < (d[y].size == 1);
  });
}

inline int log2_of(int64_t power) {
  int log2 = 0;
  while (int64_t{1} << log2 < power) ++log2;
  return log2;
}

// The sizes in memory order around the dims that lose indices; false if the kernel can't slice such a tensor.
inline bool see(const GivenTensor& t, const GivenDim* d, const GivenKeep* keeps, GatherEntry& e) {
  int order[kMaxDims] = {}, kept[kMaxDims] = {}, n_kept = 0;
  const int n = static_cast<int>(t.dims);
  if (n > kMaxDims || t.scale_kind < 0) return false;
  memory_order(d, n, order);
  if (t.scale_kind && order[0] != 0 && d[0].size != 1) return false;
  int64_t total = 1;
  for (int p = 0; p < n; ++p) {
    const GivenDim& dim = d[order[p]];
    total *= dim.size;
    if (dim.keep >= 0 && keeps[dim.keep].count < dim.size) kept[n_kept++] = p;
  }
  if (n_kept > 2 || total == 0) return false;
  const auto product = [&](int from, int to) {
    int64_t out = 1;
    for (int p = from; p < to; ++p) out *= d[order[p]].size;
    return out;
  };
  const auto keep = [&](int i) -> const GivenKeep& { return keeps[d[order[kept[i]]].keep]; };
  e.d0 = e.k0 = e.b = e.c = 1;
  if (n_kept == 0) {
    e.rows = n ? d[order[0]].size : 1;
    e.source_row = e.target_row = product(1, n);
    return true;
  }
  const int last = kept[n_kept - 1];
  const int64_t before = product(0, last), size = d[order[last]].size, after = product(last + 1, n);
  if (n_kept == 1 && after * t.element >= kRowBytes) {
    e.d0 = size;
    e.k0 = keep(0).count;
    e.keep0 = keep(0).place;
    e.rows = before * e.k0;
    e.source_row = e.target_row = after;
    return true;
  }
  e.c = after;
  e.source_row = size * after;
  e.target_row = keep(n_kept - 1).count * after;
  e.keep1 = keep(n_kept - 1).place;
  e.rows = before;
  if (n_kept == 2) {
    e.d0 = d[order[kept[0]]].size;
    e.k0 = keep(0).count;
    e.keep0 = keep(0).place;
    e.b = product(kept[0] + 1, last);
    e.rows = product(0, kept[0]) * e.k0 * e.b;
  }
  return true;
}

// Elements -> units, and rows and columns -> tiles; the number of tiles.
inline int64_t cut(const GivenTensor& t, GatherEntry& e) {
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  int64_t unit = t.element;
  if (!t.scale_kind) {
    const int64_t together = (e.keep1 ? e.c : e.source_row) * t.element;
    while (unit < 16 && together % (2 * unit) == 0 && t.address % (2 * unit) == 0) unit *= 2;
  }
  const int64_t elements = unit / t.element;  // of a unit
  if (e.keep1) e.c /= elements;
  e.source_row /= elements;
  e.target_row /= elements;
  if (e.rows > most || e.source_row > most || unit > 16 || t.address % unit) return kLeft;
  const int64_t width = int64_t{1} << log2_of(std::min<int64_t>(e.target_row, kThreads));
  e.log2_unit = log2_of(unit);
  e.log2_width = log2_of(width);
  // No thread has rows of its own but in the same column; fewer than 32 where a block has few threads side by side
  e.rows_per_tile = kThreads / width * std::min<int64_t>(width, kRowsPerThread);
  e.column_tiles = (e.target_row + width - 1) / width;
  const int64_t tiles = (e.rows + e.rows_per_tile - 1) / e.rows_per_tile * e.column_tiles;
  return tiles > most ? static_cast<int64_t>(kLeft) : tiles;
}

// A factor per index of dim 0, the slowest in memory: of so many rows, or of so many columns of the only row.
inline void place_factors(const GivenTensor& t, GatherEntry& e) {
  const int64_t per_factor = e.rows * e.target_row / t.factors;
  e.scale_kind = t.scale_kind;
  e.scale_rows = std::max<int64_t>(1, per_factor / e.target_row);
  e.scale_columns = per_factor < e.target_row ? per_factor : std::numeric_limits<int32_t>::max();
}

}  // namespace table_detail

// Fills an entry per tensor, as far as addresses on the device aren't needed, and tiles[i]: how many tiles it has, or
// an Outcome. Returns the number of all tiles.
inline int64_t fill_table(const GivenTensor* tensors, int64_t n, const GivenDim* dims, const GivenKeep* keeps,
                          GatherEntry* entries, int64_t* tiles) {
  int64_t total = 0;
  for (int64_t i = 0; i < n; dims += tensors[i++].dims) {
    const GivenTensor& t = tensors[i];
    GatherEntry& e = entries[i] = {};
    e.source = t.address;
    e.first_tile = total;
    bool changes = t.scale_kind != 0;
    for (int64_t d = 0; d < t.dims; ++d) changes |= dims[d].keep >= 0 && keeps[dims[d].keep].count < dims[d].size;
    tiles[i] = !changes ? kUnchanged : table_detail::see(t, dims, keeps, e) ? table_detail::cut(t, e) : kLeft;
    if (tiles[i] <= 0) continue;
    if (t.scale_kind) table_detail::place_factors(t, e);
    total += tiles[i];
  }
  return total;
}

}  // namespace diffprune
