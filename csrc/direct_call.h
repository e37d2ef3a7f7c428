// `lora_linear` for the plainest of calls, from Python's arguments to the C++ kernels without Python code in between.
#pragma once

#include <Python.h>
#include <c10/core/ScalarType.h>

#include <vector>

namespace peftkernels {

// What `peftkernels.dispatch` decided once for the process: the dtypes of x in which the C++ kernels serve impl="auto"
// and impl="cpu", for x on the CPU and a frozen weight. `rank_plan` is the class RankPlan, `second_derivatives` the function
// of `peftkernels.composition`.
void set_direct_call(
    const std::vector<at::ScalarType>& automatic, const std::vector<at::ScalarType>& named, PyObject* rank_plan,
    PyObject* second_derivatives);

// The callable `(x, weight, lora_A, lora_B, bias, gate, rank_plan, scaling, dropout_p, dropout_seed, shrink, impl)`: y,
// or None with nothing done where the call is not for the C++ kernels, an argument is wrong, or anything but plain tensors and
// plain autograd is at work: then the Python function checks, chooses, computes or raises. New reference.
PyObject* make_direct_call();

} // namespace peftkernels
