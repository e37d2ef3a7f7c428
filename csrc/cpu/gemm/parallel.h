// How work is shared out among threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace peftkernels::cpu {

inline int64_t divide_up(int64_t value, int64_t by) {
  return (value + by - 1) / by;
}

inline int64_t round_up(int64_t value, int64_t multiple) {
  return divide_up(value, multiple) * multiple;
}

// Fewer multiply-adds than this take less time than waking a second thread and waiting for it.
constexpr int64_t kSerialWork = int64_t{1} << 17;

inline int64_t threads_for(int64_t multiply_adds) {
  return multiply_adds < kSerialWork ? 1 : at::get_num_threads();
}

// Runs task(0) … task(tasks - 1) on up to `threads` intra-op threads, each taking the next when free. Every task writes
// results of its own, so who runs which does not change them. `done` is called once by each thread.
template <typename Task, typename Done>
void run_tasks(int64_t tasks, int64_t threads, const Task& task, const Done& done) {
  std::atomic<int64_t> next{0};
  const int64_t workers = std::min(tasks, threads);
  at::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    for (int64_t i = next.fetch_add(1); i < tasks; i = next.fetch_add(1)) {
      task(i);
    }
    done();
  });
}

} // namespace peftkernels::cpu
