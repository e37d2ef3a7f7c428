// The kernels for CPUs.
#pragma once

#include "backend.h"

namespace peftkernels::cpu {

extern const Backend backend;

} // namespace peftkernels::cpu
