// What the parts of lora_linear_bwd.cpu share: what they read, and what the first leaves for the second.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "call.h"
#include "cpu/gemm/product.h"
#include "gradient.h"
#include "live_ranks.h"
#include "row_blocks.h"

namespace peftkernels::cpu {

// What a call reads: rows of G (M, N) and x (M, K) with unit column stride, factors as `readable_factor` gives them, S
// (M, r) contiguous. x and S are undefined where no gradient needs them.
struct BackwardOperands {
  // H = G·B is needed.
  bool expands() const {
    return ranks.live() > 0 && (needs[kX] || needs[kA] || needs[kGate]);
  }

  const at::Tensor &grad_y, &x, &weight, &A, &B, &shrink;
  const LiveRanks& ranks;
  const Dropout& dropout;
  const std::array<bool, kDifferentiable>& needs;
};

struct FactorGradients {
  Gradient A, B, bias, gate;
};

// Which elements of x dropout keeps: bits of shares of kRowShare rows, in the calling thread's scratch.
struct KeptBits {
  // Where the bits of a row begin, and which of them is the row's first.
  std::pair<const uint8_t*, int64_t> of_row(int64_t row, int64_t K) const {
    const int64_t share = row / kRowShare, first_row = share * kRowShare;
    return {bits + share * stride, Dropout::first_bit(first_row * K) + (row - first_row) * K};
  }

  uint8_t* bits = nullptr;
  int64_t stride = 0; // bytes of a share
};

// What the pass over rows leaves for the sums over them, in the calling thread's scratch.
template <typename scalar_t>
struct RowResults {
  const scalar_t* left_A = nullptr; // H ⊙ ĝ · scaling of the active ranks as left operand of ∂A
  const scalar_t* left_B = nullptr; // S of the active ranks as left operand of ∂B
  KeptBits kept;
  std::vector<float> gate; // each share's part of ∂gate, [share][live]
};

} // namespace peftkernels::cpu
