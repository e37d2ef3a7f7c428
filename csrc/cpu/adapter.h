// What forward and backward share: the operands of a call, and how its work is shared out among threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>
#include <vector>

#include "dropout.h"
#include "matmul.h"

namespace peftkernels::cpu {

// Rows of x or G that are worked on at a time.
constexpr int64_t kRowBlock = 128;
// The ranks of a call in the order kernels walk them: `index` holds the ACTIVE ranks and, when asked for, the PROBE
// ranks behind them; `factor` is scaling · gate of each ACTIVE rank.
struct LiveRanks {
  std::vector<int64_t> index;
  int64_t active = 0;
  std::vector<float> factor;
  float scaling = 1.0f;

  int64_t live() const {
    return static_cast<int64_t>(index.size());
  }
};

LiveRanks live_ranks(
    int64_t r, const std::optional<at::Tensor>& gate, const std::optional<at::Tensor>& order,
    const std::optional<at::Tensor>& counts, double scaling, const std::optional<at::Tensor>& scaling_tensor,
    bool with_probe);

Dropout dropout_of(double p, const std::optional<at::Tensor>& seed);

// x viewed as (rows, columns) with unit column stride; copied only when its strides allow no such view.
at::Tensor as_rows(const at::Tensor& x, int64_t columns);

// What a thread's scratch buffers hold; one name, one buffer, so that no two uses at the same time share one.
enum class Scratch { Rows, Products, PaddedRows, Tile, ShrinkOperand, TailOperand, TailRows };

// A buffer of the calling thread that keeps its memory between calls; contents are undefined.
template <typename T, Scratch Slot>
T* thread_scratch(int64_t count) {
  static thread_local std::vector<T> buffer;
  if (static_cast<int64_t>(buffer.size()) < count) {
    buffer.resize(static_cast<size_t>(count));
  }
  return buffer.data();
}

// Rows of a left operand as the matrix kernel reads them.
template <typename T>
struct LeftRows {
  const T* data;
  int64_t stride;
};

// Rows [first, first + count) of `from`, `depth` elements each, readable to `padded_depth`: as they lie where they can
// be, else copied to the thread's scratch buffer `Slot`.
template <typename T, Scratch Slot>
LeftRows<T> padded_rows(const LeftRows<T>& from, int64_t first, int64_t count, int64_t depth, int64_t padded_depth) {
  const T* const rows = from.data + first * from.stride;
  if (padded_depth == depth) {
    return {rows, from.stride};
  }
  T* const copy = thread_scratch<T, Slot>(count * padded_depth);
  for (int64_t row = 0; row < count; ++row) {
    std::copy(rows + row * from.stride, rows + row * from.stride + depth, copy + row * padded_depth);
    std::fill(copy + row * padded_depth + depth, copy + (row + 1) * padded_depth, T(0.0f));
  }
  return {copy, padded_depth};
}

// The rows of a tensor (rows, columns) made by `as_rows`.
template <typename T>
LeftRows<T> left_rows(const at::Tensor& rows) {
  return {rows.const_data_ptr<T>(), rows.size(0) > 1 ? rows.stride(0) : rows.size(1)};
}

// Fewer multiply-adds than this take less time than waking a second thread and waiting for it.
constexpr int64_t kSerialWork = int64_t{1} << 19;

inline int64_t threads_for(int64_t multiply_adds) {
  return multiply_adds < kSerialWork ? 1 : at::get_num_threads();
}

// How a call's row blocks are shared out: whole, with everything that depends on a block done while its rows are in
// cache, or, where that would leave threads idle, in `shares` column ranges a block after a first pass over the rows.
struct Schedule {
  Schedule(int64_t rows, int64_t panels, int64_t threads) : row_blocks(divide_up(rows, kRowBlock)) {
    whole = row_blocks >= 4 * threads || row_blocks % threads == 0;
    shares = whole ? 1 : std::min(panels, divide_up(4 * threads, row_blocks));
  }

  int64_t row_blocks;
  int64_t shares = 1;
  bool whole;
};

// Runs task(0) … task(tasks - 1) on up to `threads` intra-op threads, each taking the next when free. Every task writes results
// of its own, so who runs which does not change them. `done` is called once by each thread.
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

// first(block) for every row block, then second(block, begin, end) for column panels [begin, end) of every row block.
template <typename First, typename Second, typename Done>
void run_row_blocks(
    int64_t rows, int64_t panels, int64_t threads, const First& first, const Second& second, const Done& done) {
  const Schedule schedule(rows, panels, threads);
  if (schedule.whole) {
    const auto both = [&](int64_t block) {
      first(block);
      second(block, 0, panels);
    };
    run_tasks(schedule.row_blocks, threads, both, done);
    return;
  }
  run_tasks(schedule.row_blocks, threads, first, done);
  const auto share_of = [&](int64_t task) {
    const int64_t share = task / schedule.row_blocks;
    second(
        task % schedule.row_blocks, share * panels / schedule.shares, (share + 1) * panels / schedule.shares);
  };
  run_tasks(schedule.row_blocks * schedule.shares, threads, share_of, done);
}

} // namespace peftkernels::cpu
