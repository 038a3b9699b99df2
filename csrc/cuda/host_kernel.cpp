// The kernel of slice_kernel.h itself, on the host: every block is kThreads threads with a barrier, and blocks run side
// by side. Compiled and driven by tests/ops/test_cuda_slice_channels.py; no part of the package.
#include <memory>
#include <thread>
#include <vector>

#include "slice_kernel.h"

using namespace diffprune;

extern "C" void run_kernel(const TiledEntry* entries, int64_t n_entries, const int32_t* tile_entry, int64_t tiles,
                           int64_t blocks) {
  uint32_t ticket = 0;
  std::vector<int> read(tiles), frontier(n_entries);
  std::vector<pthread_barrier_t> barriers(blocks);
  std::vector<std::unique_ptr<Shared>> memory(blocks);  // all of it there before a thread looks at any
  for (auto& m : memory) m = std::make_unique<Shared>();
  std::vector<std::thread> threads;
  for (int64_t b = 0; b < blocks; ++b) {
    pthread_barrier_init(&barriers[b], nullptr, kThreads);
    for (int i = 0; i < kThreads; ++i)
      threads.emplace_back([&, b, i] {
        threadIdx.x = static_cast<uint32_t>(i);
        block_barrier = &barriers[b];
        block_storage = memory[b].get();
        slice_channels_kernel(entries, tile_entry, static_cast<uint32_t>(tiles), &ticket, read.data(), frontier.data());
      });
  }
  for (auto& thread : threads) thread.join();
  for (auto& barrier : barriers) pthread_barrier_destroy(&barrier);
}
