// lora_linear_bwd.cpu: row block by row block H = G·B and ∂x = G·W + (H ⊙ ĝ)·A while G is in cache, then the factors'
// gradients in ranges of columns, each summed over all rows by one task in a fixed order.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>

#include "adapter.h"
#include "check_call.h"
#include "gradient.h"
#include "lora_linear.h"
#include "operands.h"
#include "product.h"
#include "rows.h"
#include "scratch.h"
#include "transpose.h"
#include "weight_panels.h"

namespace peftkernels::cpu {
namespace {

// Columns of ∂A or ∂B that one task sums.
constexpr int64_t kSumColumns = 2 * kPanelColumns;
// Rows whose dropped copies, or column sums, are made at a time.
constexpr int64_t kSumRows = 64;

struct Needs {
  bool x, A, B, bias, gate;
};

struct FactorGradients {
  Gradient A, B, bias, gate;
};

template <typename scalar_t>
class Backward {
 public:
  Backward(
      const at::Tensor& grads, const at::Tensor& rows, const at::Tensor& weight, const at::Tensor& lora_A,
      const at::Tensor& lora_B, const at::Tensor& shrink, const LiveRanks& ranks, const Dropout& dropout,
      const Needs& needs, at::Tensor& grad_x, FactorGradients& gradients)
      : grads_(left_rows<scalar_t>(grads)),
        rows_(grads.size(0)),
        columns_(weight.size(0)),
        depth_(weight.size(1)),
        r_(lora_A.size(0)),
        lora_A_(lora_A),
        lora_B_(lora_B),
        ranks_(ranks),
        dropout_(dropout),
        needs_(needs),
        expands_(ranks.live() > 0 && (needs.x || needs.A || needs.gate)),
        gradients_(gradients),
        group_(depth_group<scalar_t>()) {
    if (rows.defined()) {
      x_ = left_rows<scalar_t>(rows);
    }
    if (shrink.defined()) {
      shrink_ = shrink.const_data_ptr<scalar_t>();
    }
    if (needs_.x) {
      grad_x_ = grad_x.data_ptr<scalar_t>();
      panels_ = WeightPanels<scalar_t>(weight, Direction::Backward, rows_);
    }
  }

  void run() {
    const int64_t panels = needs_.x ? divide_up(depth_, kPanelColumns) : 0;
    const int64_t threads = threads_for(rows_ * columns_ * (needs_.x ? depth_ : ranks_.live()));
    const RowBlocks blocks(rows_, threads);
    prepare_factors();
    prepare_rows();
    const auto done = [] { release_kernels<scalar_t>(); };
    run_row_blocks(
        blocks, panels, threads, [this](int64_t begin, int64_t end) { expand_rows(begin, end); },
        [this](int64_t begin, int64_t end, int64_t first_panel, int64_t end_panel) {
          input_tiles(begin, end, first_panel, end_panel);
        },
        done);
    sum_gate();

    const int64_t a_tasks = needs_.A && ranks_.active > 0 ? divide_up(depth_, kSumColumns) : 0;
    const bool sums_B = (needs_.B && ranks_.active > 0) || needs_.bias;
    const int64_t b_tasks = sums_B ? divide_up(columns_, kSumColumns) : 0;
    run_tasks(
        a_tasks + b_tasks, threads_for(rows_ * ranks_.active * (depth_ + columns_)),
        [&](int64_t task) { task < a_tasks ? sum_A(task) : sum_B(task - a_tasks); }, done);
  }

 private:
  // B as right operand of H and A as that of ∂x's tail: as they lie in fp32, in pairs for 16-bit kernels.
  void prepare_factors() {
    const int64_t live = ranks_.live(), active = ranks_.active;
    if (expands_) {
      expand_operand_ = live_columns<scalar_t>(lora_B_, ranks_, live, nullptr);
      if constexpr (!std::is_same_v<scalar_t, float>) {
        if (group_ == 2) {
          auto* const pairs = thread_scratch<scalar_t, Scratch::ShrinkOperand>(round_up(columns_, group_) * live);
          pair_up(expand_operand_, live, columns_, live, pairs);
          expand_operand_ = pairs;
        }
      }
    }
    if (needs_.x && active > 0) {
      tail_operand_ = live_rows<scalar_t>(lora_A_, ranks_, active);
      if constexpr (!std::is_same_v<scalar_t, float>) {
        if (group_ == 2) {
          auto* const pairs = thread_scratch<scalar_t, Scratch::TailOperand>(round_up(active, group_) * depth_);
          pair_up(tail_operand_, depth_, active, depth_, pairs);
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
      tail_rows_ = thread_scratch<scalar_t, Scratch::TailRows>(rows_ * active);
      left_A_ = tail_rows_;
      if (group_ == 2) {
        left_A_ = thread_scratch<scalar_t, Scratch::PairedExpand>(round_up(rows_, group_) * active);
      }
    }
    if (needs_.B && active > 0) {
      const bool as_it_lies = group_ != 2 && ranks_.in_place && active == r_;
      left_B_ = as_it_lies ? const_cast<scalar_t*>(shrink_)
                           : thread_scratch<scalar_t, Scratch::ActiveShrink>(round_up(rows_, group_) * active);
      copies_shrink_ = !as_it_lies;
    }
    if (dropout_ && (needs_.x || needs_.A)) {
      // Shares begin at whole bytes, so that threads write to bytes of their own.
      kept_stride_ = Dropout::bytes_for(kRowShare * depth_);
      kept_ = thread_scratch<uint8_t, Scratch::Kept>(divide_up(rows_, kRowShare) * kept_stride_);
    }
    if (needs_.gate) {
      gate_sums_.assign(static_cast<size_t>(divide_up(rows_, kRowShare) * ranks_.live()), 0.0f);
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
    for (int64_t row = begin; kept_ != nullptr && row < end; row += kRowShare) {
      const int64_t elements = std::min(kRowShare, end - row) * depth_;
      dropout_.keep(row * depth_, elements, kept_ + row / kRowShare * kept_stride_);
    }
    if (!expands_) {
      return;
    }
    auto* const products = thread_scratch<float, Scratch::Products>(count * live);
    Product<scalar_t> product{
        count, live, columns_, grads_.data + begin * grads_.stride, grads_.stride, expand_operand_, live};
    multiply(product, products, live);
    if (needs_.gate) {
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

  void sum_gate() {
    if (!needs_.gate) {
      return;
    }
    const int64_t live = ranks_.live(), parts = divide_up(rows_, kRowShare);
    for (int64_t i = 0; i < live; ++i) {
      double sum = 0.0;
      for (int64_t part = 0; part < parts; ++part) {
        sum += gate_sums_[static_cast<size_t>(part * live + i)];
      }
      const auto gradient = static_cast<float>(sum * ranks_.scaling);
      gradients_.gate.write(ranks_.index[i], 1, &gradient);
    }
  }

  // Where the bits of a row of x begin, and which of them is the row's first.
  std::pair<const uint8_t*, int64_t> kept_bits(int64_t row) const {
    const int64_t share = row / kRowShare, first_row = share * kRowShare;
    return {kept_ + share * kept_stride_, Dropout::first_bit(first_row * depth_) + (row - first_row) * depth_};
  }

  // ∂x. Dropout's mask falls on the adapter's share alone, which is then made first and apart.
  void input_tiles(int64_t begin, int64_t end, int64_t first_panel, int64_t end_panel) {
    if (!needs_.x) {
      return;
    }
    const int64_t active = ranks_.active;
    Product<scalar_t> product{};
    product.rows = end - begin;
    product.depth = columns_;
    product.left = grads_.data + begin * grads_.stride;
    product.left_stride = grads_.stride;
    product.right_stride = kPanelColumns;
    if (active > 0 && !dropout_) {
      product.tail_depth = active;
      product.tail_left = tail_rows_ + begin * active;
      product.tail_left_stride = active;
      product.tail_right_stride = depth_;
    }
    for (int64_t panel = first_panel; panel < end_panel; ++panel) {
      const int64_t column = panel * kPanelColumns;
      product.width = std::min(kPanelColumns, depth_ - column);
      product.right = panels_[panel];
      product.ahead = panel + 1 < end_panel ? panels_.ahead(panel + 1) : nullptr;
      if (product.tail_depth > 0) {
        product.tail_right = tail_operand_ + column * group_;
      } else if (active > 0) {
        product.start = dropped_share(begin, end, column, product.width);
        product.start_stride = kPanelColumns;
      }
      multiply_rounded(product, grad_x_ + begin * depth_ + column, depth_);
    }
  }

  const float* dropped_share(int64_t begin, int64_t end, int64_t column, int64_t width) const {
    const int64_t count = end - begin, active = ranks_.active;
    auto* const share = thread_scratch<float, Scratch::DroppedShare>(count * kPanelColumns);
    Product<scalar_t> product{
        count, width, active, tail_rows_ + begin * active, active, tail_operand_ + column * group_, depth_};
    multiply(product, share, kPanelColumns);
    for (int64_t row = 0; row < count; ++row) {
      const auto [bits, first] = kept_bits(begin + row);
      float* const sums = share + row * kPanelColumns;
      dropout_.apply(bits, first + column, width, sums, sums);
    }
    return share;
  }

  void sum_A(int64_t task) {
    const int64_t column = task * kSumColumns, width = std::min(kSumColumns, depth_ - column);
    const int64_t active = ranks_.active;
    float* const sums = thread_scratch<float, Scratch::Products>(active * width);
    if (dropout_) {
      auto* const dropped = thread_scratch<scalar_t, Scratch::Rows>(kSumRows * width);
      for (int64_t first = 0; first < rows_ || first == 0; first += kSumRows) {
        const int64_t count = std::min(kSumRows, rows_ - first);
        for (int64_t row = 0; row < count; ++row) {
          const auto [bits, bit] = kept_bits(first + row);
          const scalar_t* const from = x_.data + (first + row) * x_.stride + column;
          dropout_.apply(bits, bit + column, width, from, dropped + row * width);
        }
        RowSums<scalar_t> part{count, active, width, left_A_ + first * active, dropped, width};
        sum_over_rows(part, sums, width, first > 0);
      }
    } else {
      RowSums<scalar_t> whole{rows_, active, width, left_A_, x_.data + column, x_.stride};
      sum_over_rows(whole, sums, width, false);
    }
    for (int64_t i = 0; i < active; ++i) {
      gradients_.A.write(ranks_.index[i] * depth_ + column, width, sums + i * width);
    }
  }

  void sum_B(int64_t task) {
    const int64_t column = task * kSumColumns, width = std::min(kSumColumns, columns_ - column);
    if (needs_.B && ranks_.active > 0) {
      const int64_t active = ranks_.active;
      float* const sums = thread_scratch<float, Scratch::Products>(active * width);
      RowSums<scalar_t> whole{rows_, active, width, left_B_, grads_.data + column, grads_.stride};
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
    if (needs_.bias) {
      sum_bias(column, width);
    }
  }

  void sum_bias(int64_t column, int64_t width) {
    float* const to = thread_scratch<float, Scratch::Tile>(width);
    float* const part = thread_scratch<float, Scratch::Products>(width);
    std::fill(to, to + width, 0.0f);
    for (int64_t first = 0; first < rows_; first += kSumRows) {
      std::fill(part, part + width, 0.0f);
      for (int64_t row = first; row < std::min(rows_, first + kSumRows); ++row) {
        add_row(grads_.data + row * grads_.stride + column, width, part);
      }
      add_row(part, width, to);
    }
    gradients_.bias.write(column, width, to);
  }

  LeftRows<scalar_t> grads_;
  LeftRows<scalar_t> x_{nullptr, 0};
  int64_t rows_, columns_, depth_, r_;
  const at::Tensor &lora_A_, &lora_B_;
  const LiveRanks& ranks_;
  const Dropout& dropout_;
  Needs needs_;
  bool expands_;
  FactorGradients& gradients_;
  int64_t group_;
  const scalar_t* shrink_ = nullptr;
  scalar_t* grad_x_ = nullptr;
  WeightPanels<scalar_t> panels_;
  const scalar_t *expand_operand_ = nullptr, *tail_operand_ = nullptr;
  // The calling thread's scratch, written by the first pass and read by the later ones.
  scalar_t *tail_rows_ = nullptr, *left_A_ = nullptr, *left_B_ = nullptr;
  bool copies_shrink_ = false;
  uint8_t* kept_ = nullptr;
  int64_t kept_stride_ = 0;
  std::vector<float> gate_sums_;
};

} // namespace

Gradients lora_linear_backward(
    const at::Tensor& grad_y, const std::optional<at::Tensor>& x, const at::Tensor& weight, const at::Tensor& lora_A,
    const at::Tensor& lora_B, const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& shrink,
    const std::optional<at::Tensor>& gate, const std::optional<at::Tensor>& rank_state,
    const std::optional<at::Tensor>& rank_order, const std::optional<at::Tensor>& rank_counts, double scaling,
    const std::optional<at::Tensor>& scaling_tensor, double dropout_p, const std::optional<at::Tensor>& dropout_seed,
    std::array<bool, 6> needs) {
  const CallRecord record{
      or_null(x), &grad_y, &weight, &lora_A, &lora_B, or_null(bias), or_null(gate), or_null(rank_state),
      or_null(rank_order), or_null(rank_counts), or_null(scaling_tensor), dropout_p, or_null(dropout_seed),
      or_null(shrink)};
  check_call<OnFault::Raise>(record);
  check_needs(record, needs);
  const auto dtype = grad_y.scalar_type();
  const int64_t r = lora_A.size(0);
  const Needs wanted{needs[0], needs[2], needs[3], needs[4], needs[5]};

  const auto grads = as_rows(grad_y, weight.size(0));
  const auto rows = x ? as_rows(*x, weight.size(1)) : at::Tensor();
  const auto ranks = live_ranks(r, gate, rank_order, rank_counts, scaling, scaling_tensor, wanted.gate);
  const auto dropout = dropout_of(dropout_p, dropout_seed);
  const auto factor_A = readable_factor(lora_A, dtype);
  const auto factor_B = readable_factor(lora_B, dtype);
  const auto shrink_rows = shrink ? shrink->contiguous() : at::Tensor();

  auto shape = grad_y.sizes().vec();
  shape.back() = weight.size(1);
  auto grad_x = wanted.x ? at::empty(shape, grad_y.options()) : at::empty({0}, grad_y.options());
  // Sums over nothing, whatever the number of rows: that of rows without elements may be of any magnitude.
  const bool sums = grads.size(0) > 0 && (weight.size(0) > 0 || weight.size(1) > 0);
  FactorGradients gradients{
      Gradient(wanted.A, lora_A, sums && ranks.active == r), Gradient(wanted.B, lora_B, sums && ranks.active > 0),
      Gradient(wanted.bias, bias ? *bias : grad_y, sums),
      Gradient(wanted.gate, gate ? *gate : lora_A, sums && ranks.live() == r)};

  if (sums) {
    AT_DISPATCH_SWITCH(
        dtype, "lora_linear_bwd.cpu",
        AT_DISPATCH_CASE(at::kFloat, [&] { Backward<float>(grads, rows, weight, factor_A, factor_B, shrink_rows, ranks, dropout, wanted, grad_x, gradients).run(); })
        AT_DISPATCH_CASE(at::kBFloat16, [&] { Backward<at::BFloat16>(grads, rows, weight, factor_A, factor_B, shrink_rows, ranks, dropout, wanted, grad_x, gradients).run(); }));
  }
  return {
      grad_x,
      at::empty({0}, weight.options()),
      gradients.A.tensor(),
      gradients.B.tensor(),
      gradients.bias.tensor(),
      gradients.gate.tensor()};
}

} // namespace peftkernels::cpu
