// The only way kernels use threads. Work is split into tasks whose results do not depend on which thread runs
// them or in what order, so a kernel gives the same bits on any number of threads: whatever is summed over
// tasks is summed afterwards, in task order.
#pragma once

#include <cstdint>

namespace gptcore {

// Threads used by parallel loops: set_num_threads(), else the smaller of OpenMP's count and the CPUs that
// affinity and the cgroup quota grant.
int num_threads();
void set_num_threads(int count);  // 0 returns to the default

// Why num_threads() is what it is, in words.
const char* num_threads_reason();

#if defined(GPTCORE_STD_THREADS)
// Threads that run_tasks has started so far: whether a call's work was divided.
int64_t threads_started();
#endif

using TaskBody = void (*)(void* context, int64_t task, int thread);

// Runs body(context, t, thread) for t in [0, tasks), dynamically over threads; returns when all are done.
// thread is in [0, num_threads()). Nested calls run serially on the calling thread.
void run_tasks(int64_t tasks, TaskBody body, void* context);

template <class F>
inline void parallel_for(int64_t tasks, const F& body) {
  run_tasks(
      tasks, [](void* context, int64_t task, int thread) { (*static_cast<const F*>(context))(task, thread); },
      const_cast<F*>(&body));
}

// Splits [0, n) into one range per thread of at least `grain` items and runs body(begin, end). For work where
// each item's result is independent; ranges depend on the thread count, so nothing may be summed over a
// range.
template <class F>
inline void parallel_ranges(int64_t n, int64_t grain, const F& body) {
  if (n <= 0) return;
  int64_t parts = (n + grain - 1) / grain;
  const int64_t threads = num_threads();
  if (parts > threads) parts = threads;
  if (parts <= 1) {
    body(int64_t{0}, n);
    return;
  }
  parallel_for(parts, [&](int64_t part, int) { body(n * part / parts, n * (part + 1) / parts); });
}

}  // namespace gptcore
