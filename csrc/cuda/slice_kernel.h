// slice_channels_ in place on the GPU: one launch for a table of tensors, both dims in one pass.
//
// Why no tile overwrites what another one still has to read
// ---------------------------------------------------------
// 1. Slicing only moves elements down: in front of any place there are no more elements after slicing than before.
//    Tiles are numbered in the order of their elements (slice_index.h), so tile j begins to read at or above the place
//    where it begins to write, and that is at or above the end of what any tile t < j writes. So what tile t writes is
//    read by tiles j <= t only.
// 2. A block takes the next tile from an atomic ticket, reads all of it into shared memory, sets read[tile], and only
//    then waits: until read[j] is set for every tile j <= last_conflict(t) of the same tensor, which are all the tiles
//    before t that may read what t writes. Then it writes. With 1., nothing unread is ever overwritten.
// 3. The wait ends, whatever the order in which the hardware runs blocks: tickets are given out in order, so every tile
//    below a taken one is held by a block that is running. Take the lowest tile that is held and unread. Its block took
//    it after its last wait ended, so it isn't waiting, and it reads without waiting for anything. So the lowest unread
//    tile is always read in the end, and all waits are for reads of lower tiles.
// 4. frontier[entry] = f says that read[j] was seen set for all j < f: whoever waited for tiles up to f - 1 publishes
//    it, so that later blocks look at the flags above it only. In most of a tensor that leaves none.
// 5. Memory order: reads of a tile -> __syncthreads -> fence -> release store of read[tile] (or of frontier, by a block
//    that acquired it) -> acquire load -> __syncthreads -> writes. Reads are ordinary loads, never through the
//    read-only cache, and tensors are no __restrict__ pointers; the asynchronous ones are waited for before the
//    barrier.
//
// Reading goes by 16 bytes at multiples of 16, so that a tile may also fetch neighbours' bytes that others are writing;
// those bytes are never used. At a tensor's ends, where 16 bytes would reach beyond it, bytes are read one by one.
// Source of the idea: Gomez-Luna et al., In-Place Data Sliding Algorithms for Many-Core Architectures (ICPP 2015);
// there a block waits for its neighbour's flag, here for the tiles that it can hurt.
#pragma once

#include "device.h"
#include "slice_index.h"

namespace diffprune {
namespace {

constexpr int kOutBytes = kStageBytes + kVector;  // what is written starts as far from a multiple of 16 as in memory

struct Shared {
  alignas(16) unsigned char stage[kStageBytes];
  alignas(16) unsigned char out[kOutBytes];
  int64_t row_begin[kMaxRows];  // first byte of each row that is read
  alignas(16) TiledEntry entry;
  int64_t last_conflict;
  uint32_t ticket;
};

// Rows of the tile -> stage, 16 bytes at a time. All of a thread's accesses are under way before it waits for them.
__device__ __forceinline__ void read_tile(Shared& s, const Tile& t, uint32_t slot) {
  const TiledEntry& e = s.entry;
  const int64_t begin = e.address, end = e.address + e.bytes;
  const uint32_t row_bytes = t.width * static_cast<uint32_t>(e.c) << e.log2_element;
  const uint32_t per_row = slot / kVector, total = per_row * t.rows;
  const Divisor by = divisor(per_row);
#pragma unroll
  for (int i = 0; i < kStageBytes / kVector / kThreads; ++i) {
    const uint32_t g = threadIdx.x + i * kThreads;
    if (g >= total) break;
    const uint32_t r = quotient(g, by), at = (g - r * per_row) * kVector;
    const int64_t row = s.row_begin[r], p = row / kVector * kVector + at;
    if (p >= row + row_bytes) continue;
    if (p >= begin && p + kVector <= end) {
      copy_async(s.stage + g * kVector, p);
    } else {
      for (int k = 0; k < kVector; ++k)
        if (p + k >= begin && p + k < end) s.stage[g * kVector + k] = *reinterpret_cast<const unsigned char*>(p + k);
    }
  }
  wait_for_copies();
}

template <class T>
__device__ __forceinline__ T scaled(T x, const TiledEntry&, int64_t) {
  return x;
}
template <>
__device__ __forceinline__ uint16_t scaled(uint16_t x, const TiledEntry& e, int64_t dim0) {
  const float factor = reinterpret_cast<const float*>(e.scale)[dim0];
  return e.scale_kind == static_cast<int64_t>(ScaleKind::bf16) ? scaled_bf16(x, factor) : scaled_f16(x, factor);
}
template <>
__device__ __forceinline__ uint32_t scaled(uint32_t x, const TiledEntry& e, int64_t dim0) {
  return scaled_f32(x, reinterpret_cast<const float*>(e.scale)[dim0]);
}
template <>
__device__ __forceinline__ uint64_t scaled(uint64_t x, const TiledEntry& e, int64_t dim0) {
  return scaled_f64(x, reinterpret_cast<const double*>(e.scale)[dim0]);
}

// Kept elements, one per thread at a time: stage -> out, where they lie as they will in memory.
template <class T>
__device__ __forceinline__ void compact(Shared& s, const Tile& t, uint32_t slot, uint32_t skip) {
  const TiledEntry& e = s.entry;
  const uint32_t n = write_count(e, t);
  if (n == 0) return;
  const Divisor c = divisor(static_cast<uint32_t>(e.c)), row_length = divisor(t.kept_n * c.value);
  const int64_t first = write_begin(e, t);
  for (uint32_t q = threadIdx.x; q < n; q += kThreads) {
    const Place from = place(e, t, q, row_length, c);
    const uint32_t offset = static_cast<uint32_t>(s.row_begin[from.row]) % kVector;
    T x = *reinterpret_cast<const T*>(s.stage + from.row * slot + offset + from.element * sizeof(T));
    if (e.scale) x = scaled(x, e, (first + q) / e.scale_period);
    *reinterpret_cast<T*>(s.out + skip + q * sizeof(T)) = x;
  }
}

// Until every tile that may read what this one writes has been read.
__device__ __forceinline__ void wait_for(const int* read, const int* frontier, int64_t last) {
  const int64_t done = load_acquire(frontier);
  for (int64_t j = done / kThreads * kThreads + threadIdx.x; j <= last; j += kThreads)
    if (j >= done)
      while (load_acquire(read + j) == 0) pause_thread();
}

// `bytes` bytes to `target`: 16 at a time, one by one at the edges. `skip`: where they begin in `from`.
__device__ __forceinline__ void write_tile(int64_t target, uint32_t bytes, const unsigned char* from, uint32_t skip) {
  const uint32_t granules = (skip + bytes + kVector - 1) / kVector;
  for (uint32_t g = threadIdx.x; g < granules; g += kThreads) {
    const int64_t p = target - skip + static_cast<int64_t>(g) * kVector;
    if (p >= target && p + kVector <= target + bytes) {
      store16(p, reinterpret_cast<const uint4*>(from)[g]);
    } else {
      for (int k = 0; k < kVector; ++k)
        if (p + k >= target && p + k < target + bytes) *reinterpret_cast<unsigned char*>(p + k) = from[g * kVector + k];
    }
  }
}

__global__ void __launch_bounds__(kThreads, 4)
    slice_channels_kernel(const TiledEntry* entries, const int* tile_entry, uint32_t tiles, uint32_t* ticket, int* read,
                          int* frontier) {
  Shared& s = block_memory<Shared>();
  const uint32_t thread = threadIdx.x;
  if (thread == 0) s.ticket = atomicAdd(ticket, 1u);
  for (;;) {
    __syncthreads();
    const uint32_t tile = s.ticket;
    if (tile >= tiles) return;
    const int which = tile_entry[tile];
    if (thread < kEntryFields)
      reinterpret_cast<int64_t*>(&s.entry)[thread] = reinterpret_cast<const int64_t*>(entries + which)[thread];
    __syncthreads();
    const TiledEntry& e = s.entry;
    const uint32_t local = tile - static_cast<uint32_t>(e.first_tile);
    const Tile t = describe(e, local);
    const uint32_t slot = slot_bytes(e, t);
    if (thread < t.rows) s.row_begin[thread] = e.address + (read_begin(e, t, thread) << e.log2_element);
    __syncthreads();
    if (t.kept_n) read_tile(s, t, slot);
    if (thread == kThreads - 1) s.last_conflict = last_conflict(e, local, t);
    __syncthreads();
    if (thread == 0) {
      __threadfence();
      store_release(read + tile, 1);
    }
    const int64_t target = e.address + (write_begin(e, t) << e.log2_element);
    const uint32_t skip = static_cast<uint32_t>(target) % kVector;
    if (!e.straight) {
      if (e.log2_element == 0) compact<uint8_t>(s, t, slot, skip);
      if (e.log2_element == 1) compact<uint16_t>(s, t, slot, skip);
      if (e.log2_element == 2) compact<uint32_t>(s, t, slot, skip);
      if (e.log2_element == 3) compact<uint64_t>(s, t, slot, skip);
      if (e.log2_element == 4) compact<ulonglong2>(s, t, slot, skip);
    }
    const int64_t last = s.last_conflict;
    wait_for(read + e.first_tile, frontier + which, last);
    __syncthreads();
    if (thread == 0) {
      __threadfence();
      atomicMax(frontier + which, static_cast<int>(last + 1));
      s.ticket = atomicAdd(ticket, 1u);
    }
    write_tile(target, write_count(e, t) << e.log2_element, e.straight ? s.stage : s.out, skip);
  }
}

}  // namespace
}  // namespace diffprune
