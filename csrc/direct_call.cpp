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

#include <initializer_list>
#include <limits>
#include <optional>
#include <utility>

#include "cpu/autograd.h"
#include "cpu/pack_cache.h"

namespace peftkernels {
namespace {

class DtypeSet {
 public:
  DtypeSet() = default;
  DtypeSet(std::initializer_list<at::ScalarType> dtypes) : DtypeSet(std::vector<at::ScalarType>(dtypes)) {}
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

bool floating(const at::Tensor& tensor) {
  static const DtypeSet floats{at::kFloat, at::kBFloat16, at::kHalf, at::kDouble};
  return floats.contains(tensor.scalar_type());
}

bool has_shape(const at::Tensor& tensor, at::IntArrayRef shape) {
  return tensor.sizes() == shape;
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

bool read_matrices(PyObject* const* arguments, cpu::Call* call) {
  auto x = plain_tensor(arguments[0]), weight = plain_tensor(arguments[1]);
  auto lora_A = plain_tensor(arguments[2]), lora_B = plain_tensor(arguments[3]);
  if (!x || !weight || !lora_A || !lora_B || x->dim() == 0 || weight->dim() != 2 || lora_A->dim() != 2) {
    return false;
  }
  const int64_t n = weight->size(0), k = weight->size(1), r = lora_A->size(0);
  const bool fits = x->size(-1) == k && lora_A->size(1) == k && has_shape(*lora_B, {n, r}) &&
      weight->scalar_type() == x->scalar_type() && floating(*lora_A) &&
      lora_B->scalar_type() == lora_A->scalar_type() && !weight->requires_grad();
  if (!fits) {
    return false;
  }
  call->x = *std::move(x);
  call->weight = *std::move(weight);
  call->lora_A = *std::move(lora_A);
  call->lora_B = *std::move(lora_B);
  return true;
}

bool read_bias_and_gate(PyObject* bias, PyObject* gate, cpu::Call* call) {
  if (!read_optional_tensor(bias, &call->bias) || !read_optional_tensor(gate, &call->gate)) {
    return false;
  }
  const int64_t n = call->weight.size(0), r = call->lora_A.size(0);
  if (call->bias && !(has_shape(*call->bias, {n}) && call->bias->scalar_type() == call->x.scalar_type())) {
    return false;
  }
  if (call->gate && !(floating(*call->gate) && (has_shape(*call->gate, {r}) || has_shape(*call->gate, {r, 1})))) {
    return false;
  }
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
  return read(state, &call->rank_state) && read(order, &call->rank_order) && read(counts, &call->rank_counts) &&
      call->rank_state->dim() > 0 && call->rank_state->size(0) == call->lora_A.size(0);
}

bool read_scaling(PyObject* scaling, cpu::Call* call) {
  if (const auto value = number(scaling)) {
    call->scaling = *value;
    return true;
  }
  call->scaling_tensor = plain_tensor(scaling);
  const auto& tensor = call->scaling_tensor;
  return tensor && tensor->dim() == 0 && floating(*tensor) && !tensor->requires_grad();
}

// S, where the caller has it already: in the dtype of computation and without a gradient.
bool read_shrink(PyObject* shrink, cpu::Call* call) {
  if (!read_optional_tensor(shrink, &call->given_shrink)) {
    return false;
  }
  const auto& given = call->given_shrink;
  if (!given) {
    return true;
  }
  int64_t rows = 1;
  for (int64_t dim = 0; dim + 1 < call->x.dim(); ++dim) {
    rows *= call->x.size(dim);
  }
  return has_shape(*given, {rows, call->lora_A.size(0)}) &&
      given->scalar_type() == call->x.scalar_type() && !given->requires_grad();
}

// Makes or draws the seed as the Python function does, and so comes last: nothing may be drawn for a declined call.
bool read_dropout(PyObject* p, PyObject* seed, cpu::Call* call) {
  const auto probability = number(p);
  if (!probability || !(*probability >= 0.0 && *probability <= 1.0)) {
    return false;
  }
  call->dropout_p = *probability;
  const bool drops = call->dropout_p > 0.0;
  if (drops && call->given_shrink) {
    return false;
  }
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
  return dtypes != nullptr && plain_thread() && read_matrices(arguments, call) &&
      dtypes->contains(call->x.scalar_type()) && (dtypes != &served.automatic || !cpu::is_refused(call->weight)) &&
      read_bias_and_gate(arguments[4], arguments[5], call) &&
      read_rank_plan(arguments[6], call) && read_scaling(arguments[7], call) &&
      read_shrink(arguments[10], call) && read_dropout(arguments[8], arguments[9], call);
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
    PyObject* function, const std::array<at::Tensor, 6>& grads, const std::vector<at::Tensor>& arguments,
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
      tensor_or_none(arguments[5]), tensor_or_none(pass.shrink), constants, py::cast(pass.needs), asked);
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
