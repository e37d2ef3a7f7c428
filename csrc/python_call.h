// `lora_linear` for the plainest of calls, from Python's arguments to compiled kernels without Python code in between.
#pragma once

#include <Python.h>
#include <c10/core/ScalarType.h>

#include <vector>

#include "backend.h"

namespace peftkernels {

// What `peftkernels.backends.registry` decided for the process: the dtypes of x in which `backend` serves impl="auto",
// for x on its device and a frozen weight; by its name it serves all that it computes in. `rank_plan` is the class
// RankPlan, `second_derivatives` the function of `peftkernels.ops.composition`.
void set_direct_call(
    const Backend& backend, const std::vector<at::ScalarType>& automatic, PyObject* rank_plan,
    PyObject* second_derivatives);

// The callable `(x, weight, lora_A, lora_B, bias, gate, rank_plan, scaling, dropout_p, dropout_seed, shrink, impl)`: y,
// or None with nothing done where the call is not for the backend, an argument is wrong, or anything but plain tensors
// and plain autograd is at work: then the Python function checks, chooses, computes or raises. New reference.
PyObject* make_direct_call();

} // namespace peftkernels
