// How a pass of an up-convolution goes through a map, and what its kernels are told of both.
#pragma once

#include <algorithm>

#include "../common/upconv_checks.h"
#include "common/tensors.h"
#include "upconv_launch.h"

namespace tokenfusion {
namespace upconv {

constexpr int64_t kThreadsPerMultiprocessor = 1024;
constexpr int64_t kMaxDepth = 32;  // a longer sum would lose precision
constexpr int64_t kWarps = kUpconvThreads / 32;

constexpr int64_t kTileBytes = 16 << 10, kMostTileBytes = 48 << 10;  // the most that a kernel has without asking

inline int64_t vector_of(const Tensor& t) { return 16 / t.element_size(); }

// Whether the rows of a map are contiguous, or else its channels.
inline bool lies_in_planes(const Tensor& map) { return map.stride(3) == 1; }
inline bool lies_as(const Tensor& map, bool planes) { return map.stride(planes ? 3 : 1) == 1; }
inline at::MemoryFormat format_of(bool planes) {
  return planes ? at::MemoryFormat::Contiguous : at::MemoryFormat::ChannelsLast;
}
inline at::MemoryFormat format_like(const Tensor& map) { return format_of(!is_channels_last(map)); }

// [B, h, w, C], and [B h w, C]: of channels_last maps views.
inline Tensor pixels_of(const Tensor& map) { return map.permute({0, 2, 3, 1}); }
inline Tensor rows_of(const Tensor& map) { return pixels_of(map).flatten(0, 2); }

inline Tensor innermost_last(const Tensor& map, bool planes) { return planes ? map : pixels_of(map); }

inline bool has_vectors(const Tensor& map, bool planes) {
  const Tensor t = innermost_last(map, planes);
  return t.size(3) % vector_of(t) == 0 && has_aligned_rows(t);
}

// Whether each image of a map is contiguous, and begins at a multiple of 16 bytes.
inline bool has_dense_images(const Tensor& map) {
  const bool aligned = map.size(0) == 1 || map.stride(0) % vector_of(map) == 0;
  return aligned && map.select(0, 0).is_contiguous() && reinterpret_cast<uintptr_t>(map.const_data_ptr()) % 16 == 0;
}

// Of the product of a channel of one image.
inline int64_t plane_bytes(const Tensor& map, int64_t scale) {
  const int64_t pixels = map.size(2) * map.size(3) / (scale * scale);
  return scale * scale * divide_up(pixels, vector_of(map)) * 16;
}

inline UpconvWay way_of(const Tensor& map, const OptionalTensor& added, int64_t scale) {
  const bool planes = lies_in_planes(map),
             vectors = has_vectors(map, planes) && (!added || has_vectors(*added, planes));
  if (!planes) return vectors ? UpconvWay::kPixelVectors : UpconvWay::kPixelNumbers;
  const bool dense = has_dense_images(map) && (!added || has_dense_images(*added));
  const bool tiles = dense && kWarps * plane_bytes(map, scale) <= kMostTileBytes;
  const bool fills_warps = map.size(2) * map.size(3) >= 32 * vector_of(map);
  if (vectors && (fills_warps || !tiles)) return UpconvWay::kPlaneVectors;
  return tiles ? UpconvWay::kTiles : UpconvWay::kPlaneNumbers;
}

inline UpconvMap described(const Tensor& map, bool planes) {
  return {map.data_ptr(), map.stride(0), map.stride(2), map.stride(planes ? 1 : 3)};
}

inline UpconvCopy copy_of(const Tensor& from_, const Tensor& to_, bool planes) {
  const Tensor from = innermost_last(from_, planes), to = innermost_last(to_, planes);
  int64_t run = from.size(3), outer = 2;
  for (; outer >= 0; --outer) {
    if (from.size(outer) != 1 && (from.stride(outer) != run || to.stride(outer) != run)) break;
    run *= from.size(outer);
  }
  const auto is_aligned = [&](const Tensor& t) {
    bool aligned = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
    for (int64_t i = 0; i <= outer; ++i) aligned = aligned && (t.size(i) == 1 || t.stride(i) % vector_of(t) == 0);
    return aligned;
  };
  const bool vectors = run % vector_of(from) == 0 && is_aligned(from) && is_aligned(to);
  const int64_t unit = vectors ? vector_of(from) : 1;
  UpconvCopy c{from.const_data_ptr(),        to.data_ptr(), {}, {}, {1, 1, 1}, int32_t(run / unit), vectors,
               uint32_t(from.numel() / unit)};
  for (int64_t i = 0; i <= outer; ++i)
    c.runs[i] = from.size(i), c.from_strides[i] = from.stride(i) / unit, c.to_strides[i] = to.stride(i) / unit;
  return c;
}

// Of lines, each a thread's for some channels.
inline int64_t groups_of(const UpconvPass& p) { return divide_up(p.lines, p.depth); }

// product: [coarse pixels, k k, C], or in planes [C, k k, images, coarse pixels of one].
inline UpconvPass pass_of(const Tensor& product, const Tensor& map, int64_t scale, UpconvWay way) {
  const bool in_vectors = way == UpconvWay::kPixelVectors || way == UpconvWay::kPlaneVectors;
  const bool planes = lies_in_planes(map);
  const int64_t numbers = in_vectors ? vector_of(map) : 1;
  UpconvPass p{};
  p.product = product.data_ptr();
  p.product_step = product.stride(0), p.product_offset = product.stride(1), p.product_image = product.stride(2);
  p.map = described(map, planes);
  p.images = map.size(0), p.channels = map.size(1), p.height = map.size(2) / scale, p.width = map.size(3) / scale;
  while (1 << p.log_scale < scale) ++p.log_scale;
  p.lines = map.numel() / map.size(1), p.parts = 1;
  if (way == UpconvWay::kTiles) {
    p.tile = std::max(kTileBytes / plane_bytes(map, scale) / kWarps, int64_t(1)) * kWarps;
    p.tile_bytes = p.tile * plane_bytes(map, scale);
    p.blocks = p.images * divide_up(p.channels, p.tile);
    return p;
  }
  const int64_t wanted = divide_up(map.numel() / numbers, kThreadsPerMultiprocessor * multiprocessors(map));
  p.depth = std::clamp<int64_t>(wanted, 1, kMaxDepth);
  if (planes) {
    const int64_t vectors = divide_up(map.size(2) * map.size(3) / numbers, 32);  // of a lane in a plane
    p.depth = std::min<int64_t>(p.depth, vectors), p.parts = divide_up(vectors, p.depth);
    p.blocks = divide_up(int64_t(p.images) * p.channels * p.parts, kWarps);
  } else {
    p.blocks = divide_up(groups_of(p) * (p.channels / numbers), kUpconvThreads);
  }
  return p;
}

// Rows of [channels] that the sums of a bias gradient have before they are added up.
inline int64_t sums_of(const UpconvPass& p, bool planes) { return planes ? int64_t(p.images) * p.parts : groups_of(p); }

}  // namespace upconv
}  // namespace tokenfusion
