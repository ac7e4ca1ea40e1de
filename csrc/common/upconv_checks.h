// What the up-convolutions ask of their operands, and how maps lie in memory, on every device.
#pragma once

#include <array>

#include "checks.h"

namespace tokenfusion {
namespace upconv {

// [B, channels, k * h, k * w]
inline std::array<int64_t, 4> map_sizes(const Tensor& x, const Tensor& weight, int64_t channels) {
  return {x.size(0), channels, weight.size(2) * x.size(2), weight.size(2) * x.size(3)};
}

inline void check_map(const char* name, const Tensor& map, const Tensor& x, const Tensor& weight, int64_t channels) {
  check(name, map, map_sizes(x, weight, channels), x.options());
}

inline void check_operands(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                           const OptionalTensor& skip) {
  check_rank("x", x, 4);
  check_rank("weight", weight, 4);
  const int64_t scale = weight.size(2), channels = weight.size(1);
  const bool known = scale == 2 || scale == 4 || scale == 8 || scale == 16 || scale == 32;
  TORCH_CHECK_VALUE(known, "weight: got k = ", scale, ", expected 2, 4, 8, 16 or 32");
  TORCH_CHECK_VALUE(channels > 0 && x.size(1) > 0, "weight: got shape ", weight.sizes(), ", expected no size of 0");
  check("weight", weight, {x.size(1), channels, scale, scale}, x.options());
  check("bias", bias, {channels}, x.options());
  if (!skip) return;
  check_rank("skip", *skip, 4);
  check_map("skip", *skip, x, weight, skip->size(1));
}

inline void check_out(const Tensor& out, const Tensor& x, const Tensor& weight, int64_t channels) {
  check_map("out", out, x, weight, channels);
  TORCH_CHECK_VALUE(out.stride(1) == 1 || out.stride(3) == 1, "out: got strides ", out.strides(),
                    ", expected 1 for the channels or for the last dimension");
}

inline bool is_same_memory(const Tensor& a, const Tensor& b) {
  return a.is_alias_of(b) && a.const_data_ptr() == b.const_data_ptr() && a.strides() == b.strides();
}

inline bool is_channels_last(const Tensor& map) { return map.stride(1) == 1 && !map.is_contiguous(); }

// The map itself, or a contiguous copy where neither its channels nor its rows are contiguous.
inline Tensor with_planes_or_pixels(const Tensor& map) {
  return map.stride(3) == 1 || map.stride(1) == 1 ? map : map.contiguous();
}

// Beside the bias, of as many channels as the result.
inline void check_projected_operands(const Tensor& x, const Tensor& weight, const OptionalTensor& skip,
                                     const OptionalTensor& proj_up, const OptionalTensor& proj_skip) {
  check_operands(x, weight, std::nullopt, skip);
  if (proj_up) check_rank("proj_up", *proj_up, 2);
  const int64_t channels = proj_up ? proj_up->size(0) : weight.size(1);
  check("proj_up", proj_up, {channels, weight.size(1)}, x.options());
  if (proj_skip && skip) check("proj_skip", *proj_skip, {channels, skip->size(1)}, x.options());
  TORCH_CHECK_VALUE(!skip || proj_skip || skip->size(1) == channels, "skip: got shape ", skip->sizes(), ", expected ",
                    channels, " channels");
}

// Whether a gradient is wanted that only a projected skip has.
inline void check_needed(const OptionalTensor& skip, const OptionalTensor& proj_skip, bool of_projected_skip) {
  TORCH_CHECK_VALUE((skip && proj_skip) || !of_projected_skip, "needed: there is no projected skip");
}

}  // namespace upconv
}  // namespace tokenfusion
