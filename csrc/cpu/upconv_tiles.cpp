#include "upconv_tiles.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>

#include "../common/upconv_checks.h"
#include "common/huge_pages.h"
#include "common/kernels_for.h"
#include "common/library_product.h"

namespace tokenfusion {
namespace {

constexpr int64_t kTileElements = 1 << 19;
constexpr int64_t kTileColumns = 1024;
constexpr int64_t kMinPixels = 64;           // a product of fewer rows is slow
constexpr int64_t kPadding = 16;             // elements beyond a tile that vectors may read
constexpr int64_t kWorkPerThread = 1 << 14;  // elements below which threads do not pay

// Into how many equal parts of at most `most` a total is best cut: the size of such a part.
int64_t even(int64_t total, int64_t most) {
  return at::divup(total, std::max<int64_t>(1, at::divup(total, std::max<int64_t>(1, most))));
}

Tensor pixels_of(const Tensor& map) { return map.permute({0, 2, 3, 1}).flatten(0, 1); }  // [B h, w, C]

}  // namespace

Tensor empty_map(at::IntArrayRef sizes, const Tensor& like, bool channels_last) {
  const auto format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  return in_huge_pages(at::empty(sizes, like.options(), format));
}

Tensor in_format_of(const Tensor& gradient, const Tensor& tensor) {
  return gradient.contiguous(upconv::is_channels_last(tensor) ? at::MemoryFormat::ChannelsLast
                                                              : at::MemoryFormat::Contiguous);
}

Tensor empty_sum(at::IntArrayRef sizes, const Tensor& like) {
  return at::empty(sizes, like.scalar_type() == at::kBFloat16 ? like.options().dtype(at::kFloat) : like.options());
}

UpconvTiles::UpconvTiles(const Tensor& x, const Tensor& map, int64_t scale, Product product)
    : x_(x),
      map_(map),
      planes_(map.stride(3) == 1),
      x_channels_last_(upconv::is_channels_last(x)),
      scale_(scale),
      batch_(x.size(0)),
      height_(x.size(2)),
      width_(x.size(3)),
      channels_(map.size(1)),
      product_(product) {
  if (!planes_ || x_channels_last_) rows_ = x.permute({0, 2, 3, 1}).reshape({-1, x.size(1)});
}

void UpconvTiles::multiply(const Tensor& out, const Tensor& a, const Tensor& b) const {
  tokenfusion::multiply(out, a, b, product_);
}

void UpconvTiles::accumulate(const Tensor& sum, const Tensor& a, const Tensor& b, bool first) const {
  tokenfusion::multiply(sum, a, b, product_, !first);
}

int64_t UpconvTiles::units_per_block(bool whole_columns) const {
  const int64_t units = planes_ ? channels_ : scale_;
  return whole_columns ? units : even(units, kTileColumns / unit_columns(channels_));
}

int64_t UpconvTiles::rows_per_block(bool whole_columns) const {
  const int64_t columns = units_per_block(whole_columns) * unit_columns(channels_);
  const int64_t rows = at::divup(std::max(kMinPixels, kTileElements / columns), width_);
  if (!planes_) return even(batch_ * height_, rows);
  return rows < height_ ? even(height_, rows) : even(batch_, rows / height_) * height_;
}

std::vector<UpconvBlock> UpconvTiles::blocks(bool whole_columns) const {
  const int64_t all = batch_ * height_, most = rows_per_block(whole_columns);
  const int64_t units = planes_ ? channels_ : scale_, most_units = units_per_block(whole_columns);
  std::vector<UpconvBlock> blocks;
  for (int64_t row = 0, rows; row < all; row += rows) {
    rows = std::min(most, all - row);
    if (planes_ && most < height_) rows = std::min(rows, height_ - row % height_);
    for (int64_t unit = 0; unit < units; unit += most_units)
      blocks.push_back({row, rows, unit, std::min(most_units, units - unit)});
  }
  return blocks;
}

Tensor UpconvTiles::weight_matrix(const Tensor& weight) const {
  return widened((planes_ ? weight : weight.permute({0, 2, 3, 1})).reshape({weight.size(0), -1}));
}

bool UpconvTiles::is_matrix(const Tensor& weight) const {
  const Tensor ordered = planes_ ? weight : weight.permute({0, 2, 3, 1});
  return ordered.select(0, 0).is_contiguous();
}

Tensor UpconvTiles::weight_of_matrix(const Tensor& matrix) const {
  const int64_t in = matrix.size(0);
  return planes_ ? matrix.view({in, -1, scale_, scale_}) : matrix.view({in, scale_, scale_, -1}).permute({0, 3, 1, 2});
}

Tensor UpconvTiles::columns(const Tensor& matrix, const UpconvBlock& block) const {
  const int64_t units = planes_ ? channels_ : scale_, width = matrix.size(1) / units;
  return block.units == units ? matrix : matrix.narrow(1, block.first_unit * width, block.units * width);
}

Tensor UpconvTiles::pixel_matrix(const UpconvBlock& block) const {
  if (rows_.defined()) return rows_.narrow(0, block.first_row * width_, block.rows * width_);
  const int64_t image = block.first_row / height_, channels = x_.size(1);
  if (within_image(block))
    return x_.select(0, image).narrow(1, block.first_row % height_, block.rows).reshape({channels, -1}).t();
  return x_.narrow(0, image, block.rows / height_).transpose(0, 1).reshape({channels, -1}).t();
}

Tensor UpconvTiles::buffer(bool whole_columns, int64_t channels) const {
  const int64_t units = planes_ && whole_columns ? channels : units_per_block(whole_columns);
  const int64_t columns = units * unit_columns(channels);
  return at::empty({rows_per_block(whole_columns) * width_ * columns + kPadding}, x_.options());
}

Tensor UpconvTiles::product(const Tensor& buffer, const UpconvBlock& block, int64_t channels) const {
  const int64_t pixels = block.rows * width_;
  const int64_t units = planes_ && block.units == channels_ ? channels : block.units;
  const int64_t columns = units * unit_columns(channels);
  const Tensor used = buffer.narrow(0, 0, pixels * columns);
  return planes_ ? used.view({columns, pixels}).t() : used.view({pixels, columns});
}

Tensor UpconvTiles::by_channel(const Tensor& buffer, const UpconvBlock& block, int64_t channels) const {
  const int64_t positions = block.rows * width_ * scale_ * (planes_ ? scale_ : block.units);
  const Tensor used = buffer.narrow(0, 0, positions * channels);
  return planes_ ? used.view({channels, positions}).t() : used.view({positions, channels});
}

UpconvParams UpconvTiles::params(const Tensor& buffer, const UpconvBlock& block) const {
  UpconvParams p{};
  p.tile = buffer.data_ptr();
  p.map = map_.data_ptr();
  p.image_stride = map_.stride(0);
  p.row_stride = map_.stride(2);
  p.scale = scale_;
  p.height = height_;
  p.width = width_;
  p.first_row = block.first_row;
  p.rows = block.rows;
  if (planes_) {
    p.tile_pitch = block.rows * width_;
    p.channel_stride = map_.stride(1);
    p.map = static_cast<char*>(p.map) + block.first_unit * p.channel_stride * map_.element_size();
    p.channels = block.units;
  } else {
    p.tile_pitch = block.units * unit_columns(channels_);
    p.runs = map_.stride(3) == channels_ ? 1 : scale_;
    p.channels = scale_ / p.runs * channels_;
    p.run_stride = scale_ / p.runs * map_.stride(3);
    p.first_offset = block.first_unit;
    p.offsets = block.units;
  }
  return p;
}

void UpconvTiles::scatter(const Tensor& buffer, const UpconvBlock& block, const OptionalTensor& bias, bool add) const {
  UpconvParams p = params(buffer, block);
  Tensor values;
  if (bias) {
    values =
        planes_ ? bias->narrow(0, block.first_unit, block.units).contiguous() : bias->repeat(p.channels / channels_);
    p.bias = values.const_data_ptr();
  }
  p.add = add;
  const auto& kernels = kernels_for(TOKENFUSION_KERNELS(upconv), "x", buffer.scalar_type());
  run(p, block, planes_ ? kernels.scatter_planes : kernels.scatter_pixels);
}

void UpconvTiles::gather(const Tensor& buffer, const UpconvBlock& block) const {
  const auto& kernels = kernels_for(TOKENFUSION_KERNELS(upconv), "x", buffer.scalar_type());
  run(params(buffer, block), block, planes_ ? kernels.gather_planes : kernels.gather_pixels);
}

void UpconvTiles::run(const UpconvParams& p, const UpconvBlock& block, UpconvKernels::Items kernel) const {
  const int64_t items = planes_ ? p.channels * p.rows : p.rows;
  const int64_t work = block.units * unit_columns(channels_) * width_ * p.rows / items;
  at::parallel_for(0, items, at::divup(kWorkPerThread, work),
                   [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

std::vector<Tensor> UpconvTiles::fine_matrices(const Tensor& map, const UpconvBlock& block) const {
  const int64_t channels = map.size(1);
  if (!planes_) {
    const Tensor rows = pixels_of(map).narrow(0, block.first_row * scale_, block.rows * scale_);
    return {rows.reshape({-1, channels})};
  }
  std::vector<Tensor> matrices;
  for (int64_t row = block.first_row, rows; row < block.first_row + block.rows; row += rows) {
    rows = std::min(block.first_row + block.rows - row, height_ - row % height_);
    const Tensor part = map.select(0, row / height_).narrow(1, row % height_ * scale_, rows * scale_);
    matrices.push_back(part.reshape({channels, -1}).t());
  }
  return matrices;
}

Tensor UpconvTiles::empty_pixels() const { return empty_map(x_.sizes(), x_, !planes_ || x_channels_last_); }

void UpconvTiles::set_pixels(const Tensor& pixels, const UpconvBlock& block, const Tensor& a, const Tensor& b) const {
  const int64_t image = block.first_row / height_, channels = x_.size(1);
  if (!planes_ || x_channels_last_) {
    multiply(pixels_of(pixels).narrow(0, block.first_row, block.rows).view({-1, channels}), a, b);
  } else if (within_image(block)) {
    const Tensor rows = pixels.select(0, image).narrow(1, block.first_row % height_, block.rows);
    multiply(rows.view({channels, -1}).t(), a, b);
  } else {
    const int64_t images = block.rows / height_;
    const Tensor product = at::empty({channels, images, height_, width_}, pixels.options());
    multiply(product.view({channels, -1}), b.t(), a.t());
    pixels.narrow(0, image, images).copy_(product.transpose(0, 1));
  }
}

}  // namespace tokenfusion
