// Where the fp32 sums of the backward pass become gradients.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstdint>

#include "cpu/gemm/rows.h"

namespace peftkernels::cpu {

// A gradient in its parameter's dtype, whatever the dtype of computation; undefined where it is not needed.
class Gradient {
 public:
  // Where not every element will be written, the others must read as zero.
  Gradient(bool needed, const at::Tensor& like, bool writes_all) {
    if (needed) {
      tensor_ = writes_all ? at::empty(like.sizes(), like.options()) : at::zeros(like.sizes(), like.options());
    }
  }

  // Elements [first, first + count) from fp32 sums, each rounded once.
  void write(int64_t first, int64_t count, const float* sums) {
    switch (tensor_.scalar_type()) {
      case at::kFloat:
        convert_row(sums, count, tensor_.data_ptr<float>() + first);
        break;
      case at::kBFloat16:
        convert_row(sums, count, tensor_.data_ptr<at::BFloat16>() + first);
        break;
      case at::kHalf:
        convert_row(sums, count, tensor_.data_ptr<at::Half>() + first);
        break;
      default:
        std::copy(sums, sums + count, tensor_.data_ptr<double>() + first);
    }
  }

  const at::Tensor& tensor() const {
    return tensor_;
  }

 private:
  at::Tensor tensor_;
};

} // namespace peftkernels::cpu
