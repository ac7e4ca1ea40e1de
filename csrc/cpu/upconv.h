// What the host side and the kernels of the up-convolutions share. No torch headers here: see vec.h.
#pragma once

#include <stdint.h>

#include "common/isa.h"

namespace tokenfusion {

// Moves a block of rows of the coarse map, numbered over the batch (row = image * height + y), between a tile, in which
// the matrix products are made, and the fine map. Coarse pixel (y, x) and offsets i, j < scale make the fine pixel
// (y * scale + i, x * scale + j). Strides are in elements.
//
// Planes (innermost dimension of the map: x): the tile is [channels, scale, scale, pixels of the block].
// Pixels (innermost dimension: channels): the tile is [pixels of the block, offsets i, runs, channels]. Where the
// channels of neighbouring pixels are contiguous, a fine row of one coarse pixel is one run of scale * channels.
struct UpconvParams {
  void* tile;
  int64_t tile_pitch;  // planes: between (channel, i, j); pixels: between pixels
  void* map;
  int64_t image_stride, row_stride;
  int64_t channel_stride;  // planes
  int64_t run_stride;      // pixels
  int64_t scale, height, width;
  int64_t first_row, rows;
  int64_t channels;                     // of a run, in pixels
  int64_t runs, first_offset, offsets;  // pixels: runs of a coarse pixel in a fine row; i of the tile
  const void* bias;                     // [channels] or null
  bool add;                             // to the map, not over it
};

struct UpconvKernels {
  typedef void (*Items)(const UpconvParams&, int64_t begin, int64_t end);

  struct ForDtype {
    Items scatter_planes, gather_planes;  // items: channels x rows
    Items scatter_pixels, gather_pixels;  // items: rows
    // [rows, columns] -> [columns, rows], whose rows are pitch apart.
    void (*transpose)(const void* in, int64_t rows, int64_t columns, void* out, int64_t pitch);
  };
  ForDtype float32, bfloat16, float64;
};

TOKENFUSION_DECLARE_KERNELS(UpconvKernels, upconv)

}  // namespace tokenfusion
