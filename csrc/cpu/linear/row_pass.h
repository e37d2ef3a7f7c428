// The first part of lora_linear_bwd.cpu: row block by row block H = G·B and ∂x = G·W + (H ⊙ ĝ)·A, while G is in cache.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "backward_pass.h"
#include "cpu/gemm/product.h"
#include "cpu/gemm/rows.h"
#include "cpu/gemm/scratch.h"
#include "cpu/packs/weight_panels.h"
#include "operands.h"

namespace peftkernels::cpu {

template <typename scalar_t>
class RowPass {
 public:
  RowPass(const BackwardOperands& call, const at::Tensor& grad_x)
      : call_(call),
        grads_(left_rows<scalar_t>(call.grad_y)),
        M_(call.grad_y.size(0)),
        N_(call.weight.size(0)),
        K_(call.weight.size(1)),
        r_(call.A.size(0)),
        ranks_(call.ranks),
        dropout_(call.dropout),
        expands_(call.expands()),
        group_(depth_group<scalar_t>()) {
    if (call.shrink.defined()) {
      shrink_ = call.shrink.const_data_ptr<scalar_t>();
    }
    if (call.needs[kX]) {
      grad_x_ = grad_x.data_ptr<scalar_t>();
      panels_ = WeightPanels<scalar_t>(call.weight, Direction::Backward, M_);
    }
  }

  // Valid until the calling thread's next call.
  RowResults<scalar_t> run() {
    const int64_t panels = call_.needs[kX] ? divide_up(K_, kPanelColumns) : 0;
    const int64_t threads = threads_for(M_ * N_ * (call_.needs[kX] ? K_ : ranks_.live()));
    prepare_factors();
    prepare_rows();
    run_row_blocks(
        RowBlocks(M_, threads), panels, threads, [this](int64_t begin, int64_t end) { expand_rows(begin, end); },
        [this](int64_t begin, int64_t end, int64_t first_panel, int64_t end_panel) {
          input_tiles(begin, end, first_panel, end_panel);
        },
        [] { release_kernels<scalar_t>(); });
    return {left_A_, left_B_, kept_, std::move(gate_sums_)};
  }

 private:
  // B as right operand of H and A as that of ∂x's tail: as they lie in fp32, in pairs for 16-bit kernels.
  void prepare_factors() {
    const int64_t live = ranks_.live(), active = ranks_.active;
    if (expands_) {
      expand_operand_ = live_columns<scalar_t>(call_.B, ranks_, live, nullptr);
      if constexpr (!std::is_same_v<scalar_t, float>) {
        if (group_ == 2) {
          auto* const pairs = thread_scratch<scalar_t, Scratch::ShrinkOperand>(round_up(N_, group_) * live);
          pair_up(expand_operand_, live, N_, live, pairs);
          expand_operand_ = pairs;
        }
      }
    }
    if (call_.needs[kX] && active > 0) {
      tail_operand_ = live_rows<scalar_t>(call_.A, ranks_, active);
      if constexpr (!std::is_same_v<scalar_t, float>) {
        if (group_ == 2) {
          auto* const pairs = thread_scratch<scalar_t, Scratch::TailOperand>(round_up(active, group_) * K_);
          pair_up(tail_operand_, K_, active, K_, pairs);
          tail_operand_ = pairs;
        }
      }
    }
  }

  // What the first pass leaves for the later ones: H ⊙ ĝ · scaling, S of the active ranks, both as left operands, bits
  // of the elements that dropout keeps, and each share of rows' part of ∂gate.
  void prepare_rows() {
    const int64_t active = ranks_.active;
    if (expands_ && active > 0) {
      tail_rows_ = thread_scratch<scalar_t, Scratch::TailRows>(M_ * active);
      left_A_ = tail_rows_;
      if (group_ == 2) {
        left_A_ = thread_scratch<scalar_t, Scratch::PairedExpand>(round_up(M_, group_) * active);
      }
    }
    if (call_.needs[kB] && active > 0) {
      const bool as_it_lies = group_ != 2 && ranks_.in_place && active == r_;
      left_B_ = as_it_lies ? const_cast<scalar_t*>(shrink_)
                           : thread_scratch<scalar_t, Scratch::ActiveShrink>(round_up(M_, group_) * active);
      copies_shrink_ = !as_it_lies;
    }
    if (dropout_ && (call_.needs[kX] || call_.needs[kA])) {
      // Shares begin at whole bytes, so that threads write to bytes of their own.
      kept_.stride = Dropout::bytes_for(kRowShare * K_);
      kept_.bits = thread_scratch<uint8_t, Scratch::Kept>(divide_up(M_, kRowShare) * kept_.stride);
    }
    if (call_.needs[kGate]) {
      gate_sums_.assign(static_cast<size_t>(divide_up(M_, kRowShare) * ranks_.live()), 0.0f);
    }
  }

  // Copies of S's active columns as left operand of ∂B: [rows][active], in pairs of rows where kernels want them.
  void copy_shrink(int64_t begin, int64_t end) {
    const int64_t active = ranks_.active;
    if (group_ == 2 && ranks_.in_place) {
      pair_up_rows(shrink_, r_, begin, end, left_B_);
      return;
    }
    for (int64_t row = begin; row < end; ++row) {
      const scalar_t* const from = shrink_ + row * r_;
      scalar_t* const to = left_B_ + row / group_ * group_ * active + row % group_;
      for (int64_t i = 0; i < active; ++i) {
        to[i * group_] = from[ranks_.index[i]];
      }
    }
    for (int64_t i = 0; group_ == 2 && end % 2 != 0 && i < active; ++i) {
      left_B_[(end - 1) * active + 2 * i + 1] = scalar_t(0.0f);
    }
  }

  // Rows [begin, end) of the active ranks as left operand in pairs; an odd last row stands beside zeros.
  void pair_up_rows(const scalar_t* from, int64_t from_stride, int64_t begin, int64_t end, scalar_t* to) const {
    if constexpr (!std::is_same_v<scalar_t, float>) {
      const int64_t active = ranks_.active;
      pair_up(from + begin * from_stride, from_stride, end - begin, active, to + begin * active);
    }
  }

  void expand_rows(int64_t begin, int64_t end) {
    const int64_t count = end - begin, live = ranks_.live(), active = ranks_.active;
    if (copies_shrink_) {
      copy_shrink(begin, end);
    }
    for (int64_t row = begin; kept_.bits != nullptr && row < end; row += kRowShare) {
      const int64_t elements = std::min(kRowShare, end - row) * K_;
      dropout_.keep(row * K_, elements, kept_.bits + row / kRowShare * kept_.stride);
    }
    if (!expands_) {
      return;
    }
    auto* const products = thread_scratch<float, Scratch::Products>(count * live);
    Product<scalar_t> product{
        count, live, N_, grads_.data + begin * grads_.stride, grads_.stride, expand_operand_, live};
    multiply(product, products, live);
    if (call_.needs[kGate]) {
      add_gate(begin, end, products);
    }
    if (active == 0) {
      return;
    }
    scale_columns(products, live, count, active, ranks_.factor.data(), tail_rows_ + begin * active);
    if (group_ == 2) {
      pair_up_rows(tail_rows_, active, begin, end, left_A_);
    }
  }

  void add_gate(int64_t begin, int64_t end, const float* products) {
    const int64_t live = ranks_.live();
    auto* const saved = thread_scratch<float, Scratch::GateRow>(live);
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t i = 0; i < live; ++i) {
        saved[i] = static_cast<float>(shrink_[row * r_ + ranks_.index[i]]);
      }
      add_products(saved, products + (row - begin) * live, live, gate_sums_.data() + row / kRowShare * live);
    }
  }

  // ∂x. Dropout's mask falls on the adapter's share alone, which is then made first and apart.
  void input_tiles(int64_t begin, int64_t end, int64_t first_panel, int64_t end_panel) {
    if (!call_.needs[kX]) {
      return;
    }
    const int64_t active = ranks_.active;
    Product<scalar_t> product{};
    product.rows = end - begin;
    product.depth = N_;
    product.left = grads_.data + begin * grads_.stride;
    product.left_stride = grads_.stride;
    product.right_stride = kPanelColumns;
    if (active > 0 && !dropout_) {
      product.tail_depth = active;
      product.tail_left = tail_rows_ + begin * active;
      product.tail_left_stride = active;
      product.tail_right_stride = K_;
    }
    for (int64_t panel = first_panel; panel < end_panel; ++panel) {
      const int64_t column = panel * kPanelColumns;
      product.width = std::min(kPanelColumns, K_ - column);
      product.right = panels_[panel];
      product.ahead = panel + 1 < end_panel ? panels_.ahead(panel + 1) : nullptr;
      if (product.tail_depth > 0) {
        product.tail_right = tail_operand_ + column * group_;
      } else if (active > 0) {
        product.start = dropped_share(begin, end, column, product.width);
        product.start_stride = kPanelColumns;
      }
      multiply_rounded(product, grad_x_ + begin * K_ + column, K_);
    }
  }

  const float* dropped_share(int64_t begin, int64_t end, int64_t column, int64_t width) const {
    const int64_t count = end - begin, active = ranks_.active;
    auto* const share = thread_scratch<float, Scratch::DroppedShare>(count * kPanelColumns);
    Product<scalar_t> product{
        count, width, active, tail_rows_ + begin * active, active, tail_operand_ + column * group_, K_};
    multiply(product, share, kPanelColumns);
    for (int64_t row = 0; row < count; ++row) {
      const auto [bits, first] = kept_.of_row(begin + row, K_);
      float* const sums = share + row * kPanelColumns;
      dropout_.apply(bits, first + column, width, sums, sums);
    }
    return share;
  }

  const BackwardOperands& call_;
  LeftRows<scalar_t> grads_;
  int64_t M_, N_, K_, r_;
  const LiveRanks& ranks_;
  const Dropout& dropout_;
  bool expands_;
  int64_t group_;
  const scalar_t* shrink_ = nullptr;
  scalar_t* grad_x_ = nullptr;
  WeightPanels<scalar_t> panels_;
  const scalar_t *expand_operand_ = nullptr, *tail_operand_ = nullptr;
  // The calling thread's scratch, written by all threads.
  scalar_t *tail_rows_ = nullptr, *left_A_ = nullptr, *left_B_ = nullptr;
  bool copies_shrink_ = false;
  KeptBits kept_;
  std::vector<float> gate_sums_;
};

} // namespace peftkernels::cpu
