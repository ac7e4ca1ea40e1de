// Choice, at run time, among the builds of a kernel file for several instruction sets. No torch headers here: see
// vec.h.
#pragma once

namespace tokenfusion {

enum class Isa { kDefault, kAvx2, kAvx512 };

// What PyTorch itself chose for this processor (the variable ATEN_CPU_CAPABILITY overrides it).
Isa isa();

// Whether bfloat16 may be multiplied by the tiles of AMX: the processor has them, the system permits them, and nobody
// has switched them off.
bool amx_allowed();
void allow_amx(bool allowed);  // for the process; no effect where there are none

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
