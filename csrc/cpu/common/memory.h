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

}  // namespace
}  // namespace TOKENFUSION_ISA_NAMESPACE
}  // namespace tokenfusion
