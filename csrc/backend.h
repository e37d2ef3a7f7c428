// The kernels of one kind of device, as the code that serves every compiled backend reaches them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DispatchKeySet.h>

#include "call.h"
#include "dtype_set.h"

namespace peftkernels {

struct Backend {
  Outputs run(const Forward& call) const {
    return forward(call);
  }
  Gradients run(const Backward& call) const {
    return backward(call);
  }

  // Those of a dense tensor on its device that nobody intercepts: of no subclass, wrapped by nothing.
  constexpr c10::DispatchKeySet plain_keys() const {
    return c10::DispatchKeySet({key, autograd, c10::DispatchKey::ADInplaceOrView, autocast});
  }

  const char* name; // of the operators' overloads
  c10::DispatchKey key, autograd, autocast; // of tensors on its device
  DtypeSet dtypes; // of x: those it computes in
  // Of calls that were checked.
  Outputs (*forward)(const Forward&);
  Gradients (*backward)(const Backward&);
  at::Tensor (*shrink)(const at::Tensor& x, at::TensorList lora_A);
  // Return true if impl="auto" takes this backend for a call in a dtype that it takes automatically, without Python
  // being asked.
  bool (*is_automatic)(const Forward&);
};

// The backend of a tensor's device. Raises where there is none.
const Backend& backend_of(const at::Tensor& tensor);
// Makes it that of its device, for as long as the process lives.
void set_backend(const Backend& backend);

} // namespace peftkernels
