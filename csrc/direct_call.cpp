#include "direct_call.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/randint.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <limits>
#include <optional>
#include <utility>

#include "cpu/autograd.h"
#include "cpu/check_call.h"
#include "cpu/pack_cache.h"

namespace peftkernels {
namespace {

class DtypeSet {
 public:
  DtypeSet() = default;
  explicit DtypeSet(const std::vector<at::ScalarType>& dtypes) {
    for (const auto dtype : dtypes) {
      bits_ |= bit(dtype);
    }
  }

  bool contains(at::ScalarType dtype) const {
    return (bits_ & bit(dtype)) != 0;
  }

 private:
  static uint64_t bit(at::ScalarType dtype) {
    static_assert(static_cast<unsigned>(at::ScalarType::NumOptions) <= 64, "one bit for each dtype");
    return uint64_t{1} << static_cast<unsigned>(dtype);
  }

  uint64_t bits_ = 0;
};

struct Served {
  DtypeSet automatic, named;
  PyTypeObject* rank_plan = nullptr;
};

Served served;

bool contains(c10::DispatchKeySet all, c10::DispatchKeySet some) {
  return (some.raw_repr() & ~all.raw_repr()) == 0;
}

// No mode of Python's, no functorch transform, no tracer and no autocast is at work: they all say so in the thread's
// dispatch keys, but for modes that override Python functions.
bool plain_thread() {
  const auto keys = c10::impl::tls_local_dispatch_key_set();
  constexpr auto may_be_excluded = c10::default_excluded_set | c10::autograd_dispatch_keyset_with_ADInplaceOrView;
  return contains(c10::default_included_set, keys.included_) && contains(may_be_excluded, keys.excluded_) &&
      keys.excluded_.has(c10::DispatchKey::AutocastCPU) && !at::impl::torch_function_mode_enabled();
}

// A dense tensor on the CPU that nobody intercepts: of no subclass, wrapped by nothing, without a forward gradient.
std::optional<at::Tensor> plain_tensor(PyObject* object) {
  if (!THPVariable_CheckExact(object)) {
    return std::nullopt;
  }
  const at::Tensor& tensor = THPVariable_Unpack(object);
  constexpr c10::DispatchKeySet plain(
      {c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU, c10::DispatchKey::ADInplaceOrView,
       c10::DispatchKey::AutocastCPU});
  if (!contains(plain, tensor.key_set()) || tensor._fw_grad(0).defined()) {
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

// Each of the following reads arguments into `call`, and says whether the call may be served with them.

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

bool read_rank_plan(PyObject* plan, cpu::Call* call) {
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
  return read(state, &call->rank_state) && read(order, &call->rank_order) && read(counts, &call->rank_counts);
}

bool read_scaling(PyObject* scaling, cpu::Call* call) {
  if (const auto value = number(scaling)) {
    call->scaling = *value;
    return true;
  }
  call->scaling_tensor = plain_tensor(scaling);
  return call->scaling_tensor.has_value();
}

bool read_dropout_p(PyObject* p, cpu::Call* call) {
  const auto probability = number(p);
  call->dropout_p = probability.value_or(0.0);
  return probability.has_value();
}

// What the public function asks beyond what the operators ask, which is asked here too: an error is Python's to raise.
bool fits(const cpu::Call& call) {
  const cpu::CallRecord record{
      &call.x, nullptr, &call.weight, &call.lora_A, &call.lora_B, cpu::or_null(call.bias), cpu::or_null(call.gate),
      cpu::or_null(call.rank_state), cpu::or_null(call.rank_order), cpu::or_null(call.rank_counts),
      cpu::or_null(call.scaling_tensor), call.dropout_p, nullptr, cpu::or_null(call.given_shrink), true};
  const auto dtype = call.x.scalar_type();
  return call.weight.scalar_type() == dtype && (!call.bias || call.bias->scalar_type() == dtype) &&
      !call.weight.requires_grad() && !(call.scaling_tensor && call.scaling_tensor->requires_grad()) &&
      !(call.given_shrink && call.given_shrink->requires_grad()) && cpu::check_call<cpu::OnFault::Decline>(record);
}

// Makes or draws the seed as the Python function does, and so comes last: nothing may be drawn for a declined call.
bool read_seed(PyObject* seed, cpu::Call* call) {
  const bool drops = call->dropout_p > 0.0;
  if (seed == Py_None) {
    if (drops) {
      call->dropout_seed = at::randint(std::numeric_limits<int64_t>::max(), {}, at::kLong);
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
      call->dropout_seed = at::empty({}, at::kLong);
      *call->dropout_seed->mutable_data_ptr<int64_t>() = value;
    }
    return true;
  }
  auto tensor = plain_tensor(seed);
  if (!tensor || tensor->dim() != 0 || tensor->scalar_type() != at::kLong) {
    return false;
  }
  if (drops) {
    call->dropout_seed = std::move(tensor);
  }
  return true;
}

// The dtypes of x that are served for this `impl`; null where that is for Python to say: for other names, and for
// "auto" while packs are not kept. What it makes of a weight whose packs were refused, `read` asks.
const DtypeSet* dtypes_for(PyObject* impl) {
  if (!PyUnicode_CheckExact(impl)) {
    return nullptr;
  }
  if (PyUnicode_CompareWithASCIIString(impl, "auto") == 0) {
    return cpu::pack_mode() == cpu::PackMode::Off ? nullptr : &served.automatic;
  }
  return PyUnicode_CompareWithASCIIString(impl, "cpu") == 0 ? &served.named : nullptr;
}

bool read(PyObject* const* arguments, cpu::Call* call) {
  const DtypeSet* const dtypes = dtypes_for(arguments[11]);
  return dtypes != nullptr && plain_thread() && read_tensor(arguments[0], &call->x) &&
      dtypes->contains(call->x.scalar_type()) && read_tensor(arguments[1], &call->weight) &&
      read_tensor(arguments[2], &call->lora_A) && read_tensor(arguments[3], &call->lora_B) &&
      read_optional_tensor(arguments[4], &call->bias) && read_optional_tensor(arguments[5], &call->gate) &&
      read_rank_plan(arguments[6], call) && read_scaling(arguments[7], call) && read_dropout_p(arguments[8], call) &&
      read_optional_tensor(arguments[10], &call->given_shrink) && fits(*call) &&
      (dtypes != &served.automatic || !cpu::is_refused(call->weight)) && read_seed(arguments[9], call);
}

PyObject* direct_call(PyObject* /*self*/, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 12, "direct call: found ", count, " arguments, expected 12");
  cpu::Call call;
  if (!read(arguments, &call)) {
    Py_RETURN_NONE;
  }
  at::Tensor y;
  {
    const py::gil_scoped_release released;
    y = cpu::lora_linear(call);
  }
  return THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
}

py::object tensor_or_none(const at::Tensor& tensor) {
  return tensor.defined() ? py::cast(tensor) : py::none();
}

// Calls Python's `composition.second_derivatives`.
std::vector<at::Tensor> call_second_derivatives(
    PyObject* function, const std::array<at::Tensor, 6>& grads, const cpu::Arguments& arguments,
    const cpu::BackwardPass& pass) {
  const py::gil_scoped_acquire locked;
  py::list weights, asked;
  for (const auto& grad : grads) {
    weights.append(tensor_or_none(grad));
  }
  for (const auto& argument : arguments) {
    asked.append(argument.defined() && argument.requires_grad());
  }
  const auto scaling = pass.scaling_tensor.defined() ? py::cast(pass.scaling_tensor) : py::cast(pass.scaling);
  const auto constants =
      py::make_tuple(tensor_or_none(pass.state), scaling, pass.dropout_p, tensor_or_none(pass.seed));
  const py::list found = py::reinterpret_borrow<py::object>(function)(
      weights, tensor_or_none(arguments[0]), tensor_or_none(arguments[1]), tensor_or_none(arguments[2]),
      tensor_or_none(arguments[3]), tensor_or_none(arguments[4]), tensor_or_none(pass.bias),
      tensor_or_none(arguments[5]), tensor_or_none(pass.shrink), constants, py::cast(pass.needs), asked, pass.x_left_out);
  std::vector<at::Tensor> derivatives;
  for (const auto& derivative : found) {
    derivatives.push_back(derivative.is_none() ? at::Tensor() : derivative.cast<at::Tensor>());
  }
  return derivatives;
}

} // namespace

void set_direct_call(
    const std::vector<at::ScalarType>& automatic, const std::vector<at::ScalarType>& named, PyObject* rank_plan,
    PyObject* second_derivatives) {
  TORCH_CHECK_TYPE(PyType_Check(rank_plan), "rank_plan: expected the class RankPlan");
  Py_INCREF(rank_plan);
  Py_XDECREF(reinterpret_cast<PyObject*>(served.rank_plan));
  served = {DtypeSet(automatic), DtypeSet(named), reinterpret_cast<PyTypeObject*>(rank_plan)};
  // Never released: threads may run a backward pass while the interpreter goes down.
  Py_INCREF(second_derivatives);
  cpu::set_second_derivatives(
      [second_derivatives](const auto& grads, const auto& arguments, const auto& pass) {
        return call_second_derivatives(second_derivatives, grads, arguments, pass);
      });
}

PyObject* make_direct_call() {
  static PyMethodDef method{
      "direct_call", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&direct_call)), METH_FASTCALL,
      "y of a plain call of lora_linear on the C++ kernels, or None with nothing done"};
  return PyCFunction_New(&method, nullptr);
}

} // namespace peftkernels
