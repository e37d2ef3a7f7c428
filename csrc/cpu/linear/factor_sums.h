// The second part of lora_linear_bwd.cpu: the factors' gradients in ranges of columns, each summed over all rows by one
// task in a fixed order.
#pragma once

#include <algorithm>
#include <cstdint>

#include "backward_pass.h"
#include "cpu/gemm/product.h"
#include "cpu/gemm/rows.h"
#include "cpu/gemm/scratch.h"
#include "cpu/gemm/transpose.h"

namespace peftkernels::cpu {

// Columns of ∂A or ∂B that one task sums.
constexpr int64_t kSumColumns = 2 * kPanelColumns;
// Rows whose dropped copies, or column sums, are made at a time.
constexpr int64_t kSumRows = 64;

template <typename scalar_t>
class FactorSums {
 public:
  FactorSums(const BackwardOperands& call, const RowResults<scalar_t>& rows, FactorGradients& gradients)
      : call_(call),
        rows_(rows),
        gradients_(gradients),
        grads_(left_rows<scalar_t>(call.grad_y)),
        M_(call.grad_y.size(0)),
        N_(call.weight.size(0)),
        K_(call.weight.size(1)),
        r_(call.A.size(0)),
        ranks_(call.ranks) {
    if (call.x.defined()) {
      x_ = left_rows<scalar_t>(call.x);
    }
  }

  void run() {
    sum_gate();
    const int64_t a_tasks = call_.needs[kA] && ranks_.active > 0 ? divide_up(K_, kSumColumns) : 0;
    const bool sums_B = (call_.needs[kB] && ranks_.active > 0) || call_.needs[kBias];
    const int64_t b_tasks = sums_B ? divide_up(N_, kSumColumns) : 0;
    run_tasks(
        a_tasks + b_tasks, threads_for(M_ * ranks_.active * (K_ + N_)),
        [&](int64_t task) { task < a_tasks ? sum_A(task) : sum_B(task - a_tasks); },
        [] { release_kernels<scalar_t>(); });
  }

 private:
  void sum_gate() {
    if (!call_.needs[kGate]) {
      return;
    }
    const int64_t live = ranks_.live(), parts = divide_up(M_, kRowShare);
    for (int64_t i = 0; i < live; ++i) {
      double sum = 0.0;
      for (int64_t part = 0; part < parts; ++part) {
        sum += rows_.gate[static_cast<size_t>(part * live + i)];
      }
      const auto gradient = static_cast<float>(sum * ranks_.scaling);
      gradients_.gate.write(ranks_.index[i], 1, &gradient);
    }
  }

  void sum_A(int64_t task) {
    const int64_t column = task * kSumColumns, width = std::min(kSumColumns, K_ - column);
    const int64_t active = ranks_.active;
    float* const sums = thread_scratch<float, Scratch::Products>(active * width);
    if (call_.dropout) {
      auto* const dropped = thread_scratch<scalar_t, Scratch::Rows>(kSumRows * width);
      for (int64_t first = 0; first < M_ || first == 0; first += kSumRows) {
        const int64_t count = std::min(kSumRows, M_ - first);
        for (int64_t row = 0; row < count; ++row) {
          const auto [bits, bit] = rows_.kept.of_row(first + row, K_);
          const scalar_t* const from = x_.data + (first + row) * x_.stride + column;
          call_.dropout.apply(bits, bit + column, width, from, dropped + row * width);
        }
        RowSums<scalar_t> part{count, active, width, rows_.left_A + first * active, dropped, width};
        sum_over_rows(part, sums, width, first > 0);
      }
    } else {
      RowSums<scalar_t> whole{M_, active, width, rows_.left_A, x_.data + column, x_.stride};
      sum_over_rows(whole, sums, width, false);
    }
    for (int64_t i = 0; i < active; ++i) {
      gradients_.A.write(ranks_.index[i] * K_ + column, width, sums + i * width);
    }
  }

  void sum_B(int64_t task) {
    const int64_t column = task * kSumColumns, width = std::min(kSumColumns, N_ - column);
    if (call_.needs[kB] && ranks_.active > 0) {
      const int64_t active = ranks_.active;
      float* const sums = thread_scratch<float, Scratch::Products>(active * width);
      RowSums<scalar_t> whole{M_, active, width, rows_.left_B, grads_.data + column, grads_.stride};
      sum_over_rows(whole, sums, width, false);
      // ∂Bᵀ of all ranks, zeros where a rank takes no part, and then on its side.
      float* const by_rank = thread_scratch<float, Scratch::Tile>(2 * width * r_);
      float* const to = by_rank + width * r_;
      if (active < r_) {
        std::fill(by_rank, by_rank + width * r_, 0.0f);
      }
      for (int64_t i = 0; i < active; ++i) {
        const float factor = ranks_.factor[i];
        std::transform(
            sums + i * width, sums + (i + 1) * width, by_rank + ranks_.index[i] * width,
            [factor](float sum) { return sum * factor; });
      }
      transpose_words(by_rank, width * static_cast<int64_t>(sizeof(float)), r_, width, to, r_);
      gradients_.B.write(column * r_, width * r_, to);
    }
    if (call_.needs[kBias]) {
      sum_bias(column, width);
    }
  }

  void sum_bias(int64_t column, int64_t width) {
    float* const to = thread_scratch<float, Scratch::Tile>(width);
    float* const part = thread_scratch<float, Scratch::Products>(width);
    std::fill(to, to + width, 0.0f);
    for (int64_t first = 0; first < M_; first += kSumRows) {
      std::fill(part, part + width, 0.0f);
      for (int64_t row = first; row < std::min(M_, first + kSumRows); ++row) {
        add_row(grads_.data + row * grads_.stride + column, width, part);
      }
      add_row(part, width, to);
    }
    gradients_.bias.write(column, width, to);
  }

  const BackwardOperands& call_;
  const RowResults<scalar_t>& rows_;
  FactorGradients& gradients_;
  LeftRows<scalar_t> grads_, x_{nullptr, 0};
  int64_t M_, N_, K_, r_;
  const LiveRanks& ranks_;
};

} // namespace peftkernels::cpu
