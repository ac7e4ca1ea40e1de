// The products of an up-convolution whose kernel is its stride, block by block: a matrix product in a tile that stays
// in cache, and the way between the tile and the map at the fine resolution.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "../common/tensors.h"
#include "common/packed_b.h"
#include "upconv.h"

namespace tokenfusion {

// A gradient in the memory format of its tensor: channels_last, or contiguous.
Tensor in_format_of(const Tensor& gradient, const Tensor& tensor);

// An uninitialised map, in huge pages.
Tensor empty_map(at::IntArrayRef sizes, const Tensor& like, bool channels_last);

// Uninitialised, for UpconvTiles::accumulate: float32 where the tensor is bfloat16.
Tensor empty_sum(at::IntArrayRef sizes, const Tensor& like);

// Some rows of the coarse map, numbered over the batch, and some of the units that make up the columns of the product:
// channels where the map lies in planes, offsets i where it lies in pixels.
struct UpconvBlock {
  int64_t first_row, rows;
  int64_t first_unit, units;
};

class UpconvTiles {
 public:
  // map: [B, channels, k * h, k * w], with contiguous rows, to be written or read; product: who makes the products.
  UpconvTiles(const Tensor& x, const Tensor& map, int64_t scale, Product product);

  // out = a b
  void multiply(const Tensor& out, const Tensor& a, const Tensor& b) const;
  // sum += a b; assigned where it is the first product.
  void accumulate(const Tensor& sum, const Tensor& a, const Tensor& b, bool first) const;

  // With whole_columns, blocks of all units.
  std::vector<UpconvBlock> blocks(bool whole_columns) const;

  // [Cin, C, k, k] -> [Cin, columns of the product].
  Tensor weight_matrix(const Tensor& weight) const;
  // Whether that is a view.
  bool is_matrix(const Tensor& weight) const;
  // The inverse, a view.
  Tensor weight_of_matrix(const Tensor& matrix) const;
  // The columns of a block.
  Tensor columns(const Tensor& matrix, const UpconvBlock& block) const;
  // [pixels of the block, Cin]
  Tensor pixel_matrix(const UpconvBlock& block) const;

  // Memory for the largest tile of the blocks, of a map with this many channels.
  Tensor buffer(bool whole_columns, int64_t channels) const;
  // A buffer as the product [pixels, columns] and as [pixels x offsets, channels].
  Tensor product(const Tensor& buffer, const UpconvBlock& block, int64_t channels) const;
  Tensor by_channel(const Tensor& buffer, const UpconvBlock& block, int64_t channels) const;

  // Adds the bias [channels] on the way.
  void scatter(const Tensor& buffer, const UpconvBlock& block, const OptionalTensor& bias, bool add) const;
  void gather(const Tensor& buffer, const UpconvBlock& block) const;

  // Fine pixels of the block's rows as matrices [pixels, channels]; of a map like this one, they are views of it.
  std::vector<Tensor> fine_matrices(const Tensor& map, const UpconvBlock& block) const;

  // A gradient of x, whose blocks set_pixels fills with the products a b.
  Tensor empty_pixels() const;
  void set_pixels(const Tensor& pixels, const UpconvBlock& block, const Tensor& a, const Tensor& b) const;

  bool planes() const { return planes_; }

 private:
  UpconvParams params(const Tensor& buffer, const UpconvBlock& block) const;
  void run(const UpconvParams& p, const UpconvBlock& block, UpconvKernels::Items kernel) const;
  int64_t unit_columns(int64_t channels) const { return planes_ ? scale_ * scale_ : scale_ * channels; }
  int64_t units_per_block(bool whole_columns) const;
  int64_t rows_per_block(bool whole_columns) const;
  bool within_image(const UpconvBlock& block) const { return block.rows <= height_ - block.first_row % height_; }

  Tensor x_, map_, rows_;  // rows_: x as [pixels, Cin], where that is a view or the map lies in pixels
  bool planes_, x_channels_last_;
  int64_t scale_, batch_, height_, width_, channels_;
  Product product_;
};

}  // namespace tokenfusion
