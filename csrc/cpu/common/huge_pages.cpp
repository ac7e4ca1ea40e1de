#include "huge_pages.h"

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace tokenfusion {

at::Tensor in_huge_pages(at::Tensor tensor) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = 1 << 21;
  if (tensor.nbytes() >= 2 * kHugePage) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.data_ptr()), mask = ~(kHugePage - 1);
    const uintptr_t first = (begin + kHugePage - 1) & mask, last = (begin + tensor.nbytes()) & mask;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a hint: failure changes nothing
  }
#endif
  return tensor;
}

}  // namespace tokenfusion
