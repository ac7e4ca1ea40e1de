// What the host side and the kernels of the up-convolutions share. No torch headers here: the kernels need none.
#pragma once

#include <stdint.h>

namespace tokenfusion {

constexpr int kUpconvThreads = 256;  // of a block
constexpr int kUpconvCopied = 4;     // units that a thread copies

// A map [images, channels, scale * height, scale * width]. Strides are in elements; that of the innermost dimension is
// 1, whether its channels are (pixels) or its columns (planes).
struct UpconvMap {
  void* data;
  int64_t image, row;
  int64_t step;  // pixels: between columns; planes: between channels
};

// Runs of memory that are copied. All numbers are of units, which have 16 bytes or those of an element.
struct UpconvCopy {
  const void* from;
  void* to;
  int64_t from_strides[3], to_strides[3];  // between runs, the outermost first
  int32_t runs[3];
  int32_t run;
  int32_t has_vectors;
  uint32_t units;  // of all runs
};

// A pass between a product of all coarse pixels and a map. Pixels: the product is [coarse pixels, (i, j), channels];
// planes: it is [channels, (i, j), images, coarse pixels], of which the first two may be the other way round.
struct UpconvPass {
  void* product;
  int64_t product_step;    // pixels: between coarse pixels; planes: between channels
  int64_t product_offset;  // between offsets (i, j)
  int64_t product_image;   // planes
  UpconvMap map;
  int32_t images, channels, height, width, log_scale;
  uint32_t lines;      // pixels: fine pixels, in the order of the product
  int32_t depth;       // lines that follow on each other, or vectors of a plane, that a thread takes
  int32_t parts;       // planes: of a plane, each a warp's
  uint32_t tile;       // tiles: channels of a block
  int32_t tile_bytes;  // tiles: of the product, in shared memory
  int32_t blocks;      // of those that do not copy

  // Forward
  UpconvMap added;   // to the product; no data where nothing is
  const void* bias;  // [channels], at a multiple of 16 bytes, or null
  UpconvCopy copy;

  // Backward
  float* sums;  // of the gradients that a thread or a warp has seen, by channel; or null
};

}  // namespace tokenfusion
