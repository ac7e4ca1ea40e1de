#include "upconv_gemm.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

#include "common/blocks.h"
#include "common/packed_b.h"

namespace tokenfusion {
namespace {

constexpr int64_t kPixels = 112;  // of x in a block, about and at most; no more are too few for the product

std::optional<PackedB> packed(const GemmKernels::ForDtype& kernels, const OptionalTensor& matrix) {
  return matrix ? std::optional<PackedB>(std::in_place, kernels, *matrix) : std::nullopt;
}

// The map itself, or a copy, so that its pixels follow each other in equal steps. contiguous() would keep odd strides
// of sizes of 1.
Tensor with_pixel_lines(const Tensor& map) {
  const bool even = map.stride(2) == map.size(3) * map.stride(3);
  return even && (map.stride(1) == 1 || map.stride(3) == 1) ? map : map.clone(at::MemoryFormat::Contiguous);
}

// Whether they do so from image to image, too.
bool images_follow(const Tensor& map) { return map.stride(0) == map.size(2) * map.stride(2); }

// The pixels from this row on, which is numbered over the batch.
GemmLines pixel_lines(const Tensor& map, int64_t row) {
  const int64_t offset = row / map.size(2) * map.stride(0) + row % map.size(2) * map.stride(2);
  return {static_cast<const char*>(map.const_data_ptr()) + offset * map.element_size(), map.stride(3), map.stride(1),
          nullptr};
}

// Rows of a map, [rows, w, C].
Tensor rows_of(const Tensor& map, int64_t first, int64_t count) {
  if (images_follow(map)) return map.permute({0, 2, 3, 1}).flatten(0, 1).narrow(0, first, count);
  return map.select(0, first / map.size(2)).narrow(1, first % map.size(2), count).permute({1, 2, 0});
}

// A contiguous map [h, w, C] to one whose w is contiguous.
void to_planes(const Tensor& pixels, const Tensor& planes) {
  const UpconvKernels& kernels = TOKENFUSION_KERNELS(upconv);
  const auto transpose = (pixels.scalar_type() == at::kFloat ? kernels.float32 : kernels.bfloat16).transpose;
  const bool together = planes.stride(0) == planes.size(1);
  const int64_t rows = together ? 1 : planes.size(0), width = planes.size(0) * planes.size(1) / rows;
  for (int64_t row = 0; row < rows; ++row)
    transpose(pixels[row].const_data_ptr(), width, planes.size(2), planes[row].data_ptr(), planes.stride(2));
}

// Channels of neighbouring pixels in a row that the product writes together.
int64_t run_of(const Tensor& out, int64_t scale) {
  return out.stride(1) != 1 || out.stride(3) == out.size(1) ? scale * out.size(1) : out.size(1);
}

// Whether the product takes the dtype on this processor, there are more pixels of x than make a block (for fewer, to
// pack the weight is as much work as to multiply by it), and the channels that lie together fill its panels.
bool gemm_pays(const Tensor& out, int64_t scale) {
  const at::ScalarType dtype = out.scalar_type();
  const int64_t pixels = out.size(0) * (out.size(2) / scale) * (out.size(3) / scale);
  if (pixels <= kPixels || !gemm_takes(dtype)) return false;
  const int64_t run = run_of(out, scale), panel = gemm_kernels(dtype).panel;
  return at::divup(run, panel) * panel <= run + run / 8;
}

}  // namespace

UpconvForm upconv_form(std::string_view name, const Tensor& out, int64_t scale) {
  if (name == "library") return {false, Product::kLibrary};
  TORCH_CHECK_VALUE(name.empty() || name == "tiles", "form: got '", name, "', expected '', 'tiles' or 'library'");
  return {name.empty() && gemm_pays(out, scale), Product::kOwn};
}

void write_upconv(const Tensor& out, const Tensor& x_, const Tensor& weight, const OptionalTensor& bias_,
                  const OptionalTensor& skip_, const OptionalTensor& proj_up, const OptionalTensor& proj_skip) {
  const auto& kernels = gemm_kernels(x_.scalar_type());
  const Tensor x = with_pixel_lines(x_), skip = skip_ ? with_pixel_lines(*skip_) : Tensor();
  const int64_t scale = weight.size(2), up_channels = weight.size(1), channels = out.size(1);
  const int64_t height = x.size(2), width = x.size(3), fine_width = width * scale;
  const bool planes = out.stride(1) != 1;
  const int64_t column = planes ? channels : out.stride(3), row = planes ? fine_width * channels : out.stride(2);

  // The columns of the product, (i, j, channel), in runs that stay together.
  const int64_t all = scale * scale * up_channels;
  const int64_t run = proj_up ? all : run_of(out, scale);
  const PackedB b(kernels, weight.permute({0, 2, 3, 1}).reshape({weight.size(0), all}).t(), all / run);
  const std::optional<PackedB> b_up = packed(kernels, proj_up), b_skip = packed(kernels, proj_skip);
  std::vector<int64_t> run_offsets;
  for (int64_t first = 0; first < all; first += run) {
    const int64_t i = first / up_channels / scale, j = first / up_channels % scale;
    run_offsets.push_back(i * row + j * column);
  }
  Tensor bias;
  if (bias_) bias = bias_->to(at::kFloat).repeat(scale);

  // Blocks of rows of x, numbered over the batch, within an image or, where that is possible, beyond its end.
  const bool joined = images_follow(out) && images_follow(x) && (!skip.defined() || images_follow(skip));
  const int64_t together = joined ? x.size(0) * height : height;
  const int64_t most = std::max<int64_t>(1, at::divup(kPixels, kernels.rows) * kernels.rows / width);
  const int64_t rows = block_length(together, most, joined ? 1 : x.size(0), at::divup(kernels.rows, width));
  const int64_t blocks = at::divup(together, rows), all_blocks = joined ? blocks : x.size(0) * blocks;
  const int64_t depth = std::max({x.size(1), up_channels, skip.defined() ? skip.size(1) : 0});
  at::parallel_for(0, all_blocks, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView no_autograd;
    const int64_t pixels = rows * width;
    const Tensor scratch = at::empty({kernels.scratch_bytes(depth, 1)}, x.options().dtype(at::kByte));
    const Tensor tile = at::empty({planes ? pixels * scale * scale * channels : 0}, x.options());
    const Tensor up = at::empty({proj_up ? pixels * all : 0}, x.options());
    // Where, in the rows of a block, the lines of the last product go.
    std::vector<int64_t> offsets(proj_up ? pixels * scale * scale : pixels);
    const int64_t each = offsets.size() / pixels;
    for (int64_t p = 0; p < static_cast<int64_t>(offsets.size()); ++p) {
      const int64_t pixel = p / each, i = p % each / scale, j = p % each % scale;
      offsets[p] = (pixel / width * scale + i) * row + (pixel % width * scale + j) * column;
    }
    for (int64_t block = begin; block < end; ++block) {
      const int64_t start = block % blocks * rows, count = std::min(rows, together - start);
      const int64_t first = block / blocks * height + start;
      const Tensor place = rows_of(out, first * scale, count * scale);
      const Tensor target =
          planes ? tile.narrow(0, 0, place.numel()).view({count * scale, fine_width, channels}) : place;
      GemmCall call{};
      call.scratch = scratch.data_ptr();
      call.bias = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
      if (b_skip) {
        call.rows = count * scale * fine_width;
        call.out = target.data_ptr();
        call.out_stride = column;
        b_skip->multiply(pixel_lines(skip, first * scale), call);
        call.bias = nullptr;
      } else if (skip.defined()) {
        target.copy_(rows_of(skip, first * scale, count * scale));
      }
      GemmLines lines = pixel_lines(x, first);
      call.rows = count * width;
      if (b_up) {
        GemmCall to_up = call;
        to_up.bias = nullptr;
        to_up.out = up.data_ptr();
        to_up.out_stride = all;
        b.multiply(lines, to_up);
        lines = {up.const_data_ptr(), up_channels, 1, nullptr};
        call.rows *= scale * scale;
      }
      call.out = target.data_ptr();
      call.out_offsets = offsets.data();
      call.accumulate = skip.defined();
      if (b_up) {
        b_up->multiply(lines, call);
      } else {
        call.run_offsets = run_offsets.data();
        b.multiply(lines, call);
      }
      if (planes) to_planes(target, place);
    }
  });
}

}  // namespace tokenfusion
