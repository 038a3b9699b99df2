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
  int64_t entries;     // (n,) TiledEntry
  int64_t tile_entry;  // (tiles,) int32: each tile's entry
  int64_t tiles;
  int64_t ticket;    // int32, zero
  int64_t read;      // (tiles,) int32, zero: set once a tile has been read
  int64_t frontier;  // (n,) int32, zero: an entry's tiles below it have been read
  int device;
  int64_t stream;
};

// Slices all entries in place, in one launch on `stream`. Returns at once. Throws CudaError.
void slice_channels_cuda(const SliceLaunch& launch);

// Largest number of blocks that a launch on `device` would have. Throws CudaError.
int slice_channels_blocks(int device);

}  // namespace diffprune
