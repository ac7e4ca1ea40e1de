// Planes whose rows are no whole vectors, such as of 7 x 7 pixels: a block takes those of some channels whole, for
// which its part of the map is contiguous, and brings the product's rows into the order of the map in shared memory.
#pragma once

#include "common/numbers.cuh"
#include "upconv.h"

namespace tokenfusion {
namespace upconv {

template <typename T>
struct Tile {
  static constexpr int kVector = 16 / sizeof(T);

  const UpconvPass& p;
  T* const shared;  // [channels, (i, j), pitch]
  uint32_t image, first, channels, offsets, pixels, pitch;

  TF_DEVICE Tile(const UpconvPass& p, void* memory) : p(p), shared(static_cast<T*>(memory)) {
    const uint32_t tiles = (p.channels + p.tile - 1) / p.tile;
    image = block_index() / tiles, first = (block_index() - image * tiles) * p.tile;
    channels = min(p.channels - first, p.tile);
    offsets = 1u << (2 * p.log_scale), pixels = p.height * p.width;
    pitch = (pixels + kVector - 1) / kVector * kVector;
  }

  TF_DEVICE int64_t begin(const UpconvMap& map) const { return image * map.image + first * map.step; }
  TF_DEVICE uint32_t numbers() const { return channels * offsets * pixels; }

  TF_DEVICE uint32_t rows() const { return channels * offsets; }
  TF_DEVICE uint32_t row_vectors() const { return pitch / kVector; }
  TF_DEVICE T* row(uint32_t row) const { return shared + row * pitch; }
  TF_DEVICE T* in_product(uint32_t row) const {
    const uint32_t channel = first + (row >> (2 * p.log_scale)), offset = row & (offsets - 1);
    return static_cast<T*>(p.product) + image * p.product_image + channel * p.product_step + offset * p.product_offset;
  }
};

// Goes through the numbers of a tile in the order of the map.
template <typename T>
struct Walk {
  const Tile<T>& tile;
  const uint32_t height, width;
  uint32_t channel, y, x;

  TF_DEVICE Walk(const Tile<T>& tile, uint32_t number)
      : tile(tile), height(tile.p.height << tile.p.log_scale), width(tile.p.width << tile.p.log_scale) {
    const uint32_t row = number / width;
    channel = row / height, y = row - channel * height, x = number - row * width;
  }
  TF_DEVICE T& number() const {
    const uint32_t log_scale = tile.p.log_scale, mask = (1u << log_scale) - 1;
    const uint32_t row = channel * tile.offsets + ((y & mask) << log_scale) + (x & mask);
    return tile.row(row)[(y >> log_scale) * tile.p.width + (x >> log_scale)];
  }
  // Returns whether another channel begins.
  TF_DEVICE bool next() {
    if (++x < width) return false;
    x = 0;
    if (++y < height) return false;
    y = 0, ++channel;
    return true;
  }
};

}  // namespace upconv
}  // namespace tokenfusion
