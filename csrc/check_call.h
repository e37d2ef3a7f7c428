// What the operators ask of their arguments before anything is computed: everything that is reachable from Python is
// served or raises. `peftkernels/ops/checks.py` says the same for the operators that are written in Python.
#pragma once

#include <ATen/core/Tensor.h>

#include "backend.h"
#include "call.h"
#include "check_tensor.h"

namespace peftkernels {

// Raises for the first argument that does not fit the others, or returns true if all do. `draws_seed`: a dropout seed
// that is not there will be made.
template <OnFault fault>
bool check(const Forward& call, const Backend& backend, bool draws_seed = false);

// Raise.
void check(const Backward& call, const Backend& backend);
void check_shrink(const at::Tensor& x, at::TensorList lora_A, const Backend& backend);

} // namespace peftkernels
