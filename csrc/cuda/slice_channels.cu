// Launches the slicing kernel (slice_kernel.h) on the caller's stream.
#include "slice_channels.h"

#include <cuda_runtime.h>

#include "slice_kernel.h"

namespace diffprune {
namespace {

void check(cudaError_t status, const char* call, const char* file, int line) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // takes it off the runtime's list: it is reported here
  throw CudaError(std::string("slice_channels_: ") + call + " at " + file + ":" + std::to_string(line) +
                  " failed: " + cudaGetErrorName(status) + " (" + cudaGetErrorString(status) + ")");
}
#define DIFFPRUNE_CUDA(call) check(call, #call, "csrc/cuda/slice_channels.cu", __LINE__)

// Makes `device` current and puts back what was.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    DIFFPRUNE_CUDA(cudaGetDevice(&before_));
    if (device != before_) DIFFPRUNE_CUDA(cudaSetDevice(device));
    changed_ = device != before_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

template <class T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(static_cast<intptr_t>(address));
}

}  // namespace

void slice_channels_cuda(const SliceLaunch& launch) {
  const DeviceGuard guard(launch.device);
  auto* entries = pointer<const GatherEntry>(launch.entries);
  auto* tile_entry = pointer<const int>(launch.tile_entry);
  auto first = static_cast<uint32_t>(launch.first);
  void* arguments[] = {&entries, &tile_entry, &first};
  DIFFPRUNE_CUDA(cudaLaunchKernel(reinterpret_cast<const void*>(slice_channels_kernel),
                                  dim3(static_cast<unsigned>(launch.tiles)), dim3(kThreads), arguments, 0,
                                  pointer<CUstream_st>(launch.stream)));
}

}  // namespace diffprune
