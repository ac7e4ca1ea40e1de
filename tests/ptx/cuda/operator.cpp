// An operator's host of csrc/cuda, HOST, for tensors of the CPU, while a test has it registered.
#include <ATen/ops/mm.h>
#include <torch/library.h>

#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(space, key, library) static void add_kernels(torch::Library& library)
#include HOST

namespace {

// beta self + alpha a b, in out_dtype, which PyTorch has for CUDA alone.
at::Tensor& add_product(const at::Tensor& self, const at::Tensor& a, const at::Tensor& b, at::ScalarType out_dtype,
                        const at::Scalar& beta, const at::Scalar& alpha, at::Tensor& out) {
  const at::Tensor product = at::mm(a.to(out_dtype), b.to(out_dtype)).mul_(alpha);
  return out.copy_(beta.toDouble() == 0 ? product : product.add_(self, beta));
}

struct Registered {
  static torch::Library library(const char* space) {
    return torch::Library(torch::Library::IMPL, space, c10::DispatchKey::CPU, __FILE__, __LINE__);
  }

  torch::Library kernels = library("tokenfusion"), products = library("aten");

  Registered() {
    tokenfusion::add_kernels(kernels);
    products.impl("addmm.dtype_out", add_product);
  }
};

}  // namespace

extern "C" Registered* add_operator() { return new Registered; }
extern "C" void remove_operator(Registered* registered) { delete registered; }

#ifdef LIMIT
// What of csrc/cuda/common/limits.h is the operator's.
extern "C" int64_t limit_for(int64_t count, int64_t itemsize) { return tokenfusion::LIMIT(count, itemsize, 0); }
#endif
