#include "row_blocks.h"

namespace peftkernels::cpu {

c10::MaybeOwned<at::Tensor> as_rows(const at::Tensor& x, int64_t columns) {
  using Rows = c10::MaybeOwned<at::Tensor>;
  if (x.dim() == 2 && columns > 1 && x.stride(1) == 1 && x.stride(0) >= columns) {
    return Rows::borrowed(x);
  }
  int64_t count = 1;
  for (int64_t dim = 0; dim + 1 < x.dim(); ++dim) {
    count *= x.size(dim);
  }
  auto rows = x.reshape({count, columns});
  const bool unit_stride = columns <= 1 || rows.stride(1) == 1;
  const bool row_stride = count <= 1 || rows.stride(0) >= columns;
  return Rows::owned(unit_stride && row_stride ? std::move(rows) : rows.contiguous());
}

} // namespace peftkernels::cpu
