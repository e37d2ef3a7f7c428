// Registers the C++ operators with torch, and tells Python how the extension was built and what its pack cache holds.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <torch/version.h>

#include <string>
#include <vector>

#include "cpu/allocation/operators.h"
#include "cpu/cpu_backend.h"
#include "cpu/gemm/product.h"
#include "cpu/packs/memory.h"
#include "cpu/packs/pack_cache.h"
#include "fork.h"
#include "operators.h"
#include "python_call.h"

namespace py = pybind11;
using namespace peftkernels;

// The schemas are declared in peftkernels/ops/schemas.py and allocation.py, the first of which is imported first.
TORCH_LIBRARY_IMPL(peftkernels, CPU, m) {
  register_operators<cpu::backend>(m);
  m.impl("allocation_averages.cpu", cpu::update_averages);
  m.impl("allocation_scores.cpu", cpu::rank_scores);
  m.impl("allocation_mask.cpu", cpu::apply_mask);
  m.impl("allocation_orthogonality.cpu", cpu::orthogonality);
}

namespace {

py::dict build_facts() {
  py::dict facts;
  facts["torch"] = TORCH_VERSION;
#if defined(__clang__)
  facts["compiler"] = std::string("clang ") + __clang_version__;
#elif defined(__GNUC__)
  facts["compiler"] = std::string("gcc ") + __VERSION__;
#else
  facts["compiler"] = "unknown";
#endif
#if defined(_OPENMP)
  facts["openmp"] = true;
#else
  facts["openmp"] = false;
#endif
  facts["fp32_products"] = cpu::has_avx512_kernels<float>() ? "AVX-512" : "brgemm";
  facts["bf16_products"] = cpu::has_avx512_kernels<at::BFloat16>() ? "AVX-512" : "brgemm";
  // Without such instructions ATen's kernel is a slow loop, which the library's own matmul beats.
  facts["bf16_kernels"] = cpu::depth_group<at::BFloat16>() == 2;
  return facts;
}

const char* name_of(cpu::PackMode mode) {
  switch (mode) {
    case cpu::PackMode::Both:
      return "both";
    case cpu::PackMode::ForwardOnly:
      return "forward";
    default:
      return "off";
  }
}

void set_pack_mode(const std::string& mode) {
  for (const auto candidate : {cpu::PackMode::Both, cpu::PackMode::ForwardOnly, cpu::PackMode::Off}) {
    if (mode == name_of(candidate)) {
      cpu::set_pack_mode(candidate);
      return;
    }
  }
  throw py::value_error("mode: found '" + mode + "', expected 'both', 'forward' or 'off'");
}

py::dict pack_cache_stats() {
  const auto stats = cpu::pack_cache_stats();
  py::dict result;
  result["mode"] = name_of(cpu::pack_mode());
  result["weights"] = stats.weights;
  result["entries"] = stats.packs;
  result["bytes"] = stats.bytes;
  result["limit"] = stats.limit;
  result["refused"] = stats.refused;
  result["hits"] = stats.hits;
  result["misses"] = stats.misses;
  return result;
}

// Why the weight's packs are refused; none when they are not.
std::optional<std::string> pack_refusal(const at::Tensor& weight) {
  const auto refusal = cpu::is_refused(weight) ? cpu::request_again(weight) : cpu::Refusal::None;
  if (refusal == cpu::Refusal::None) {
    return std::nullopt;
  }
  return refusal == cpu::Refusal::Limit ? "limit" : "memory";
}

// The entry that `functional.lora_linear` tries first; the arguments are what `backends.registry` says of this process.
py::object direct_call(
    const std::vector<at::ScalarType>& automatic, const py::type& rank_plan, const py::function& second_derivatives) {
  set_direct_call(cpu::backend, automatic, rank_plan.ptr(), second_derivatives.ptr());
  return py::reinterpret_steal<py::object>(make_direct_call());
}

} // namespace

PYBIND11_MODULE(_C, m) {
  release_threads_before_forks();
  m.def("build_facts", &build_facts);
  m.def("pack_cache_stats", &pack_cache_stats);
  m.def("set_pack_mode", &set_pack_mode);
  m.def("direct_call", &direct_call);
  m.def("set_pack_limit", [](std::optional<int64_t> bytes, std::optional<double> share) {
    cpu::set_pack_limit({bytes, share});
  });
  m.def("pack_refusal", &pack_refusal);
  m.def("forget_weight", &cpu::forget_weight, py::call_guard<py::gil_scoped_release>());
  m.def("clear_pack_cache", &cpu::clear_pack_cache);
  m.def("available_memory", &cpu::available_memory, py::arg("root") = "");
}
