#include "core/parallel.h"

#include <atomic>
#include <cmath>
#include <cstdio>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif
#if !defined(GPTCORE_STD_THREADS)
#include <omp.h>
#endif

namespace gptcore {
namespace {

std::atomic<int> requested{0};
#if defined(GPTCORE_STD_THREADS)
std::atomic<int64_t> started{0};
#endif
thread_local bool inside_task = false;

int affinity_cpus() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
#endif
  const unsigned count = std::thread::hardware_concurrency();
  return count ? static_cast<int>(count) : 1;
}

// CPUs' worth of time that the cgroup (v2, then v1) allows, rounded up; 0 where there is no limit.
int quota_cpus() {
  double quota = 0, period = 0;
  if (FILE* file = std::fopen("/sys/fs/cgroup/cpu.max", "r")) {
    const bool limited = std::fscanf(file, "%lf %lf", &quota, &period) == 2;
    std::fclose(file);
    return limited && period > 0 ? static_cast<int>(std::ceil(quota / period)) : 0;
  }
  FILE* quota_file = std::fopen("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "r");
  FILE* period_file = std::fopen("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "r");
  const bool limited = quota_file && period_file && std::fscanf(quota_file, "%lf", &quota) == 1 &&
                       std::fscanf(period_file, "%lf", &period) == 1 && quota > 0 && period > 0;
  if (quota_file) std::fclose(quota_file);
  if (period_file) std::fclose(period_file);
  return limited ? static_cast<int>(std::ceil(quota / period)) : 0;
}

struct Granted {
  int count;
  const char* reason;
};

const Granted& granted() {
  static const Granted result = [] {
    const int cpus = affinity_cpus(), quota = quota_cpus();
    if (quota > 0 && quota < cpus) return Granted{quota, "the cgroup's CPU quota"};
    return Granted{cpus, "the CPUs this process may run on (affinity)"};
  }();
  return result;
}

int runtime_threads() {
#if defined(GPTCORE_STD_THREADS)
  return granted().count;
#else
  return omp_get_max_threads();  // torch.set_num_threads and OMP_NUM_THREADS govern this
#endif
}

}  // namespace

int num_threads() {
  const int wanted = requested.load(std::memory_order_relaxed);
  if (wanted > 0) return wanted;
  const int runtime = runtime_threads();
  return runtime < granted().count ? runtime : granted().count;
}

void set_num_threads(int count) { requested.store(count > 0 ? count : 0, std::memory_order_relaxed); }

const char* num_threads_reason() {
  if (requested.load(std::memory_order_relaxed) > 0) return "set by set_num_threads";
  if (runtime_threads() < granted().count) return "OpenMP's limit (OMP_NUM_THREADS or torch.set_num_threads)";
  return granted().reason;
}

#if defined(GPTCORE_STD_THREADS)
int64_t threads_started() { return started.load(); }
#endif

void run_tasks(int64_t tasks, TaskBody body, void* context) {
  if (tasks <= 0) return;
  int threads = inside_task ? 1 : num_threads();
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(context, task, 0);
    return;
  }
  std::atomic<int64_t> next{0};
  // Each thread begins with the task of its own number, so that calls over the same data, split into as many
  // tasks as threads, find it in that core's cache; the rest goes to whoever is free. `team` is the number of
  // threads that the runtime really gave.
  const auto worker = [&](int thread, int team) {
    inside_task = true;
    for (int64_t task = thread; task < tasks; task = team + next.fetch_add(1, std::memory_order_relaxed)) {
      body(context, task, thread);
    }
    inside_task = false;
  };
#if defined(GPTCORE_STD_THREADS)
  std::vector<std::thread> pool;
  started += threads - 1;
  for (int thread = 1; thread < threads; ++thread) pool.emplace_back(worker, thread, threads);
  worker(0, threads);
  for (auto& thread : pool) thread.join();
#else
#pragma omp parallel num_threads(threads)
  worker(omp_get_thread_num(), omp_get_num_threads());
#endif
}

}  // namespace gptcore
