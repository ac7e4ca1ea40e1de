// The memory of a thread, in pieces.
#pragma once

#include "vec.h"

namespace tokenfusion {
namespace TOKENFUSION_ISA_NAMESPACE {
namespace {

// Takes the pieces, which lie at whole lines of the cache.
struct Memory {
  char* next;

  template <typename E>
  E* take(int64_t count) {
    E* const taken = reinterpret_cast<E*>(next);
    next += round_up(count * int64_t(sizeof(E)), 64);
    return taken;
  }
};

// A whole number of lines of the cache that is odd, so that rows do not all fall on the same few places of it.
template <typename E>
constexpr int64_t pitch_of(int64_t count) {
  return ((count * int64_t(sizeof(E)) + 63) / 64 | 1) * 64 / int64_t(sizeof(E));
}

}  // namespace
}  // namespace TOKENFUSION_ISA_NAMESPACE
}  // namespace tokenfusion
