// Work sharing without state: threads live for one call.
//
// A pool would save some 20 us per call and cost a forked data loader its workers; a call that is worth a second
// thread takes longer than that. An exception in a worker (out of memory) reaches the caller.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace diffprune {

// Calls body(i) once for every i in [0, n), on at most `threads` threads, handing out i in ascending order.
template <class Body>
void parallel(int64_t n, int threads, const Body& body) {
  std::atomic<int64_t> next{0};
  std::exception_ptr failure;
  std::mutex guard;
  auto work = [&] {
    try {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) body(i);
    } catch (...) {
      next.store(n);
      std::lock_guard<std::mutex> lock(guard);
      if (!failure) failure = std::current_exception();
    }
  };
  std::vector<std::thread> others;
  const int64_t wanted = std::min<int64_t>(threads, n);
  others.reserve(wanted > 1 ? wanted - 1 : 0);
  for (int64_t i = 1; i < wanted; ++i) {
    try {
      others.emplace_back(work);
    } catch (const std::system_error&) {
      break;  // the system has no more threads: fewer do the same work, to the same bits
    }
  }
  work();
  for (auto& thread : others) thread.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace diffprune
