#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace diffprune {

// A CUDA call that failed: operation, call, place and CUDA's own name for it.
struct CudaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What one launch works on; all of it lies on `device`.
struct SliceLaunch {
  int64_t entries;     // (n,) GatherEntry
  int64_t tile_entry;  // int32: the entry of every tile of the table
  int64_t first, tiles;
  int device;
  int64_t stream;
};

// Gathers tiles first, ..., first + tiles - 1 of a table, in one launch on `stream`. Returns at once. Throws CudaError.
void slice_channels_cuda(const SliceLaunch& launch);

}  // namespace diffprune
