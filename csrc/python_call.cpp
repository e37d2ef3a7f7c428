#include "python_call.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/randint.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <limits>
#include <optional>
#include <utility>

#include "autograd.h"
#include "call.h"
#include "check_call.h"
#include "dtype_set.h"
#include "plain.h"

namespace peftkernels {
namespace {

struct Served {
  const Backend* backend = nullptr;
  DtypeSet automatic;
  PyTypeObject* rank_plan = nullptr;
};

Served served;

// A plain tensor without a forward gradient.
std::optional<at::Tensor> plain_tensor(PyObject* object) {
  if (!THPVariable_CheckExact(object)) {
    return std::nullopt;
  }
  const at::Tensor& tensor = THPVariable_Unpack(object);
  if (!is_plain(tensor, *served.backend) || tensor._fw_grad(0).defined()) {
    return std::nullopt;
  }
  return tensor;
}

// The value of a float or an int that is neither a bool nor of another subclass.
std::optional<double> number(PyObject* object) {
  if (PyFloat_CheckExact(object)) {
    return PyFloat_AS_DOUBLE(object);
  }
  if (!PyLong_CheckExact(object)) {
    return std::nullopt;
  }
  const double value = PyLong_AsDouble(object);
  if (value == -1.0 && PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    return std::nullopt;
  }
  return value;
}

// Each of the following reads arguments into a record, and returns true if the call may be served with them.

bool read_optional_tensor(PyObject* object, std::optional<at::Tensor>* to) {
  if (object != Py_None) {
    *to = plain_tensor(object);
    return to->has_value();
  }
  return true;
}

bool read_tensor(PyObject* object, at::Tensor* to) {
  auto tensor = plain_tensor(object);
  if (!tensor) {
    return false;
  }
  *to = *std::move(tensor);
  return true;
}

bool read_rank_plan(PyObject* plan, Ranks* to) {
  if (plan == Py_None) {
    return true;
  }
  if (Py_TYPE(plan) != served.rank_plan) {
    return false;
  }
  const auto read = [plan](PyObject* name, std::optional<at::Tensor>* to) {
    const auto value = py::reinterpret_steal<py::object>(PyObject_GetAttr(plan, name));
    if (!value) {
      PyErr_Clear();
      return false;
    }
    *to = plain_tensor(value.ptr());
    return to->has_value();
  };
  static PyObject* const state = PyUnicode_InternFromString("state");
  static PyObject* const order = PyUnicode_InternFromString("order");
  static PyObject* const counts = PyUnicode_InternFromString("counts");
  return read(state, &to->state) && read(order, &to->order) && read(counts, &to->counts);
}

bool read_scaling(PyObject* scaling, Adapter* to) {
  if (const auto value = number(scaling)) {
    to->scaling = *value;
    return true;
  }
  to->scaling_tensor = plain_tensor(scaling);
  return to->scaling_tensor.has_value();
}

bool read_dropout_p(PyObject* p, Adapter* to) {
  const auto probability = number(p);
  to->dropout_p = probability.value_or(0.0);
  return probability.has_value();
}

// What the public function asks beyond what the operators ask, which is asked here too: an error is Python's to raise.
bool fits(const Forward& call) {
  const auto requires_grad = [](const OptionalTensor& tensor) { return tensor && tensor->requires_grad(); };
  const auto dtype = call.x.scalar_type();
  return call.weight.dense.scalar_type() == dtype && (!call.bias || call.bias->scalar_type() == dtype) &&
      !call.weight.dense.requires_grad() && !requires_grad(call.adapter.scaling_tensor) &&
      !requires_grad(call.shrink) && check<OnFault::Decline>(call, *served.backend, /*draws_seed=*/true);
}

// Makes or draws the seed as the Python function does, and so comes last: nothing may be drawn for a declined call.
bool read_seed(PyObject* seed, Adapter* to) {
  const bool drops = to->dropout_p > 0.0;
  if (seed == Py_None) {
    if (drops) {
      to->dropout_seed = at::randint(std::numeric_limits<int64_t>::max(), {}, at::kLong);
    }
    return true;
  }
  if (PyLong_CheckExact(seed)) {
    int overflow = 0;
    const int64_t value = PyLong_AsLongLongAndOverflow(seed, &overflow);
    if (overflow != 0) {
      return false;
    }
    if (drops) {
      to->dropout_seed = at::empty({}, at::kLong);
      *to->dropout_seed->mutable_data_ptr<int64_t>() = value;
    }
    return true;
  }
  auto tensor = plain_tensor(seed);
  if (!tensor || tensor->dim() != 0 || tensor->scalar_type() != at::kLong || !is_backed(*tensor)) {
    return false;
  }
  if (drops) {
    to->dropout_seed = std::move(tensor);
  }
  return true;
}

enum class Choice { Automatic, Named, Other };

Choice choice_of(PyObject* impl) {
  const auto is = [impl](const char* name) { return PyUnicode_CompareWithASCIIString(impl, name) == 0; };
  if (!PyUnicode_CheckExact(impl)) {
    return Choice::Other;
  }
  return is("auto") ? Choice::Automatic : is(served.backend->name) ? Choice::Named : Choice::Other;
}

// Of the arguments of the Python function, in the order of `arguments`.
bool read(PyObject* const* arguments, Forward* call) {
  const auto choice = choice_of(arguments[11]);
  auto& adapter = call->adapter;
  return choice != Choice::Other && is_plain_thread(*served.backend) && !at::impl::torch_function_mode_enabled() &&
      read_tensor(arguments[0], &call->x) &&
      (choice == Choice::Automatic ? served.automatic : served.backend->dtypes).contains(call->x.scalar_type()) &&
      read_tensor(arguments[1], &call->weight.dense) && read_tensor(arguments[2], &adapter.A) &&
      read_tensor(arguments[3], &adapter.B) && read_optional_tensor(arguments[4], &call->bias) &&
      read_optional_tensor(arguments[5], &adapter.gate) && read_rank_plan(arguments[6], &adapter.ranks) &&
      read_scaling(arguments[7], &adapter) && read_dropout_p(arguments[8], &adapter) &&
      read_optional_tensor(arguments[10], &call->shrink) && fits(*call) &&
      (choice == Choice::Named || served.backend->is_automatic(*call)) && read_seed(arguments[9], &adapter);
}

PyObject* direct_call(PyObject* /*self*/, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 12, "direct call: found ", count, " arguments, expected 12");
  Forward call;
  if (!read(arguments, &call)) {
    Py_RETURN_NONE;
  }
  at::Tensor y;
  {
    // The record outlives this: to let go of a tensor that is Python's too takes Python's lock.
    const py::gil_scoped_release released;
    y = lora_linear(call, *served.backend);
  }
  return THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
}

py::object tensor_or_none(const at::Tensor& tensor) {
  return tensor.defined() ? py::cast(tensor) : py::none();
}

// Calls Python's `composition.second_derivatives`.
std::vector<at::Tensor> call_second_derivatives(
    PyObject* function, const Gradients& grads, const Backward& call, bool x_left_out) {
  const py::gil_scoped_acquire locked;
  py::list weights, asked;
  for (const auto& grad : grads) {
    weights.append(tensor_or_none(grad));
  }
  for (const auto& input : inputs_of(call)) {
    asked.append(input.defined() && input.requires_grad());
  }
  const auto arguments =
      std::apply([](const auto&... argument) { return py::make_tuple(argument...); }, Backward::arguments(call));
  const py::list found = py::reinterpret_borrow<py::object>(function)(weights, arguments, asked, x_left_out);
  std::vector<at::Tensor> derivatives;
  for (const auto& derivative : found) {
    derivatives.push_back(derivative.is_none() ? at::Tensor() : derivative.cast<at::Tensor>());
  }
  return derivatives;
}

} // namespace

void set_direct_call(
    const Backend& backend, const std::vector<at::ScalarType>& automatic, PyObject* rank_plan,
    PyObject* second_derivatives) {
  TORCH_CHECK_TYPE(PyType_Check(rank_plan), "rank_plan: expected the class RankPlan");
  Py_INCREF(rank_plan);
  Py_XDECREF(reinterpret_cast<PyObject*>(served.rank_plan));
  served = {&backend, DtypeSet(automatic), reinterpret_cast<PyTypeObject*>(rank_plan)};
  // Never released: threads may run a backward pass while the interpreter goes down.
  Py_INCREF(second_derivatives);
  set_second_derivatives([second_derivatives](const Gradients& grads, const Backward& call, bool x_left_out) {
    return call_second_derivatives(second_derivatives, grads, call, x_left_out);
  });
}

PyObject* make_direct_call() {
  static PyMethodDef method{
      "direct_call", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&direct_call)), METH_FASTCALL,
      "y of a plain call of lora_linear on the C++ kernels, or None with nothing done"};
  return PyCFunction_New(&method, nullptr);
}

} // namespace peftkernels
