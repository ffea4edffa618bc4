// CPU detection, once per process.
#include "core/isa.hpp"

#include <cstdlib>
#include <string_view>

#include "flashu/flashu.h"

namespace flashu::core {
namespace {

Isa detect() {
#ifdef FLASHU_X86_ISAS
  Isa best = Isa::kBaseline;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    best = Isa::kAvx2;
  if (best == Isa::kAvx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    best = Isa::kAvx512;
  }
  // Every CPU with the first has the second.
  if (best == Isa::kAvx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"))
    best = Isa::kAvx512Bf16;
  const char* wish = std::getenv("FLASHU_ISA");
  if (wish == nullptr) return best;
  for (const Isa lower : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512}) {
    if (lower <= best && std::string_view(wish) == isa_name(lower)) return lower;
  }
  return best;
#else
  return Isa::kBaseline;
#endif
}

}  // namespace

Isa isa() {
  static const Isa value = detect();
  return value;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace flashu::core

extern "C" const char* flashu_cpu_isa(void) { return flashu::core::isa_name(flashu::core::isa()); }
