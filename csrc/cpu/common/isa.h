// Choice, at run time, among the builds of a kernel file for several instruction sets. No torch headers here: see
// vec.h.
#pragma once

namespace tokenfusion {

enum class Isa { kDefault, kAvx2, kAvx512 };

// What PyTorch itself chose for this processor (the variable ATEN_CPU_CAPABILITY overrides it).
Isa isa();

}  // namespace tokenfusion

// Declares, in the namespace tokenfusion, what a kernel file defines once per instruction set.
#define TOKENFUSION_DECLARE_KERNELS(Kernels, op) \
  namespace isa_default {                        \
  extern const Kernels op;                       \
  }                                              \
  namespace isa_avx2 {                           \
  extern const Kernels op;                       \
  }                                              \
  namespace isa_avx512 {                         \
  extern const Kernels op;                       \
  }

#if defined(__x86_64__)
#define TOKENFUSION_KERNELS(op)                                                        \
  (::tokenfusion::isa() == ::tokenfusion::Isa::kAvx512 ? ::tokenfusion::isa_avx512::op \
   : ::tokenfusion::isa() == ::tokenfusion::Isa::kAvx2 ? ::tokenfusion::isa_avx2::op   \
                                                       : ::tokenfusion::isa_default::op)
#else
#define TOKENFUSION_KERNELS(op) ::tokenfusion::isa_default::op
#endif
