#include "packed_b.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>

#include "huge_pages.h"
#include "library_product.h"

namespace tokenfusion {
namespace {

constexpr int64_t kWorkPerThread = 1 << 15;       // elements below which threads do not pay
constexpr int64_t kColumns = 512, kDepth = 2048;  // what is packed together

at::DataPtr allocate(int64_t bytes) { return c10::GetCPUAllocator()->allocate(bytes); }

}  // namespace

bool gemm_takes(at::ScalarType dtype) {
  if (isa() == Isa::kDefault) return false;
  return dtype == at::kFloat || (dtype == at::kBFloat16 && TOKENFUSION_KERNELS(gemm).takes_bfloat16());
}

const GemmKernels::ForDtype& gemm_kernels(at::ScalarType dtype) {
  const GemmKernels& kernels = TOKENFUSION_KERNELS(gemm);
  if (dtype == at::kFloat) return kernels.float32;
  return amx_allowed() ? kernels.bfloat16_tiles : kernels.bfloat16;
}

Tensor with_lines(const Tensor& matrices) {
  return matrices.stride(-2) == 1 || matrices.stride(-1) == 1 ? matrices : matrices.contiguous();
}

PackedB::PackedB(const GemmKernels::ForDtype& kernels, const Tensor& matrix_, int64_t runs)
    : kernels_(kernels), runs_(runs), columns_(matrix_.size(0) / runs), depth_(matrix_.size(1)) {
  const Tensor matrix = with_lines(matrix_);
  const int64_t bytes = kernels.bytes(columns_, depth_), panels = at::divup(columns_, kernels.panel);
  packed_ = in_huge_pages(at::empty({runs * bytes}, matrix.options().dtype(at::kByte)));
  const int64_t grain = at::divup(kWorkPerThread, std::max<int64_t>(kernels.panel * depth_, 1));
  at::parallel_for(0, runs * panels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % panels * kernels.panel, column = i / panels * columns_ + first;
      const void* data =
          static_cast<const char*>(matrix.const_data_ptr()) + column * matrix.stride(0) * matrix.element_size();
      kernels.pack({data, matrix.stride(0), matrix.stride(1), nullptr}, std::min(columns_ - first, kernels.panel),
                   depth_, packed_.mutable_data_ptr<uint8_t>() + i / panels * bytes + kernels.bytes(first, depth_));
    }
  });
}

void PackedB::multiply(const GemmLines& a, GemmCall call) const {
  const GemmTerm only = term(a);
  call.terms = &only;
  call.count = 1;
  call.columns = columns_;
  call.runs = runs_;
  kernels_.run(call);
}

void multiply(const Tensor& out_, const Tensor& a_, const Tensor& b_, Product product, bool accumulate) {
  const bool by_rows = out_.stride(1) == 1 || out_.size(1) == 1, by_columns = out_.stride(0) == 1 || out_.size(0) == 1;
  const bool floats =
      out_.scalar_type() == at::kFloat && a_.scalar_type() == at::kFloat && b_.scalar_type() == at::kFloat;
  const bool own = product == Product::kOwn && floats && gemm_takes(at::kFloat);
  if (!own || !(by_rows || by_columns))
    return library_product(out_, a_, b_, accumulate ? OptionalTensor(out_) : std::nullopt);
  if (!by_rows) return multiply(out_.t(), b_.t(), a_.t(), product, accumulate);
  const GemmKernels::ForDtype& kernels = gemm_kernels(at::kFloat);
  const Tensor a = with_lines(a_), b = with_lines(b_);
  const int64_t rows = out_.size(0), columns = out_.size(1), depth = a.size(1);
  const float *a_data = a.const_data_ptr<float>(), *b_data = b.const_data_ptr<float>();
  float* const out = out_.mutable_data_ptr<float>();
  const auto run = [&](int64_t first_row, int64_t last_row, int64_t first_column, int64_t last_column) {
    const int64_t most = std::min(kDepth, depth);
    const at::DataPtr scratch = allocate(kernels.scratch_bytes(most, 1));
    const at::DataPtr packed = allocate(kernels.bytes(std::min(kColumns, last_column - first_column), most));
    for (int64_t column = first_column; column < last_column; column += kColumns)
      for (int64_t k = 0; k < depth; k += kDepth) {
        const int64_t part = std::min(kDepth, depth - k);
        GemmCall call{};
        call.rows = last_row - first_row;
        call.columns = std::min(kColumns, last_column - column);
        kernels.pack({b_data + column * b.stride(1) + k * b.stride(0), b.stride(1), b.stride(0), nullptr}, call.columns,
                     part, packed.get());
        const float* const lines = a_data + first_row * a.stride(0) + k * a.stride(1);
        const GemmTerm term{{lines, a.stride(0), a.stride(1), nullptr}, part, packed.get(), nullptr};
        call.terms = &term;
        call.count = 1;
        call.out = out + first_row * out_.stride(0) + column;
        call.out_stride = out_.stride(0);
        call.accumulate = accumulate || k > 0;
        call.scratch = scratch.get();
        kernels.run(call);
      }
  };
  const int64_t chunks = at::divup(columns, kColumns), strips = at::divup(rows, kernels.rows);
  const int64_t items = std::max(chunks, strips), work = at::divup(rows * columns, items) * depth;
  at::parallel_for(0, items, at::divup(kWorkPerThread, work), [&](int64_t begin, int64_t end) {
    if (chunks >= strips)
      run(0, rows, begin * kColumns, std::min(end * kColumns, columns));
    else
      run(begin * kernels.rows, std::min(end * kernels.rows, rows), 0, columns);
  });
}

}  // namespace tokenfusion
