// The machine's memory: how much of it is left, and large blocks that few page-table entries cover.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>

namespace peftkernels::cpu {

// Bytes that this process may still take without anything being swapped out or killed: what the system calls
// available, or what the process's control group leaves where that is less. Where the system does not tell (not Linux)
// all memory the machine has; nothing where not even that is known. `root` is where /proc and /sys are looked for.
std::optional<int64_t> available_memory(const std::string& root = "");

// An uninitialised tensor (rows, columns). From `least` bytes on the system is asked to back it with huge pages, which
// are faster to make and spare the processor looking up addresses, and its memory goes back to the system at once when
// it is freed. Smaller ones come from torch's allocator. An undefined tensor where there is no memory for it.
at::Tensor empty_in_huge_pages(int64_t rows, int64_t columns, at::ScalarType dtype, int64_t least);

} // namespace peftkernels::cpu
