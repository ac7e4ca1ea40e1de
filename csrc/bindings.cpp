#include <pybind11/pybind11.h>

#include "cpu/isa.h"

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
}
