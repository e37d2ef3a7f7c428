#include "cpu_backend.h"

#include "cpu/linear/kernels.h"
#include "cpu/packs/pack_cache.h"

namespace peftkernels::cpu {
namespace {

// While packs are not kept, and for a weight whose packs were refused, the choice is Python's.
bool is_automatic(const Forward& call) {
  return pack_mode() != PackMode::Off && !is_refused(call.weight.dense);
}

} // namespace

constexpr Backend backend{
    "cpu",
    c10::DispatchKey::CPU,
    c10::DispatchKey::AutogradCPU,
    c10::DispatchKey::AutocastCPU,
    {at::kFloat, at::kBFloat16},
    lora_linear_forward,
    lora_linear_backward,
    lora_shrink,
    is_automatic};

} // namespace peftkernels::cpu
