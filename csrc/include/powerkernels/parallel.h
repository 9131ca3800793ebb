// parallel_for over torch's own thread team.
//
// A second OpenMP runtime, or a second pool, would fight with torch's team, which spins between its
// parallel regions. torch loads its OpenMP runtime globally, so it is looked up by name: nothing is
// linked. Without it, plain threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <dlfcn.h>
#endif

namespace powerkernels {
namespace detail {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

inline GompParallel gomp_parallel() {
#if defined(_WIN32)
  return nullptr;
#else
  static const GompParallel found =
      dlsym(RTLD_DEFAULT, "omp_get_thread_num") == nullptr
          ? nullptr
          : reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
#endif
}

}  // namespace detail

// "openmp" where torch's team is used, else "threads".
inline const char* parallel_backend() {
  return detail::gomp_parallel() != nullptr ? "openmp" : "threads";
}

// Calls fn(task) for every task in [0, num_tasks). Threads take tasks from a shared counter, so
// what a task computes must not depend on who computes it; then the result has the same bits for
// any number of threads. fn must not throw.
template <typename Fn>
void parallel_for(int64_t num_tasks, int num_threads, const Fn& fn) {
  if (num_threads <= 1 || num_tasks <= 1) {
    for (int64_t task = 0; task < num_tasks; ++task) fn(task);
    return;
  }
  struct Shared {
    const Fn* fn;
    int64_t num_tasks;
    std::atomic<int64_t> next{0};
    static void work(void* self) {
      auto* shared = static_cast<Shared*>(self);
      for (;;) {
        const int64_t task = shared->next.fetch_add(1, std::memory_order_relaxed);
        if (task >= shared->num_tasks) return;
        (*shared->fn)(task);
      }
    }
  } shared;
  shared.fn = &fn;
  shared.num_tasks = num_tasks;
  if (const auto run = detail::gomp_parallel()) {
    // Always the full team: asking libgomp for fewer threads ends the others, and the next region
    // of torch would have to start them again.
    run(&Shared::work, &shared, static_cast<unsigned>(num_threads), 0u);
    return;
  }
  std::vector<std::thread> others;
  const int64_t wanted = num_tasks < num_threads ? num_tasks : num_threads;
  others.reserve(static_cast<size_t>(wanted - 1));
  for (int64_t i = 1; i < wanted; ++i) others.emplace_back(&Shared::work, &shared);
  Shared::work(&shared);
  for (auto& thread : others) thread.join();
}

}  // namespace powerkernels
