// Small operands on their side.
#pragma once

#include <cstdint>

namespace peftkernels::cpu {

// to[column * to_stride + row] = word `column` of row `row`, for 32-bit words; rows begin `row_bytes` apart at `from`.
void transpose_words(
    const void* from, int64_t row_bytes, int64_t rows, int64_t columns, void* to, int64_t to_stride);

} // namespace peftkernels::cpu
