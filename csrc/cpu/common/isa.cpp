#include "isa.h"

#include <ATen/Version.h>

#include <atomic>
#include <string>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tokenfusion {
namespace {

bool has_amx() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kTilesAndBfloat16 = 1u << 24 | 1u << 22;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl
  unsigned a, b, c, features = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &features) && (features & kTilesAndBfloat16) == kTilesAndBfloat16 &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

std::atomic<bool> switched_on{true};

}  // namespace

Isa isa() {
  static const Isa chosen = [] {
#if defined(__x86_64__)
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512") return Isa::kAvx512;
    if (capability == "AVX2") return Isa::kAvx2;
#endif
    return Isa::kDefault;
  }();
  return chosen;
}

bool amx_allowed() {
  static const bool there = isa() == Isa::kAvx512 && has_amx();
  return there && switched_on;
}

void allow_amx(bool allowed) { switched_on = allowed; }

}  // namespace tokenfusion
