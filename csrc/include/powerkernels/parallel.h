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
using OmpNumThreads = int (*)();

// Threads of the parallel region that the caller is in; null without OpenMP.
inline OmpNumThreads omp_num_threads() {
#if defined(_WIN32)
  return nullptr;
#else
  static const auto found =
      reinterpret_cast<OmpNumThreads>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
  return found;
#endif
}

inline GompParallel gomp_parallel() {
#if defined(_WIN32)
  return nullptr;
#else
  static const GompParallel found =
      omp_num_threads() == nullptr
          ? nullptr
          : reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
#endif
}

// A hint that the thread is waiting for another.
inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

// Runs work(self) on every thread of the team: torch's, else `wanted` plain threads.
inline void run_team(void (*work)(void*), void* self, int num_threads, int64_t wanted) {
  if (const auto run = gomp_parallel()) {
    // Always the full team: asking libgomp for fewer threads ends the others, and the next region
    // of torch would have to start them again.
    run(work, self, static_cast<unsigned>(num_threads), 0u);
    return;
  }
  std::vector<std::thread> others;
  others.reserve(static_cast<size_t>(wanted - 1));
  for (int64_t i = 1; i < wanted; ++i) others.emplace_back(work, self);
  work(self);
  for (auto& thread : others) thread.join();
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
  detail::run_team(&Shared::work, &shared, num_threads,
                   num_tasks < num_threads ? num_tasks : num_threads);
}

// The threads of one parallel region that takes many sets of tasks in turn, for work of many short
// parts: leaving a region and entering the next costs more than the barrier between two sets.
class Team {
 public:
  explicit Team(int expected) : size_(expected) {}

  // Every thread of the team calls this with the same tasks; it returns once all are done. What a
  // task computes must not depend on who computes it. fn must not throw.
  template <typename Fn>
  void run(int64_t num_tasks, const Fn& fn) {
    const int64_t set = set_.load(std::memory_order_relaxed);
    std::atomic<int64_t>& next = next_[set % 3];
    for (;;) {
      const int64_t task = next.fetch_add(1, std::memory_order_relaxed);
      if (task >= num_tasks) break;
      fn(task);
    }
    wait_for_all(set);
  }

  void set_size(int size) { size_.store(size, std::memory_order_relaxed); }

 private:
  void wait_for_all(int64_t set) {
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_.load()) {
      arrived_.store(0, std::memory_order_relaxed);
      // Of the set after the next: all have left the one that had this counter before.
      next_[(set + 2) % 3].store(0, std::memory_order_relaxed);
      set_.store(set + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; set_.load(std::memory_order_acquire) == set; ++spins) {
      if (spins < kSpins) {
        detail::pause();
      } else {  // fewer cores than threads
        std::this_thread::yield();
      }
    }
  }

  static constexpr int kSpins = 4000;

  std::atomic<int> size_;
  std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int64_t> next_[3] = {};
  alignas(64) std::atomic<int64_t> set_{0};
};

// Calls fn(team) on every thread of a team of at most num_threads. fn must not throw.
template <typename Fn>
void parallel_team(int num_threads, const Fn& fn) {
  struct Shared {
    const Fn* fn;
    Team team;
    static void work(void* self) {
      auto* shared = static_cast<Shared*>(self);
      // A nested region has one thread, whatever was asked for.
      if (const auto count = detail::omp_num_threads(); count && detail::gomp_parallel()) {
        shared->team.set_size(count());
      }
      (*shared->fn)(shared->team);
    }
  } shared{&fn, Team(num_threads < 1 ? 1 : num_threads)};
  if (num_threads <= 1) {
    fn(shared.team);
    return;
  }
  detail::run_team(&Shared::work, &shared, num_threads, num_threads);
}

}  // namespace powerkernels
