// x W^T + b of many blocks of rows with one matrix, by whichever of PyTorch's libraries is the faster one for it.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace tokenfusion {

class Linear {
 public:
  // weight: [out, in], of any strides; rows: of all blocks together.
  Linear(const at::Tensor& weight, int64_t rows);

  // x: [rows of a block, in] -> [rows of a block, out], a new tensor.
  at::Tensor operator()(const at::Tensor& x, const std::optional<at::Tensor>& bias = std::nullopt) const;

 private:
  at::Tensor weight_;  // in an order of oneDNN's own where many rows pay for it
  bool onednn_;
};

}  // namespace tokenfusion
