#include <pybind11/pybind11.h>

#include "cpu/common/gemm.h"
#include "cpu/common/isa.h"
#ifdef TOKENFUSION_WITH_CUDA
#include "cuda/common/limits.h"
#endif

// The operators register themselves with PyTorch's dispatcher in their own files; this module is what Python imports
// to load them.
PYBIND11_MODULE(_C, module) {
  module.def(
      "capability",
      [] {
        switch (tokenfusion::isa()) {
          case tokenfusion::Isa::kAvx512:
            return "avx512";
          case tokenfusion::Isa::kAvx2:
            return "avx2";
          default:
            return "default";
        }
      },
      "Instruction set of the CPU kernels that run here: default, avx2 or avx512.");
  module.def(
      "takes_bfloat16", [] { return TOKENFUSION_KERNELS(gemm).takes_bfloat16(); },
      "Whether the CPU kernels' own matrix product takes bfloat16 here.");
  module.def(
      "amx_allowed", &tokenfusion::amx_allowed,
      "Whether these kernels have tiles: the processor has AMX, the system permits it, nobody has switched it off.");
  module.def("allow_amx", &tokenfusion::allow_amx,
             "Switch the kernels that use AMX off, or on again where it is there.");
#ifdef TOKENFUSION_WITH_CUDA
  module.def("dynamic_mixing_cuda_max_reduced", &tokenfusion::dynamic_mixing_cuda_max_reduced,
             "The largest d for this many tokens, bytes of an element and GPU; 0 where there is none.");
#endif
}
