// An operator's host of csrc/cuda, HOST, for tensors of the CPU, while a test has it registered.
#include <torch/library.h>

#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(space, key, library) static void add_kernels(torch::Library& library)
#include HOST

extern "C" torch::Library* add_operator() {
  auto* const library =
      new torch::Library(torch::Library::IMPL, "tokenfusion", c10::DispatchKey::CPU, __FILE__, __LINE__);
  tokenfusion::add_kernels(*library);
  return library;
}
extern "C" void remove_operator(torch::Library* library) { delete library; }

// What of csrc/cuda/common/limits.h is the operator's.
extern "C" int64_t limit_for(int64_t count, int64_t itemsize) { return tokenfusion::LIMIT(count, itemsize, 0); }
