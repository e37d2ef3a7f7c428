// lora_linear_bwd.cpu: row block by row block H = G·B and ∂x = G·W + (H ⊙ ĝ)·A while G is in cache, then the factors'
// gradients column panel by column panel, each summed over all rows by one task in a fixed order.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "adapter.h"
#include "lora_linear.h"
#include "matmul.h"
#include "pack_cache.h"
#include "rounding.h"

namespace peftkernels::cpu {
namespace {

// Rows of x or G that one step of ∂A and ∂B sums over.
constexpr int64_t kSumRows = 256;

struct Needs {
  bool x, A, B, bias, gate;
};

// Results in fp32, whatever the parameters' dtypes; a gradient nobody asked for is undefined.
struct Sums {
  at::Tensor A, B, bias, gate;
};

template <typename scalar_t>
class Backward {
 public:
  Backward(
      const at::Tensor& grads, const at::Tensor& rows, const at::Tensor& weight, const at::Tensor& lora_A,
      const at::Tensor& lora_B, const at::Tensor& shrink, const LiveRanks& ranks, const Dropout& dropout,
      const Needs& needs, at::Tensor& grad_x, Sums& sums)
      : grads_(left_rows<scalar_t>(grads)),
        rows_(grads.size(0)),
        columns_(weight.size(0)),
        depth_(weight.size(1)),
        a_(lora_A.const_data_ptr<scalar_t>()),
        b_(lora_B.const_data_ptr<scalar_t>()),
        r_(lora_A.size(0)),
        ranks_(ranks),
        dropout_(dropout),
        needs_(needs),
        sums_(sums),
        group_(depth_group<scalar_t>()),
        padded_columns_(round_up(columns_, group_)),
        padded_rows_(round_up(rows_, group_)),
        tail_depth_(round_up(ranks.active, group_)),
        options_(grads.options()) {
    if (rows.defined()) {
      x_ = left_rows<scalar_t>(rows);
    }
    if (shrink.defined()) {
      shrink_ = shrink.const_data_ptr<scalar_t>();
    }
    if (needs_.x) {
      grad_x_ = grad_x.data_ptr<scalar_t>();
      pack_ = packed_weight(weight, grads.scalar_type(), Direction::Backward);
    }
  }

  void run() {
    const int64_t blocks = divide_up(rows_, kRowBlock);
    const bool expands = needs_.x || needs_.A || needs_.gate;
    allocate(blocks);
    pack_factors(expands);
    const auto done = [this] { release_matmul<scalar_t>(group_); };
    run_row_blocks(
        rows_, needs_.x ? divide_up(depth_, kPanelColumns) : 0,
        threads_for(rows_ * columns_ * (needs_.x ? depth_ : ranks_.live())), [&](int64_t block) { expand_rows(block, expands); },
        [this](int64_t block, int64_t begin, int64_t end) { input_tiles(block, begin, end); }, done);
    sum_gate(blocks);

    const int64_t a_panels = needs_.A ? divide_up(depth_, kPanelColumns) : 0;
    const int64_t b_panels = needs_.B || needs_.bias ? divide_up(columns_, kPanelColumns) : 0;
    run_tasks(
        a_panels + b_panels, threads_for(rows_ * ranks_.active * (depth_ + columns_)),
        [&](int64_t task) { task < a_panels ? sum_A(task) : sum_B(task - a_panels); }, done);
  }

 private:
  void allocate(int64_t blocks) {
    tail_rows_ = at::empty({needs_.x ? rows_ : 0, tail_depth_}, options_);
    left_A_ = at::zeros({needs_.A ? ranks_.active : 0, padded_rows_}, options_);
    // The last row is ones, by which G's column sums, ∂bias, come out beside ∂B.
    left_B_ = at::zeros({(needs_.B ? ranks_.active : 0) + (needs_.bias ? 1 : 0), padded_rows_}, options_);
    if (needs_.bias) {
      left_B_.select(0, left_B_.size(0) - 1).fill_(1.0);
    }
    gate_sums_.assign(static_cast<size_t>(needs_.gate ? blocks * ranks_.live() : 0), 0.0f);
  }

  // B and A of the live ranks as right operands; fp32 factors with every rank in place are read as they lie.
  void pack_factors(bool expands) {
    const auto& index = ranks_.index;
    const int64_t live = ranks_.live();
    bool in_place = std::is_same_v<scalar_t, float>;
    for (int64_t i = 0; i < live; ++i) {
      in_place = in_place && index[i] == i;
    }
    right_B_ = b_;
    right_B_stride_ = r_;
    right_A_ = a_;
    right_A_stride_ = depth_;
    if (in_place) {
      return;
    }
    if (expands) {
      packed_B_ = at::empty({padded_columns_ * live}, options_);
      pack_operand<false>(
          b_, columns_, live, live, group_, [&](int64_t d) { return d * r_; }, [&](int64_t w) { return index[w]; },
          packed_B_.template data_ptr<scalar_t>());
      right_B_ = packed_B_.template const_data_ptr<scalar_t>();
      right_B_stride_ = live;
    }
    if (needs_.x) {
      packed_A_ = at::empty({tail_depth_ * depth_}, options_);
      pack_operand<false>(
          a_, ranks_.active, depth_, depth_, group_, [&](int64_t d) { return index[d] * depth_; },
          [](int64_t w) { return w; }, packed_A_.template data_ptr<scalar_t>());
      right_A_ = packed_A_.template const_data_ptr<scalar_t>();
    }
  }

  int64_t block_rows(int64_t block) const {
    return std::min(kRowBlock, rows_ - block * kRowBlock);
  }

  // H of a row block, what ∂gate takes from it, and the gated copies of H and S that the later products read.
  void expand_rows(int64_t block, bool expands) {
    const int64_t first = block * kRowBlock, count = block_rows(block), live = ranks_.live();
    const auto* const factor = ranks_.factor.data();
    if (needs_.B) {
      auto* const to = left_B_.template data_ptr<scalar_t>();
      for (int64_t i = 0; i < ranks_.active; ++i) {
        for (int64_t row = first; row < first + count; ++row) {
          to[i * padded_rows_ + row] =
              static_cast<scalar_t>(static_cast<float>(shrink_[row * r_ + ranks_.index[i]]) * factor[i]);
        }
      }
    }
    if (!expands || live == 0) {
      return;
    }
    auto* const products = thread_scratch<float, Scratch::Products>(count * live);
    const auto grads = padded_rows<scalar_t, Scratch::Rows>(grads_, first, count, columns_, padded_columns_);
    if (!matmul_steps(
            count, live, padded_columns_, grads.data, grads.stride, right_B_, right_B_stride_, products, live, false,
            group_)) {
      std::fill(products, products + count * live, 0.0f);
    }
    if (needs_.gate) {
      float* const to = gate_sums_.data() + block * live;
      for (int64_t row = 0; row < count; ++row) {
        for (int64_t i = 0; i < live; ++i) {
          to[i] += static_cast<float>(shrink_[(first + row) * r_ + ranks_.index[i]]) * products[row * live + i];
        }
      }
    }
    if (needs_.A) {
      auto* const to = left_A_.template data_ptr<scalar_t>();
      for (int64_t i = 0; i < ranks_.active; ++i) {
        for (int64_t row = 0; row < count; ++row) {
          to[i * padded_rows_ + first + row] = static_cast<scalar_t>(products[row * live + i] * factor[i]);
        }
      }
    }
    if (needs_.x) {
      auto* const to = tail_rows_.template data_ptr<scalar_t>() + first * tail_depth_;
      for (int64_t row = 0; row < count; ++row) {
        for (int64_t i = 0; i < tail_depth_; ++i) {
          const float value = i < ranks_.active ? products[row * live + i] * factor[i] : 0.0f;
          to[row * tail_depth_ + i] = static_cast<scalar_t>(value);
        }
      }
    }
  }

  // ∂x: the adapter's share first, since dropout's mask falls on it alone.
  void input_tiles(int64_t block, int64_t first_panel, int64_t end_panel) {
    if (!needs_.x) {
      return;
    }
    const int64_t first = block * kRowBlock, count = block_rows(block);
    const auto grads = padded_rows<scalar_t, Scratch::PaddedRows>(grads_, first, count, columns_, padded_columns_);
    const auto* const packed = pack_.template const_data_ptr<scalar_t>();
    const auto* const tail = tail_rows_.template const_data_ptr<scalar_t>() + first * tail_depth_;
    for (int64_t panel = first_panel; panel < end_panel; ++panel) {
      const int64_t column = panel * kPanelColumns;
      const int64_t width = std::min(kPanelColumns, depth_ - column);
      const OutputTile<scalar_t> tile(grad_x_ + first * depth_ + column, depth_, count, width);
      bool accumulate = false;
      if (tail_depth_ > 0) {
        matmul(
            count, width, tail_depth_, tail, tail_depth_, right_A_ + column * group_, right_A_stride_, tile.sums(),
            tile.stride(), false, group_);
        accumulate = true;
        for (int64_t row = 0; dropout_ && row < count; ++row) {
          float* const sums = tile.sums() + row * tile.stride();
          dropout_.apply((first + row) * depth_ + column, width, sums, sums);
        }
      }
      accumulate = matmul_steps(
          count, width, padded_columns_, grads.data, grads.stride, packed + panel * padded_columns_ * kPanelColumns,
          kPanelColumns, tile.sums(), tile.stride(), accumulate, group_);
      if (!accumulate) {
        tile.clear();
      }
      tile.store();
    }
  }

  // sums (left_rows x width) = left (left_rows x rows) · columns [column, column + width) of `from`, dropped if asked.
  float* sum_rows(
      const at::Tensor& left, const LeftRows<scalar_t>& from, int64_t column, int64_t width, bool dropped) const {
    const int64_t left_count = left.size(0);
    const auto* const left_data = left.template const_data_ptr<scalar_t>();
    float* const sums = thread_scratch<float, Scratch::Tile>(left_count * width);
    if (rows_ == 0) {
      std::fill(sums, sums + left_count * width, 0.0f);
    }
    for (int64_t first = 0; first < rows_; first += kSumRows) {
      const int64_t count = std::min(kSumRows, rows_ - first);
      const scalar_t* right = from.data + first * from.stride + column;
      int64_t stride = from.stride;
      if (dropped) {
        auto* const copy = thread_scratch<scalar_t, Scratch::Rows>(count * width);
        for (int64_t row = 0; row < count; ++row) {
          dropout_.apply((first + row) * depth_ + column, width, right + row * stride, copy + row * width);
        }
        right = copy;
        stride = width;
      }
      if (group_ > 1) {
        auto* const pairs = thread_scratch<scalar_t, Scratch::PaddedRows>(round_up(count, group_) * width);
        pack_operand<false>(
            right, count, width, width, group_, [stride](int64_t d) { return d * stride; },
            [](int64_t w) { return w; }, pairs);
        right = pairs;
        stride = width;
      }
      matmul(
          left_count, width, round_up(count, group_), left_data + first, padded_rows_, right, stride, sums, width,
          first > 0, group_);
    }
    return sums;
  }

  void sum_A(int64_t panel) {
    const int64_t column = panel * kPanelColumns, width = std::min(kPanelColumns, depth_ - column);
    if (ranks_.active == 0) {
      return;
    }
    const float* const sums = sum_rows(left_A_, x_, column, width, static_cast<bool>(dropout_));
    auto* const to = sums_.A.template data_ptr<float>() + column;
    for (int64_t i = 0; i < ranks_.active; ++i) {
      std::copy(sums + i * width, sums + (i + 1) * width, to + ranks_.index[i] * depth_);
    }
  }

  void sum_B(int64_t panel) {
    const int64_t column = panel * kPanelColumns, width = std::min(kPanelColumns, columns_ - column);
    const int64_t count = left_B_.size(0);
    if (count == 0) {
      return;
    }
    const float* const sums = sum_rows(left_B_, grads_, column, width, false);
    if (needs_.B) {
      auto* const to = sums_.B.template data_ptr<float>() + column * r_;
      for (int64_t w = 0; w < width; ++w) {
        for (int64_t i = 0; i < ranks_.active; ++i) {
          to[w * r_ + ranks_.index[i]] = sums[i * width + w];
        }
      }
    }
    if (needs_.bias) {
      const float* const last = sums + (count - 1) * width;
      std::copy(last, last + width, sums_.bias.template data_ptr<float>() + column);
    }
  }

  void sum_gate(int64_t blocks) {
    if (!needs_.gate) {
      return;
    }
    auto* const to = sums_.gate.template data_ptr<float>();
    for (int64_t i = 0; i < ranks_.live(); ++i) {
      double sum = 0.0;
      for (int64_t block = 0; block < blocks; ++block) {
        sum += gate_sums_[static_cast<size_t>(block * ranks_.live() + i)];
      }
      to[ranks_.index[i]] = static_cast<float>(sum * ranks_.scaling);
    }
  }

  LeftRows<scalar_t> grads_;
  LeftRows<scalar_t> x_{nullptr, 0};
  int64_t rows_, columns_, depth_;
  const scalar_t *a_, *b_;
  int64_t r_;
  const LiveRanks& ranks_;
  const Dropout& dropout_;
  Needs needs_;
  Sums& sums_;
  int64_t group_, padded_columns_, padded_rows_, tail_depth_;
  at::TensorOptions options_;
  const scalar_t* shrink_ = nullptr;
  scalar_t* grad_x_ = nullptr;
  at::Tensor pack_, packed_A_, packed_B_, tail_rows_, left_A_, left_B_;
  const scalar_t *right_A_ = nullptr, *right_B_ = nullptr;
  int64_t right_A_stride_ = 0, right_B_stride_ = 0;
  std::vector<float> gate_sums_;
};

} // namespace

Gradients lora_linear_backward(
    const at::Tensor& grad_y, const std::optional<at::Tensor>& x, const at::Tensor& weight, const at::Tensor& lora_A,
    const at::Tensor& lora_B, const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& shrink,
    const std::optional<at::Tensor>& gate, const std::optional<at::Tensor>& /*rank_state*/,
    const std::optional<at::Tensor>& rank_order, const std::optional<at::Tensor>& rank_counts, double scaling,
    const std::optional<at::Tensor>& scaling_tensor, double dropout_p, const std::optional<at::Tensor>& dropout_seed,
    std::array<bool, 6> needs) {
  const auto dtype = grad_y.scalar_type();
  const int64_t r = lora_A.size(0);
  TORCH_CHECK(!needs[1], "lora_linear_bwd.cpu: the weight's gradient was asked for; this kernel serves frozen weights");
  const Needs wanted{needs[0], needs[2], needs[3], needs[4], needs[5]};

  const auto grads = as_rows(grad_y, weight.size(0));
  const auto rows = x ? as_rows(*x, weight.size(1)) : at::Tensor();
  const auto ranks = live_ranks(r, gate, rank_order, rank_counts, scaling, scaling_tensor, wanted.gate);
  const auto dropout = dropout_of(dropout_p, dropout_seed);
  const auto factor_A = lora_A.to(dtype).contiguous();
  const auto factor_B = lora_B.to(dtype).contiguous();
  const auto shrink_rows = shrink ? shrink->contiguous() : at::Tensor();

  auto shape = grad_y.sizes().vec();
  shape.back() = weight.size(1);
  auto grad_x = wanted.x ? at::empty(shape, grad_y.options()) : at::empty({0}, grad_y.options());
  const auto sums_options = grad_y.options().dtype(at::kFloat);
  const auto sums_like = [&](bool wanted_one, const at::Tensor& like, bool every_element) {
    const auto sizes = wanted_one ? like.sizes().vec() : std::vector<int64_t>{0};
    return every_element ? at::empty(sizes, sums_options) : at::zeros(sizes, sums_options);
  };
  const auto& gate_like = gate ? *gate : lora_A;
  const auto& bias_like = bias ? *bias : grad_y;
  Sums sums{
      sums_like(wanted.A, lora_A, ranks.active == r), sums_like(wanted.B, lora_B, ranks.active == r),
      sums_like(wanted.bias, bias_like, true), sums_like(wanted.gate, gate_like, ranks.live() == r)};

  AT_DISPATCH_SWITCH(
      dtype, "lora_linear_bwd.cpu",
      AT_DISPATCH_CASE(at::kFloat, [&] { Backward<float>(grads, rows, weight, factor_A, factor_B, shrink_rows, ranks, dropout, wanted, grad_x, sums).run(); })
      AT_DISPATCH_CASE(at::kBFloat16, [&] { Backward<at::BFloat16>(grads, rows, weight, factor_A, factor_B, shrink_rows, ranks, dropout, wanted, grad_x, sums).run(); })
      AT_DISPATCH_CASE(at::kHalf, [&] { Backward<at::Half>(grads, rows, weight, factor_A, factor_B, shrink_rows, ranks, dropout, wanted, grad_x, sums).run(); }));
  return {
      grad_x,
      at::empty({0}, weight.options()),
      sums.A.to(lora_A.scalar_type()),
      sums.B.to(lora_B.scalar_type()),
      sums.bias.to(bias_like.scalar_type()),
      sums.gate.to(gate_like.scalar_type())};
}

} // namespace peftkernels::cpu
