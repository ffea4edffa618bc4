// PTX text, decoded: modules, kernels and instructions. Nothing is run here.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace ptx {

// Named as the types of PTX.
using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using s8 = std::int8_t;
using s16 = std::int16_t;
using s32 = std::int32_t;
using s64 = std::int64_t;

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// clang-format off
enum class Type : u8 {
  kNone, kPred, kB8, kB16, kB32, kB64, kB128, kU8, kU16, kU32, kU64, kS8, kS16, kS32, kS64,
  kF16, kBf16, kTf32, kF32, kF64, kF16x2, kBf16x2, kE4m3, kE5m2, kE4m3x2, kE5m2x2
};
// clang-format on
int size_of(Type);  // bytes

enum class Space : u8 { kGeneric, kGlobal, kShared, kLocal, kParam, kConst };

// In the order of Unit.
// clang-format off
enum class Op : u8 {
  // arithmetic.cpp
  kAdd, kSub, kMul, kMad, kFma, kDiv, kRem, kNeg, kAbs, kMin, kMax, kSad, kRcp, kSqrt, kRsqrt, kEx2, kLg2, kSin, kCos,
  kTanh, kCopysign, kTestp, kSetp, kSet, kSelp, kSlct,
  // bits.cpp
  kAnd, kOr, kXor, kNot, kCnot, kMov, kShl, kShr, kShf, kLop3, kPrmt, kBfe, kBfi, kBfind, kBrev, kPopc, kClz,
  // convert.cpp
  kCvt,
  // memory.cpp
  kLd, kSt, kAtom, kRed, kCvta, kIsspacep, kMapa, kFence, kCreatepolicy, kNop, kGriddepcontrol, kCpAsync, kCpAsyncBulk,
  // warps.cpp: control, and what several lanes do together or wait for
  kBra, kRet, kExit, kTrap, kCall, kBar, kBarWarp, kBarCluster, kShfl, kVote, kMatch, kRedux, kActivemask, kElect,
  kMbarrier, kWgmma, kLdmatrix, kStmatrix, kMma, kSetmaxnreg, kUnknown
};
// clang-format on
enum class Unit : u8 { kArithmetic, kBits, kConvert, kMemory, kWarp };
Unit unit_of(Op);

enum class Rounding : u8 {
  kNearest,
  kZero,
  kDown,
  kUp,
  kIntNearest,
  kIntZero,
  kIntDown,
  kIntUp,
  kNearestAway
};

enum class Boolean : u8 { kNone, kAnd, kOr, kXor };

// A source is 32 values, one of each lane: a register's, or those of a constant.
struct Operand {
  enum Kind : u8 { kNone, kRegister, kConstant, kMemory, kVector, kSink } kind = kNone;
  bool negated = false;
  int index = -1;             // of the register
  int second = -1;            // p|q
  const u64* pool = nullptr;  // of a constant
  s64 offset = 0;             // of an address
  std::vector<Operand> sub;   // elements of a vector; coordinates of a tensor
  u64 value() const { return pool[0]; }
};

struct Instruction {
  Op op = Op::kUnknown;
  Type type = Type::kNone, type_before = Type::kNone;  // the last one that is named, and the one before
  Space space = Space::kGeneric;
  u8 comparison = 0;  // index in compare()
  Boolean boolean = Boolean::kNone;
  u8 vector = 1;
  Rounding rounding = Rounding::kNearest;
  bool wide = false, hi = false, ftz = false, sat = false, approx = false;
  int guard = -1;  // register of the predicate, -1 without
  bool guard_negated = false;
  int target = -1;  // of a branch
  std::vector<Operand> operands;
  std::vector<std::string> modifiers;  // all of the opcode behind the first dot
  std::string text;
  int line = 0, loc_file = 0, loc_line = 0;
  mutable u64 executed = 0;
  bool has(std::string_view modifier) const {
    for (const auto& m : modifiers) {
      if (m == modifier) return true;
    }
    return false;
  }
};

struct Param {
  std::string name;
  std::size_t offset, size;
};

struct Module;
struct Kernel {
  Module* module = nullptr;
  std::string name;
  std::vector<Param> params;
  std::size_t param_bytes = 0;
  std::vector<u8> param_memory;  // where ld.param reads; its address is a constant of the code
  std::vector<Instruction> code;
  int registers = 0;
  std::map<std::string, int> specials;        // special register or local variable -> hidden register
  std::map<std::string, std::size_t> locals;  // local variable -> offset in the thread's local memory
  std::size_t local_bytes = 0;
  std::size_t static_shared = 0;  // end of static shared memory, from kSharedBase
  std::size_t dynamic_align = 16;
  std::vector<u64*> dynamic_pools;  // constants that hold the dynamic array's address
  int max_threads = 0, min_blocks = 1;
  u32 cluster[3] = {0, 0, 0};
  bool uses_async_proxy = false;
  // The parameters' memory, aligned for what a kernel may assume of them.
  u64 param_base() const { return (reinterpret_cast<u64>(param_memory.data()) + 127) / 128 * 128; }
};

constexpr u32 kSharedBase = 1024;  // what sm_90 keeps for itself

struct Module {
  int target = 0;
  std::map<std::string, std::unique_ptr<Kernel>> kernels;
  struct Global {
    std::unique_ptr<u8[]> memory;
    u8* data;
    std::size_t size;
  };
  std::map<std::string, Global> globals;  // .global and .const
  struct Shared {
    std::size_t size, align;  // size 0: dynamic
  };
  std::map<std::string, Shared> shared;
  std::map<int, std::string> files;
  std::vector<std::unique_ptr<u64[]>> pools;
};

// Throws Error: "PTX line n: ...". An instruction that is not known is an error only when it is run.
std::unique_ptr<Module> parse(std::string_view text);

}  // namespace ptx
