// What the kernel asks of the machine it runs on: the GPU's own instructions under nvcc, threads and barriers under a
// host compiler, so that the CPU tests run the kernel as it is written (host_kernel.cpp).
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace diffprune {
namespace {

// The block's shared memory.
template <class T>
__device__ __forceinline__ T& block_memory() {
  __shared__ T memory;
  return memory;
}

__device__ __forceinline__ int load_acquire(const int* p) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}

__device__ __forceinline__ void store_release(int* p, int value) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}

// 16 bytes from global to shared memory without a stop in registers, past the L1 cache.
__device__ __forceinline__ void copy_async(void* to, int64_t from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from)
               : "memory");
}

__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ __forceinline__ void store16(int64_t to, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

__device__ __forceinline__ void pause_thread() { __nanosleep(64); }

__device__ __forceinline__ uint16_t scaled_bf16(uint16_t x, float factor) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(__bfloat162float(__ushort_as_bfloat16(x)) * factor));
}

__device__ __forceinline__ uint16_t scaled_f16(uint16_t x, float factor) {
  return __half_as_ushort(__float2half_rn(__half2float(__ushort_as_half(x)) * factor));
}

__device__ __forceinline__ uint32_t scaled_f32(uint32_t x, float factor) {
  return __float_as_uint(__uint_as_float(x) * factor);
}

__device__ __forceinline__ uint64_t scaled_f64(uint64_t x, double factor) {
  return static_cast<uint64_t>(__double_as_longlong(__longlong_as_double(static_cast<long long>(x)) * factor));
}

}  // namespace
}  // namespace diffprune

#else

#include <pthread.h>
#include <sched.h>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace diffprune {
namespace {

struct Index {
  uint32_t x;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) ulonglong2 {
  uint64_t x, y;
};

thread_local Index threadIdx;
thread_local pthread_barrier_t* block_barrier;
thread_local void* block_storage;

template <class T>
T& block_memory() {
  return *static_cast<T*>(block_storage);
}

inline void __syncthreads() { pthread_barrier_wait(block_barrier); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline uint32_t atomicAdd(uint32_t* p, uint32_t v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }
inline void atomicMax(int* p, int v) {
  int old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (old < v && !__atomic_compare_exchange_n(p, &old, v, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

inline int load_acquire(const int* p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
inline void store_release(int* p, int value) { __atomic_store_n(p, value, __ATOMIC_RELEASE); }
inline void copy_async(void* to, int64_t from) { std::memcpy(to, reinterpret_cast<const void*>(from), 16); }
inline void wait_for_copies() {}
inline void store16(int64_t to, uint4 v) { std::memcpy(reinterpret_cast<void*>(to), &v, 16); }
inline void pause_thread() { sched_yield(); }

template <class To, class From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits of another size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline uint32_t scaled_f32(uint32_t x, float factor) { return bits<uint32_t>(bits<float>(x) * factor); }
inline uint64_t scaled_f64(uint64_t x, double factor) { return bits<uint64_t>(bits<double>(x) * factor); }
inline uint16_t scaled_bf16(uint16_t x, float factor) {  // finite numbers only
  const uint32_t wide = scaled_f32(static_cast<uint32_t>(x) << 16, factor);
  return static_cast<uint16_t>((wide + 0x7FFF + (wide >> 16 & 1)) >> 16);
}
inline uint16_t scaled_f16(uint16_t x, float factor) {
  return bits<uint16_t>(static_cast<_Float16>(static_cast<float>(bits<_Float16>(x)) * factor));
}

}  // namespace
}  // namespace diffprune

#endif
