// What the host side of every operator asks of tensors and of the GPU.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>

#include <cstdint>

#include "../../common/tensors.h"
#include "dtype.h"

namespace tokenfusion {

inline int64_t attribute(cudaDeviceAttr name, int device) {
  int value;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, device));
  return value;
}

inline int64_t multiprocessors(const Tensor& tensor) {
  return attribute(cudaDevAttrMultiProcessorCount, tensor.get_device());
}

inline int64_t divide_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit; }

inline Dtype dtype_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Dtype::kFloat32;
    case at::kHalf:
      return Dtype::kFloat16;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    default:
      TORCH_CHECK_TYPE(false, name, ": got dtype ", tensor.scalar_type(), ", expected float32, float16 or bfloat16");
  }
}

// Whether what lies along the innermost dimension is contiguous and begins at multiples of 16 bytes.
inline bool has_aligned_rows(const Tensor& tensor) {
  bool aligned = tensor.stride(-1) == 1 && reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  for (int64_t i = 0; i < tensor.dim() - 1; ++i)
    aligned = aligned && (tensor.size(i) == 1 || tensor.stride(i) * tensor.element_size() % 16 == 0);
  return aligned;
}

// The tensor itself, or a copy where it is not contiguous or does not begin at a multiple of 16 bytes.
inline Tensor with_aligned_memory(const Tensor& t) {
  return t.is_contiguous() && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0
             ? t
             : t.clone(at::MemoryFormat::Contiguous);
}

}  // namespace tokenfusion
