// lora_shrink.cpu: S = x·Aᵀ of several adapters in one pass over x, their ranks side by side.
#include <ATen/Dispatch.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>

#include <vector>

#include "cpu/gemm/product.h"
#include "cpu/gemm/scratch.h"
#include "kernels.h"
#include "operands.h"
#include "row_blocks.h"

namespace peftkernels::cpu {
namespace {

template <typename scalar_t>
void shrink_all(const at::Tensor& x, const at::Tensor& factors, at::Tensor& shrink) {
  const int64_t M = x.size(0), K = x.size(1), ranks = factors.size(0);
  const auto left = left_rows<scalar_t>(x);
  auto* const operand = thread_scratch<scalar_t, Scratch::ShrinkOperand>(round_up(K, depth_group<scalar_t>()) * ranks);
  pack_from_rows(factors.const_data_ptr<scalar_t>(), K, ranks, K, operand, ranks);
  auto* const to = shrink.data_ptr<scalar_t>();
  const int64_t threads = threads_for(M * K * ranks);
  const int64_t size = round_up(std::min(kRowBlock, divide_up(M, threads)), kRowShare);
  run_tasks(
      divide_up(M, size), threads,
      [&](int64_t task) {
        const int64_t begin = task * size, count = std::min(size, M - begin);
        multiply_rounded(
            Product<scalar_t>{count, ranks, K, left.data + begin * left.stride, left.stride, operand, ranks},
            to + begin * ranks, ranks);
      },
      [] { release_kernels<scalar_t>(); });
}

} // namespace

at::Tensor lora_shrink(const at::Tensor& x, at::TensorList lora_A) {
  const auto dtype = x.scalar_type();
  const auto rows = as_rows(x, x.size(-1));
  std::vector<at::Tensor> parts;
  parts.reserve(lora_A.size());
  for (const auto& factor : lora_A) {
    parts.push_back(factor.to(dtype));
  }
  const auto factors = at::cat(parts).contiguous();
  auto shrink = at::empty({rows->size(0), factors.size(0)}, x.options());
  if (shrink.numel() == 0) {
    return shrink;
  }
  AT_DISPATCH_SWITCH(
      dtype, "lora_shrink.cpu", AT_DISPATCH_CASE(at::kFloat, [&] { shrink_all<float>(*rows, factors, shrink); })
      AT_DISPATCH_CASE(at::kBFloat16, [&] { shrink_all<at::BFloat16>(*rows, factors, shrink); }));
  return shrink;
}

} // namespace peftkernels::cpu
