// The matrix products of an up-convolution.
#pragma once

#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <limits>

#include "common/products.h"
#include "upconv_plan.h"

namespace tokenfusion {
namespace upconv {

// The products of an up-convolution with a map, some images at a time.
class Products {
 public:
  Products(const Tensor& x, const Tensor& weight, const Tensor& map)
      : x_(x), weight_(weight), planes_(lies_in_planes(map)), scale_(weight.size(2)), channels_(weight.size(1)) {
    const Tensor by_offset = weight.permute({0, 2, 3, 1});
    channels_last_ = !planes_ || (by_offset.is_contiguous() && !weight.is_contiguous());
    matrix_ = (channels_last_ ? by_offset : weight).flatten(1);
  }

  bool planes() const { return planes_; }
  int64_t scale() const { return scale_; }

  // How many images are taken together, where so many channels of each are copied, too: as many as have their product
  // in half of the cache of the GPU, from which it is read, and one at least.
  int64_t images_at_once(int64_t copied) const {
    const int64_t fine = scale_ * scale_ * x_.size(2) * x_.size(3);
    const int64_t indexed = std::numeric_limits<int32_t>::max() / std::max(channels_, copied) / fine;
    TORCH_CHECK_VALUE(indexed > 0, "x, skip: got ", std::max(channels_, copied), " channels of ", fine,
                      " pixels in an image of the result, expected fewer than 2^31 numbers");
    const int64_t cached =
        attribute(cudaDevAttrL2CacheSize, x_.get_device()) / 2 / (fine * channels_ * x_.element_size());
    const int64_t most = std::clamp<int64_t>(cached, 1, indexed), all = x_.size(0);
    return divide_up(all, divide_up(all, most));
  }

  // The product of these images, as a pass takes it.
  Tensor forward(int64_t first, int64_t count) const {
    if (!planes_) {
      const Tensor product = empty_rows(count);
      multiply(product, rows_of(images(first, count)), matrix_);
      return by_offset_and_channel(product);
    }
    Tensor product = at::empty({count, columns(), pitch()}, x_.options()).narrow(2, 0, pixels());
    at::bmm_out(product, expanded(matrix_.t(), count), with_aligned_planes(images(first, count).flatten(2)));
    return by_channel_and_offset(product.transpose(0, 1));
  }

  // For the gradient of that product, as a pass makes it.
  Tensor empty_gradient(int64_t count) const {
    if (!planes_) return by_offset_and_channel(empty_rows(count));
    const Tensor all = at::empty({columns(), count, pitch()}, x_.options());
    if (pitch() > pixels()) all.narrow(2, pixels(), pitch() - pixels()).zero_();
    return by_channel_and_offset(all.narrow(2, 0, pixels()));
  }

  // Writes the gradient of x, a map like it.
  void set_input_gradient(const Tensor& grad_x, const Tensor& gradient, int64_t first, int64_t count) const {
    const Tensor part = grad_x.narrow(0, first, count);
    if (planes_) {
      Tensor to = part.flatten(2);
      at::bmm_out(to, expanded(matrix_, count), columns_first(gradient).transpose(0, 1));
    } else if (is_channels_last(grad_x)) {
      multiply(rows_of(part), gradient.flatten(1), matrix_.t());
    } else {
      const Tensor rows = at::mm(gradient.flatten(1), matrix_.t());
      pixels_of(part).copy_(rows.view(pixels_of(part).sizes()));
    }
  }

  // Adds to the gradient of the weight's matrix, or sets it.
  void add_weight_gradient(const Tensor& sum, const Tensor& gradient, int64_t first, int64_t count) const {
    const Tensor x = images(first, count);
    if (!planes_) return add_product(sum, rows_of(x), gradient.flatten(1), first == 0);
    const Tensor whole = columns_first(gradient).as_strided({columns(), count * pitch()}, {count * pitch(), 1});
    add_product(sum, with_pitch(x.flatten(2).transpose(0, 1)).t(), whole.t(), first == 0);
  }
  Tensor empty_weight_gradient() const { return at::empty(matrix_.sizes(), matrix_.options().dtype(at::kFloat)); }
  Tensor weight_of(const Tensor& matrix) const {
    const Tensor weight = at::empty_like(weight_);
    if (channels_last_) return weight.copy_(matrix.view({-1, scale_, scale_, channels_}).permute({0, 3, 1, 2}));
    return weight.copy_(matrix.view(weight.sizes()));
  }

 private:
  int64_t columns() const { return matrix_.size(1); }
  int64_t pixels() const { return x_.size(2) * x_.size(3); }
  int64_t aligned(int64_t count) const { return divide_up(count, vector_of(x_)) * vector_of(x_); }
  int64_t pitch() const { return aligned(pixels()); }

  Tensor images(int64_t first, int64_t count) const { return x_.narrow(0, first, count); }
  Tensor expanded(const Tensor& matrix, int64_t count) const {
    return matrix.expand({count, matrix.size(0), matrix.size(1)});
  }

  // Pixels: [coarse pixels, columns]
  Tensor empty_rows(int64_t count) const {
    return at::empty({count * pixels(), aligned(columns())}, x_.options()).narrow(1, 0, columns());
  }
  Tensor by_offset_and_channel(const Tensor& rows) const { return rows.unflatten(1, {scale_ * scale_, channels_}); }

  // Planes: [columns, images, coarse pixels of one], and as a pass takes it
  Tensor by_channel_and_offset(const Tensor& t) const {
    if (channels_last_) return t.unflatten(0, {scale_ * scale_, channels_}).transpose(0, 1);
    return t.unflatten(0, {channels_, scale_ * scale_});
  }
  Tensor columns_first(const Tensor& t) const { return (channels_last_ ? t.transpose(0, 1) : t).flatten(0, 1); }

  // [count, Cin, pixels]: the library takes planes at multiples of 16 bytes several times as fast.
  Tensor with_aligned_planes(const Tensor& planes) const {
    if (pitch() == pixels() || planes.stride(2) != 1) return planes;
    const Tensor copy = at::empty({planes.size(0), planes.size(1), pitch()}, planes.options());
    return copy.narrow(2, 0, pixels()).copy_(planes);
  }
  // [Cin, count, pixels] -> [Cin, count pitch], with zeros between
  Tensor with_pitch(const Tensor& t) const {
    if (pitch() == pixels()) return t.flatten(1);
    const Tensor padded = at::zeros({t.size(0), t.size(1), pitch()}, t.options());
    padded.narrow(2, 0, pixels()).copy_(t);
    return padded.flatten(1);
  }

  Tensor x_, weight_, matrix_;  // [Cin, columns]: (i, j, channel), or (channel, i, j)
  bool planes_, channels_last_;
  int64_t scale_, channels_;
};

}  // namespace upconv
}  // namespace tokenfusion
