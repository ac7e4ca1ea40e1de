// What a matrix product is added to: nothing, a bias for each column, or what the result holds.
#pragma once

#include "vec.h"

namespace tokenfusion {
namespace TOKENFUSION_ISA_NAMESPACE {
namespace {

enum class Start { kZero, kBias, kSum };

}  // namespace
}  // namespace TOKENFUSION_ISA_NAMESPACE
}  // namespace tokenfusion
