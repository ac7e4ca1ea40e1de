// How the kernels of the up-convolutions go through a product and a map.
#pragma once

#include "common/numbers.cuh"
#include "common/with_dtype.cuh"
#include "upconv_launch.h"

namespace tokenfusion {
namespace upconv {

typedef UpconvPass Pass;

// N numbers of a map: along the channels of a pixel, or along a row of a plane.
struct Place {
  uint32_t image, channel, y, x;

  TF_DEVICE int64_t in_pixels(const UpconvMap& map) const {
    return image * map.image + y * map.row + x * map.step + channel;
  }
  TF_DEVICE int64_t in_planes(const UpconvMap& map) const {
    return image * map.image + channel * map.step + y * map.row + x;
  }
};

// Neighbouring threads take neighbouring channels, a thread the same ones of some lines.
template <int N, typename Direction>
TF_DEVICE void go_through_pixels(const Pass& p, Direction direction) {
  const uint32_t thread = uint32_t(block_index()) * kUpconvThreads + thread_index();
  const uint32_t a_line = p.channels / N, group = thread / a_line, channel = thread % a_line * N;
  const uint32_t lines = p.lines, first = group * p.depth, offsets = 1u << (2 * p.log_scale);
  if (first >= lines) return;
  direction.begin(channel);
  for (uint32_t line = first; line < min(first + p.depth, lines); ++line) {
    const uint32_t pixel = line >> (2 * p.log_scale), offset = line & (offsets - 1);
    const uint32_t row = pixel / p.width, image = row / p.height;
    const uint32_t y = (row - image * p.height) << p.log_scale, x = (pixel - row * p.width) << p.log_scale;
    const uint32_t i = offset >> p.log_scale, j = offset & ((1u << p.log_scale) - 1);
    direction.take(pixel * p.product_step + offset * p.product_offset + channel, Place{image, channel, y + i, x + j});
  }
  direction.finish(group, channel);
}

// A warp takes a part of the plane of a channel, row by row.
template <int N, typename Direction>
TF_DEVICE void go_through_planes(const Pass& p, Direction direction) {
  const uint32_t warp = (uint32_t(block_index()) * kUpconvThreads + thread_index()) / 32, lane = thread_index() % 32;
  const uint32_t plane = warp / p.parts, part = warp - plane * p.parts;
  const uint32_t image = plane / p.channels, channel = plane - image * p.channels;
  if (image >= p.images) return;
  const uint32_t columns = (uint32_t(p.width) << p.log_scale) / N, vectors = columns * (p.height << p.log_scale);
  const uint32_t mask = (1u << p.log_scale) - 1;
  direction.begin(channel);
  for (int d = 0; d < p.depth; ++d) {
    const uint32_t vector = (part * p.depth + d) * 32 + lane;
    if (vector >= vectors) break;
    const uint32_t y = vector / columns, x = (vector - y * columns) * N;
    const uint32_t offset = ((y & mask) << p.log_scale) + (x & mask);
    const uint32_t pixel = (y >> p.log_scale) * p.width + (x >> p.log_scale);
    direction.take(image * p.product_image + channel * p.product_step + offset * p.product_offset + pixel,
                   Place{image, channel, y, x});
  }
  direction.finish(image * p.parts + part, channel);
}

// The kernel for what is known of a map at run time. Kernels are templates of the number type, of the numbers that a
// thread takes of the map at a time, and in planes of those next to each other in the product.
template <typename Kernels, typename T>
auto kernel_for(UpconvWay way, int log_scale) {
  constexpr int kVector = 16 / sizeof(T);
  switch (way) {
    case UpconvWay::kPixelVectors:
      return Kernels::template pixels<T, kVector>();
    case UpconvWay::kPixelNumbers:
      return Kernels::template pixels<T, 1>();
    case UpconvWay::kPlaneVectors:
      if (log_scale == 1) return Kernels::template planes<T, kVector, kVector / 2>();
      if (log_scale == 2) return Kernels::template planes<T, kVector, kVector / 4>();
      return Kernels::template planes<T, kVector, 1>();
    case UpconvWay::kPlaneNumbers:
      return Kernels::template planes<T, 1, 1>();
    default:
      return Kernels::template tiles<T>();
  }
}

template <typename Kernels>
cudaError_t launch(const Pass& p, UpconvWay way, int64_t more_blocks, Dtype dtype, cudaStream_t stream) {
  const auto kernel =
      with_dtype(dtype, [&](auto element) { return kernel_for<Kernels, decltype(element)>(way, p.log_scale); });
  const int shared_bytes = way == UpconvWay::kTiles ? p.tile_bytes : 0;
  kernel<<<int(p.blocks + more_blocks), kUpconvThreads, shared_bytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace upconv
}  // namespace tokenfusion
