#include "isa.h"

#include <ATen/Version.h>

#include <string>

namespace tokenfusion {

Isa isa() {
  static const Isa chosen = [] {
#if defined(__x86_64__)
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512") return Isa::kAvx512;
    if (capability == "AVX2") return Isa::kAvx2;
#endif
    return Isa::kDefault;
  }();
  return chosen;
}

}  // namespace tokenfusion
