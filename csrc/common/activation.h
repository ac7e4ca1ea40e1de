// The activations of tied_ffn. No torch headers here: kernels need none.
#pragma once

namespace tokenfusion {

enum class Activation { kGelu, kGeluTanh, kRelu, kSilu, kIdentity, kCount };

}  // namespace tokenfusion
