// Which element the CUDA slicing kernel takes from where. The same code runs in the kernel and on the host, where the
// CPU tests drive it (host_kernel.cpp).
//
// A tensor is seen in memory order as (a, d0, b, d1, c). Along d0 and d1 only the kept indices stay, so that it becomes
// (a, k0, b, k1, c) in new memory. A row is one (a, k0, b): k1 * c units that come out of d1 * c units. A unit is what
// one access moves: an element, or up to 16 bytes where neighbouring elements stay together and lie evenly.
// A tile is some rows by some columns (units of a row); each is one block's.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DIFFPRUNE_DEVICE __device__ __forceinline__
#else
#define DIFFPRUNE_DEVICE inline
#endif

namespace diffprune {

constexpr int kThreads = 256;
constexpr int kLog2Threads = 8;
constexpr int kRowsPerThread = 32;  // a column's place is worked out once for so many rows
constexpr int kMaxRows = kThreads;  // rows of a tile: a thread each works out where one begins

enum class ScaleKind : int64_t { none, f32, bf16, f16, f64 };

// One tensor. Filled by slice_table.h and completed by diffprune_fast/ops/slice_tables.py (ENTRY has the same fields in
// the same order; ops/cuda.py compares the two). The name is the CUDA extension's own: pybind11 knows a struct by it.
struct GatherEntry {
  int64_t source, target;  // addresses
  int64_t rows;            // a * k0 * b
  int64_t d0, k0, b;
  int64_t source_row, target_row;  // units of a row: d1 * c, k1 * c
  int64_t c;
  int64_t keep0;  // (k0,) int32; 0: all of d0 stays
  int64_t keep1;  // (k1,) int32; 0: all of d1 stays
  int64_t log2_unit;
  int64_t log2_width;  // threads side by side in a row; the others take the next rows
  int64_t rows_per_tile, column_tiles;
  int64_t scale;  // a float (double for f64) per index of dim 0; 0: none
  int64_t scale_kind;
  int64_t scale_rows, scale_columns;  // the factor of a unit: scale[row / scale_rows + column / scale_columns]
  int64_t first_tile;                 // in the whole table
};

struct Tile {
  uint32_t row, rows;  // first row of what stays, how many
  uint32_t column;     // first column
};

DIFFPRUNE_DEVICE const int32_t* table(int64_t address) { return reinterpret_cast<const int32_t*>(address); }

// Rows of a tile that a thread takes, one after the other.
DIFFPRUNE_DEVICE uint32_t rows_per_thread(const GatherEntry& e) {
  return static_cast<uint32_t>(e.rows_per_tile) >> (kLog2Threads - e.log2_width);
}

DIFFPRUNE_DEVICE Tile describe(const GatherEntry& e, uint32_t tile) {
  const uint32_t columns = static_cast<uint32_t>(e.column_tiles), per_tile = static_cast<uint32_t>(e.rows_per_tile);
  const uint32_t across = tile / columns;
  Tile t;
  t.row = across * per_tile;
  const uint32_t left = static_cast<uint32_t>(e.rows) - t.row;
  t.rows = left < per_tile ? left : per_tile;
  t.column = (tile - across * columns) << e.log2_width;
  return t;
}

// Where the row that becomes row `row` begins, in bytes from the source.
DIFFPRUNE_DEVICE int64_t row_begin(const GatherEntry& e, uint32_t row) {
  int64_t from = row;
  if (e.keep0) {
    const uint32_t b = static_cast<uint32_t>(e.b), k0 = static_cast<uint32_t>(e.k0);
    const uint32_t outer = row / b, a = outer / k0;
    from = (static_cast<int64_t>(a) * e.d0 + table(e.keep0)[outer - a * k0]) * b + (row - outer * b);
  }
  return (from * e.source_row) << e.log2_unit;
}

// The column of the source that becomes column `column`.
DIFFPRUNE_DEVICE uint32_t source_column(const GatherEntry& e, uint32_t column) {
  if (!e.keep1) return column;
  const uint32_t c = static_cast<uint32_t>(e.c), k = column / c;
  return static_cast<uint32_t>(table(e.keep1)[k]) * c + (column - k * c);
}

}  // namespace diffprune
