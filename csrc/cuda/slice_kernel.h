// slice_channels_ on the GPU: what stays of a table of tensors is gathered into new memory, both dims in one pass.
//
// A thread stays in its column, so that the column's place in the source is worked out once for all of its rows; where
// its rows begin, the block's threads have worked out before, one row each. What is left per unit is a load and a
// store.
#pragma once

#include <cstring>

#include "slice_index.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define DIFFPRUNE_PRAGMA(words) _Pragma(#words)
#define DIFFPRUNE_UNROLL(times) DIFFPRUNE_PRAGMA(unroll times)
#else
#define DIFFPRUNE_UNROLL(times)
#endif

namespace diffprune {
namespace {

#ifdef __CUDACC__
using Unit16 = uint4;
template <class T>
__device__ __forceinline__ T load(const char* p) {
  return __ldg(reinterpret_cast<const T*>(p));  // the kernel writes nothing that it reads
}
template <class T>
__device__ __forceinline__ void store(char* p, T x) {
  __builtin_assume(__isGlobal(p));
  *reinterpret_cast<T*>(p) = x;
}
#else
struct alignas(16) Unit16 {
  uint64_t x, y;
};
template <class T>
T load(const char* p) {
  return *reinterpret_cast<const T*>(p);
}
template <class T>
void store(char* p, T x) {
  *reinterpret_cast<T*>(p) = x;
}
#endif

// What a unit becomes on its way: nothing else, or its product with its row's factor.
struct Unscaled {
  template <class T>
  DIFFPRUNE_DEVICE T operator()(T x, uint32_t, uint32_t) const {
    return x;
  }
};

template <class To, class From>
DIFFPRUNE_DEVICE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits of another size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

DIFFPRUNE_DEVICE uint64_t product_f64(uint64_t x, double factor) { return bits<uint64_t>(bits<double>(x) * factor); }
DIFFPRUNE_DEVICE uint32_t product_f32(uint32_t x, float factor) { return bits<uint32_t>(bits<float>(x) * factor); }
DIFFPRUNE_DEVICE uint16_t product_f16(uint16_t x, float factor) {
#ifdef __CUDACC__
  return bits<uint16_t>(__float2half_rn(__half2float(bits<__half>(x)) * factor));
#else
  return bits<uint16_t>(static_cast<_Float16>(static_cast<float>(bits<_Float16>(x)) * factor));
#endif
}
DIFFPRUNE_DEVICE uint16_t product_bf16(uint16_t x, float factor) {
#ifdef __CUDACC__
  return bits<uint16_t>(__float2bfloat16_rn(__bfloat162float(bits<__nv_bfloat16>(x)) * factor));
#else  // finite numbers only
  const uint32_t wide = product_f32(static_cast<uint32_t>(x) << 16, factor);
  return static_cast<uint16_t>((wide + 0x7FFF + (wide >> 16 & 1)) >> 16);
#endif
}

struct Scaled {
  const GatherEntry& e;
  DIFFPRUNE_DEVICE uint32_t place(uint32_t row, uint32_t column) const {
    return row / static_cast<uint32_t>(e.scale_rows) + column / static_cast<uint32_t>(e.scale_columns);
  }
  DIFFPRUNE_DEVICE uint16_t operator()(uint16_t x, uint32_t row, uint32_t column) const {
    const float factor = reinterpret_cast<const float*>(e.scale)[place(row, column)];
    return e.scale_kind == static_cast<int64_t>(ScaleKind::bf16) ? product_bf16(x, factor) : product_f16(x, factor);
  }
  DIFFPRUNE_DEVICE uint32_t operator()(uint32_t x, uint32_t row, uint32_t column) const {
    return product_f32(x, reinterpret_cast<const float*>(e.scale)[place(row, column)]);
  }
  DIFFPRUNE_DEVICE uint64_t operator()(uint64_t x, uint32_t row, uint32_t column) const {
    return product_f64(x, reinterpret_cast<const double*>(e.scale)[place(row, column)]);
  }
};

// A thread's share of a tile. begins: where the tile's rows begin in the source. kLoads: loads that are under way
// before the thread waits for the first.
template <class T, int kLoads, class Change>
DIFFPRUNE_DEVICE void gather(const GatherEntry& e, const Tile& t, const int64_t* begins, uint32_t thread,
                             Change change) {
  const uint32_t column = t.column + (thread & ((1u << e.log2_width) - 1));
  if (column >= e.target_row) return;
  const char* from = reinterpret_cast<const char*>(e.source) + source_column(e, column) * sizeof(T);
  const int64_t row_bytes = e.target_row * static_cast<int64_t>(sizeof(T));
  const uint32_t mine = rows_per_thread(e);
  uint32_t row = (thread >> e.log2_width) * mine;
  const uint32_t end = row + mine < t.rows ? row + mine : t.rows;
  char* to = reinterpret_cast<char*>(e.target) + static_cast<int64_t>(t.row + row) * row_bytes + column * sizeof(T);
  DIFFPRUNE_UNROLL(1)
  for (; row + kLoads <= end; row += kLoads) {
    T units[kLoads];
    DIFFPRUNE_UNROLL(kLoads)
    for (int i = 0; i < kLoads; ++i) units[i] = load<T>(from + begins[row + i]);
    DIFFPRUNE_UNROLL(kLoads)
    for (int i = 0; i < kLoads; ++i, to += row_bytes) store(to, change(units[i], t.row + row + i, column));
  }
  DIFFPRUNE_UNROLL(1)
  for (; row < end; ++row, to += row_bytes) store(to, change(load<T>(from + begins[row]), t.row + row, column));
}

DIFFPRUNE_DEVICE void gather_tile(const GatherEntry& e, const Tile& t, const int64_t* begins, uint32_t thread) {
  if (e.scale) {
    if (e.log2_unit == 1) gather<uint16_t, 1>(e, t, begins, thread, Scaled{e});
    if (e.log2_unit == 2) gather<uint32_t, 1>(e, t, begins, thread, Scaled{e});
    if (e.log2_unit == 3) gather<uint64_t, 1>(e, t, begins, thread, Scaled{e});
    return;
  }
  if (e.log2_unit == 0) gather<uint8_t, 8>(e, t, begins, thread, Unscaled{});
  if (e.log2_unit == 1) gather<uint16_t, 8>(e, t, begins, thread, Unscaled{});
  if (e.log2_unit == 2) gather<uint32_t, 8>(e, t, begins, thread, Unscaled{});
  if (e.log2_unit == 3) gather<uint64_t, 8>(e, t, begins, thread, Unscaled{});
  if (e.log2_unit == 4) gather<Unit16, 8>(e, t, begins, thread, Unscaled{});
}

#ifdef __CUDACC__
// tile_entry: each tile's entry. first: the tile of block 0.
__global__ void __launch_bounds__(kThreads)
    slice_channels_kernel(const GatherEntry* entries, const int* tile_entry, uint32_t first) {
  __shared__ int64_t begins[kMaxRows];
  const uint32_t tile = first + blockIdx.x;
  const GatherEntry e = entries[tile_entry[tile]];
  const Tile t = describe(e, tile - static_cast<uint32_t>(e.first_tile));
  if (threadIdx.x < t.rows) begins[threadIdx.x] = row_begin(e, t.row + threadIdx.x);
  __syncthreads();
  gather_tile(e, t, begins, threadIdx.x);
}
#endif

}  // namespace
}  // namespace diffprune
