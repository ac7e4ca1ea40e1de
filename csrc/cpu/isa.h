// Choice, at run time, among the builds of a kernel file for several instruction sets.
#pragma once

#include <ATen/Version.h>

#include <string>

namespace tokenfusion {

enum class Isa { kDefault, kAvx2, kAvx512 };

// What PyTorch itself chose for this processor (the variable ATEN_CPU_CAPABILITY overrides it).
inline Isa isa() {
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

#if defined(__x86_64__)
#define TOKENFUSION_KERNELS(op)                                                        \
  (::tokenfusion::isa() == ::tokenfusion::Isa::kAvx512 ? ::tokenfusion::isa_avx512::op \
   : ::tokenfusion::isa() == ::tokenfusion::Isa::kAvx2 ? ::tokenfusion::isa_avx2::op   \
                                                       : ::tokenfusion::isa_default::op)
#else
#define TOKENFUSION_KERNELS(op) ::tokenfusion::isa_default::op
#endif
