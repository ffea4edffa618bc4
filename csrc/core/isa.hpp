// Which instruction set the CPU kernels use. Kernel files are compiled once per set (see
// csrc/cmake/FlashuIsa.cmake), inside namespace flashu::cpu::FLASHU_ISA; FLASHU_PICK_ISA chooses among the
// copies.
#pragma once

#include <cstdint>

namespace flashu::core {

enum class Isa : int32_t { kBaseline, kAvx2, kAvx512, kAvx512Bf16 };

// The best set that this CPU and this build have, lowered by the environment variable FLASHU_ISA if it is
// set.
Isa isa();
const char* isa_name(Isa isa);

}  // namespace flashu::core

// `table` is a constant declared by FLASHU_DECLARE_ISA(Type, table) in each set's namespace.
#ifdef FLASHU_X86_ISAS
#define FLASHU_DECLARE_ISA(type, table) \
  namespace baseline {                  \
  extern const type table;              \
  }                                     \
  namespace avx2 {                      \
  extern const type table;              \
  }                                     \
  namespace avx512 {                    \
  extern const type table;              \
  }                                     \
  namespace avx512_bf16 {               \
  extern const type table;              \
  }
#define FLASHU_PICK_ISA(table)                                                                   \
  (::flashu::core::isa() == ::flashu::core::Isa::kAvx512Bf16 ? ::flashu::cpu::avx512_bf16::table \
   : ::flashu::core::isa() == ::flashu::core::Isa::kAvx512   ? ::flashu::cpu::avx512::table      \
   : ::flashu::core::isa() == ::flashu::core::Isa::kAvx2     ? ::flashu::cpu::avx2::table        \
                                                             : ::flashu::cpu::baseline::table)
#else
#define FLASHU_DECLARE_ISA(type, table) \
  namespace baseline {                  \
  extern const type table;              \
  }
#define FLASHU_PICK_ISA(table) (::flashu::cpu::baseline::table)
#endif
