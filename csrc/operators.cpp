#include "operators.h"

#include <ATen/ops/empty.h>
#include <c10/core/TensorOptions.h>

#include <utility>

namespace peftkernels {
namespace {

const Backend* backends[at::COMPILE_TIME_MAX_DEVICE_TYPES] = {};

} // namespace

const Backend& backend_of(const at::Tensor& tensor) {
  const auto* const backend = backends[static_cast<size_t>(tensor.device().type())];
  TORCH_CHECK(backend != nullptr, "lora_linear: no compiled kernels serve tensors on ", tensor.device());
  return *backend;
}

void set_backend(const Backend& backend) {
  backends[static_cast<size_t>(c10::dispatchKeyToDeviceType(backend.key))] = &backend;
}

Forward::Results complete(const Forward& call, Outputs outputs) {
  if (!outputs.shrink.defined()) {
    outputs.shrink = at::empty({0, call.adapter.r()}, call.x.options());
  }
  return {std::move(outputs.y), std::move(outputs.shrink)};
}

Backward::Results complete(const Backward& call, Gradients gradients) {
  const at::Tensor* const likes[kDifferentiable]{
      &call.grad_y,
      &call.weight.dense,
      &call.adapter.A,
      &call.adapter.B,
      call.bias ? &*call.bias : &call.grad_y,
      call.adapter.gate ? &*call.adapter.gate : &call.adapter.A};
  for (size_t place = 0; place < kDifferentiable; ++place) {
    if (!gradients[place].defined()) {
      gradients[place] = at::empty({0}, likes[place]->options());
    }
  }
  return std::apply([](auto&... gradient) { return Backward::Results(std::move(gradient)...); }, gradients);
}

} // namespace peftkernels
