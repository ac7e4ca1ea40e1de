// The number types that the kernels are made for.
#pragma once

namespace tokenfusion {

enum class Dtype { kFloat32, kFloat16, kBFloat16 };

}  // namespace tokenfusion
