// Where slice_channels_ reads, where it writes and what it must wait for. The same code runs in the CUDA kernel and in
// the host simulation that the CPU tests drive (host_simulation.cpp).
//
// A tensor is seen in memory order as (a, d0, b, d1, c). Along d0 and d1 only the kept indices stay, so that it becomes
// (a, k0, b, k1, c) at the same address. A row is one (a, k0, b): k1 * c elements that come out of d1 * c elements.
// A row's d1 is cut into segments of equal width if it is long; short rows are taken several at a time. One such piece
// is a tile. Tiles are numbered in the order of the rows, and of the segments in a row: both what a tile reads and what
// it writes lies behind what the tile before it reads or writes.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DIFFPRUNE_HD __host__ __device__ __forceinline__
#else
#define DIFFPRUNE_HD inline
#endif

namespace diffprune {

constexpr int kThreads = 256;
constexpr int kVector = 16;             // bytes of one access
constexpr int kStageBytes = 16 * 1024;  // what a tile may read: four accesses per thread
constexpr int kMaxRows = kThreads;      // rows of a tile

enum class ScaleKind : int64_t { none, f32, bf16, f16, f64 };

// One tensor. Filled by diffprune_fast/ops/slice_tables.py as ENTRY, which has the same fields in the same order;
// ops/cuda.py compares the two. The name is the CUDA extension's own: pybind11 knows a struct by it in all extensions.
struct TiledEntry {
  int64_t address;
  int64_t bytes;  // before
  int64_t log2_element;
  int64_t rows;  // a * k0 * b
  int64_t d0, k0, b, d1, k1, c;
  int64_t keep0;  // (k0,) int32; 0: all of d0 stays
  int64_t rank0;  // (d0 + 1,) int32: how many kept indices are smaller
  int64_t keep1;  // (k1,) int32; 0: all of d1 stays
  int64_t cuts;   // (segments + 1,) int32: where each segment's kept indices begin in keep1; 0 with keep1
  int64_t rows_per_tile;
  int64_t segments;
  int64_t segment_width;  // in indices of d1
  int64_t scale;          // a float (double for f64) per index of dim 0; 0: none
  int64_t scale_kind;
  int64_t scale_period;  // elements per index of dim 0, after
  int64_t first_tile;    // in the whole table
  int64_t tiles;
  int64_t straight;  // rows are copied whole, and every row starts at a multiple of 16 bytes before and after
  int64_t reserved;
};
constexpr int kEntryFields = 24;
static_assert(sizeof(TiledEntry) == kEntryFields * sizeof(int64_t), "the kernel copies an entry field by field");

struct Tile {
  uint32_t row;     // first row, after slicing
  uint32_t rows;    // how many
  uint32_t column;  // first index of d1
  uint32_t width;   // indices of d1 that are read
  uint32_t kept;    // first index of k1
  uint32_t kept_n;  // indices of k1 that are written
};

DIFFPRUNE_HD const int32_t* table(int64_t address) { return reinterpret_cast<const int32_t*>(address); }

DIFFPRUNE_HD Tile describe(const TiledEntry& e, uint32_t tile) {
  Tile t;
  if (e.segments == 1) {
    t.row = tile * static_cast<uint32_t>(e.rows_per_tile);
    const uint32_t left = static_cast<uint32_t>(e.rows) - t.row;
    t.rows = left < e.rows_per_tile ? left : static_cast<uint32_t>(e.rows_per_tile);
    t.column = t.kept = 0;
    t.width = static_cast<uint32_t>(e.d1);
    t.kept_n = static_cast<uint32_t>(e.k1);
    return t;
  }
  const uint32_t segments = static_cast<uint32_t>(e.segments), segment = tile % segments;
  t.row = tile / segments;
  t.rows = 1;
  t.column = segment * static_cast<uint32_t>(e.segment_width);
  const uint32_t left = static_cast<uint32_t>(e.d1) - t.column;
  t.width = left < e.segment_width ? left : static_cast<uint32_t>(e.segment_width);
  t.kept = e.cuts ? table(e.cuts)[segment] : t.column;
  t.kept_n = e.cuts ? table(e.cuts)[segment + 1] - t.kept : t.width;
  return t;
}

// The row before slicing that becomes row `row`.
DIFFPRUNE_HD int64_t source_row(const TiledEntry& e, uint32_t row) {
  if (!e.keep0) return row;
  const uint32_t b = static_cast<uint32_t>(e.b), k0 = static_cast<uint32_t>(e.k0);
  const uint32_t outer = row / b, a = outer / k0;
  return (static_cast<int64_t>(a) * e.d0 + table(e.keep0)[outer % k0]) * b + row % b;
}

// First element that a tile reads for its row `r` (counted within the tile).
DIFFPRUNE_HD int64_t read_begin(const TiledEntry& e, const Tile& t, uint32_t r) {
  return (source_row(e, t.row + r) * e.d1 + t.column) * e.c;
}

// The elements that a tile writes: write_count of them from write_begin on.
DIFFPRUNE_HD int64_t write_begin(const TiledEntry& e, const Tile& t) {
  return (static_cast<int64_t>(t.row) * e.k1 + t.kept) * e.c;
}
DIFFPRUNE_HD uint32_t write_count(const TiledEntry& e, const Tile& t) {
  return t.rows * t.kept_n * static_cast<uint32_t>(e.c);
}

// The last tile before `tile` that may read what `tile` writes; -1 if there is none. Tiles start to read at ever higher
// elements, so that it is enough to find the last one that starts below the end of what is written.
DIFFPRUNE_HD int64_t last_conflict(const TiledEntry& e, uint32_t tile, const Tile& t) {
  const uint32_t n = write_count(e, t);
  if (n == 0) return -1;
  const int64_t last = write_begin(e, t) + n - 1;
  const int64_t row_length = e.d1 * e.c;
  const int64_t row = last / row_length;
  bool stays = true;
  int64_t rows_up_to = row + 1;  // sliced rows whose source is at or before `row`
  if (e.keep0) {
    const uint32_t b = static_cast<uint32_t>(e.b), d0 = static_cast<uint32_t>(e.d0);
    const uint32_t outer = static_cast<uint32_t>(row / b), a = outer / d0, i = outer % d0;
    const int32_t rank = table(e.rank0)[i];
    stays = table(e.rank0)[i + 1] > rank;
    rows_up_to = (static_cast<int64_t>(a) * e.k0 + rank) * b + (stays ? row % b + 1 : 0);
  }
  if (rows_up_to == 0) return -1;
  int64_t conflict;
  if (e.segments == 1) {
    conflict = (rows_up_to - 1) / e.rows_per_tile;
  } else {
    const int64_t segment = stays ? last % row_length / (e.segment_width * e.c) : e.segments - 1;
    conflict = (rows_up_to - 1) * e.segments + segment;
  }
  const int64_t before = static_cast<int64_t>(tile) - 1;
  return conflict < before ? conflict : before;
}

// Bytes of shared memory between two rows of a tile: room for a row that starts anywhere between two accesses.
DIFFPRUNE_HD uint32_t slot_bytes(const TiledEntry& e, const Tile& t) {
  const uint32_t row = t.width * static_cast<uint32_t>(e.c) << e.log2_element;
  return e.straight ? row : (row + 2 * (kVector - 1)) / kVector * kVector;
}

// Division of numbers below 2^16 by a multiplication: magic = 2^32 / divisor, rounded up.
struct Divisor {
  uint32_t value, magic;
};
DIFFPRUNE_HD Divisor divisor(uint32_t value) { return {value, 0xFFFFFFFFu / value + 1}; }
DIFFPRUNE_HD uint32_t quotient(uint32_t n, Divisor by) {
  if (by.value == 1) return n;
  return static_cast<uint32_t>(static_cast<uint64_t>(n) * by.magic >> 32);
}

// Where element `q` of what a tile writes stands among what it has read: row of the tile, element in the row.
struct Place {
  uint32_t row, element;
};
DIFFPRUNE_HD Place place(const TiledEntry& e, const Tile& t, uint32_t q, Divisor row_length, Divisor c) {
  const uint32_t row = t.rows == 1 ? 0 : quotient(q, row_length);
  const uint32_t in_row = q - row * row_length.value;
  const uint32_t k = quotient(in_row, c);
  if (!e.keep1) return {row, in_row};
  const uint32_t column = static_cast<uint32_t>(table(e.keep1)[t.kept + k]) - t.column;
  return {row, column * c.value + (in_row - k * c.value)};
}

}  // namespace diffprune
