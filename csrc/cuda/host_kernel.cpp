// The kernel of slice_kernel.h and the table of slice_table.h on the host. Compiled and driven by
// tests/ops/test_cuda_slice_channels.py; no part of the package.
#include <vector>

#include "slice_kernel.h"
#include "slice_table.h"

using namespace diffprune;

extern "C" {

int64_t fill(const GivenTensor* tensors, int64_t n, const GivenDim* dims, const GivenKeep* keeps, GatherEntry* entries,
             int64_t* tiles) {
  return fill_table(tensors, n, dims, keeps, entries, tiles);
}

// What the blocks first, ..., first + tiles - 1 do, one thread after the other: no thread waits for another but where
// all have worked out a row.
void run_kernel(const GatherEntry* entries, const int32_t* tile_entry, int64_t first, int64_t tiles) {
  for (int64_t tile = first; tile < first + tiles; ++tile) {
    const GatherEntry& e = entries[tile_entry[tile]];
    const Tile t = describe(e, static_cast<uint32_t>(tile - e.first_tile));
    std::vector<int64_t> begins(t.rows);  // as many as there are: a sanitizer sees the one behind
    for (uint32_t i = 0; i < t.rows; ++i) begins[i] = row_begin(e, t.row + i);
    for (uint32_t thread = 0; thread < kThreads; ++thread) gather_tile(e, t, begins.data(), thread);
  }
}

int64_t entry_bytes() { return sizeof(GatherEntry); }
int64_t most_rows() { return kMaxRows; }

}  // extern "C"
