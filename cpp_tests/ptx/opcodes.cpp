// The words of PTX: types, opcodes and modifiers.
#include "ptx/opcodes.hpp"

#include <unordered_map>

namespace ptx {

namespace {

const std::unordered_map<std::string, Type> kTypes = {
    {"pred", Type::kPred},     {"b8", Type::kB8},     {"b16", Type::kB16},   {"b32", Type::kB32},
    {"b64", Type::kB64},       {"b128", Type::kB128}, {"u8", Type::kU8},     {"u16", Type::kU16},
    {"u32", Type::kU32},       {"u64", Type::kU64},   {"s8", Type::kS8},     {"s16", Type::kS16},
    {"s32", Type::kS32},       {"s64", Type::kS64},   {"f16", Type::kF16},   {"bf16", Type::kBf16},
    {"tf32", Type::kTf32},     {"f32", Type::kF32},   {"f64", Type::kF64},   {"f16x2", Type::kF16x2},
    {"bf16x2", Type::kBf16x2}, {"e4m3", Type::kE4m3}, {"e5m2", Type::kE5m2}, {"e4m3x2", Type::kE4m3x2},
    {"e5m2x2", Type::kE5m2x2}};

const std::unordered_map<std::string, Op> kOps = {{"add", Op::kAdd},
                                                  {"sub", Op::kSub},
                                                  {"mul", Op::kMul},
                                                  {"mad", Op::kMad},
                                                  {"fma", Op::kFma},
                                                  {"div", Op::kDiv},
                                                  {"rem", Op::kRem},
                                                  {"neg", Op::kNeg},
                                                  {"abs", Op::kAbs},
                                                  {"min", Op::kMin},
                                                  {"max", Op::kMax},
                                                  {"and", Op::kAnd},
                                                  {"or", Op::kOr},
                                                  {"xor", Op::kXor},
                                                  {"not", Op::kNot},
                                                  {"cnot", Op::kCnot},
                                                  {"shl", Op::kShl},
                                                  {"shr", Op::kShr},
                                                  {"shf", Op::kShf},
                                                  {"lop3", Op::kLop3},
                                                  {"prmt", Op::kPrmt},
                                                  {"bfe", Op::kBfe},
                                                  {"bfi", Op::kBfi},
                                                  {"bfind", Op::kBfind},
                                                  {"brev", Op::kBrev},
                                                  {"popc", Op::kPopc},
                                                  {"clz", Op::kClz},
                                                  {"setp", Op::kSetp},
                                                  {"set", Op::kSet},
                                                  {"selp", Op::kSelp},
                                                  {"slct", Op::kSlct},
                                                  {"cvt", Op::kCvt},
                                                  {"mov", Op::kMov},
                                                  {"ld", Op::kLd},
                                                  {"ldu", Op::kLd},
                                                  {"st", Op::kSt},
                                                  {"atom", Op::kAtom},
                                                  {"red", Op::kRed},
                                                  {"rcp", Op::kRcp},
                                                  {"sqrt", Op::kSqrt},
                                                  {"rsqrt", Op::kRsqrt},
                                                  {"ex2", Op::kEx2},
                                                  {"lg2", Op::kLg2},
                                                  {"sin", Op::kSin},
                                                  {"cos", Op::kCos},
                                                  {"tanh", Op::kTanh},
                                                  {"copysign", Op::kCopysign},
                                                  {"testp", Op::kTestp},
                                                  {"cvta", Op::kCvta},
                                                  {"isspacep", Op::kIsspacep},
                                                  {"shfl", Op::kShfl},
                                                  {"vote", Op::kVote},
                                                  {"match", Op::kMatch},
                                                  {"redux", Op::kRedux},
                                                  {"activemask", Op::kActivemask},
                                                  {"elect", Op::kElect},
                                                  {"bar", Op::kBar},
                                                  {"membar", Op::kFence},
                                                  {"fence", Op::kFence},
                                                  {"bra", Op::kBra},
                                                  {"ret", Op::kRet},
                                                  {"exit", Op::kExit},
                                                  {"trap", Op::kTrap},
                                                  {"brkpt", Op::kTrap},
                                                  {"call", Op::kCall},
                                                  {"mbarrier", Op::kMbarrier},
                                                  {"wgmma", Op::kWgmma},
                                                  {"ldmatrix", Op::kLdmatrix},
                                                  {"stmatrix", Op::kStmatrix},
                                                  {"mma", Op::kMma},
                                                  {"mapa", Op::kMapa},
                                                  {"setmaxnreg", Op::kSetmaxnreg},
                                                  {"createpolicy", Op::kCreatepolicy},
                                                  {"prefetch", Op::kNop},
                                                  {"prefetchu", Op::kNop},
                                                  {"griddepcontrol", Op::kGriddepcontrol},
                                                  {"nanosleep", Op::kNop},
                                                  {"pmevent", Op::kNop},
                                                  {"applypriority", Op::kNop},
                                                  {"discard", Op::kNop},
                                                  {"sad", Op::kSad}};

const char* const kCompares[] = {"eq", "ne",  "lt",  "le",  "gt",  "ge",  "lo",  "ls",  "hi",
                                 "hs", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"};

const std::unordered_map<std::string, Space> kSpaces = {
    {"global", Space::kGlobal},          {"shared", Space::kShared}, {"shared::cta", Space::kShared},
    {"shared::cluster", Space::kShared}, {"local", Space::kLocal},   {"param", Space::kParam},
    {"param::entry", Space::kParam},     {"const", Space::kConst}};

const std::unordered_map<std::string, Rounding> kRoundings = {
    {"rn", Rounding::kNearest},  {"rz", Rounding::kZero},        {"rm", Rounding::kDown},
    {"rp", Rounding::kUp},       {"rni", Rounding::kIntNearest}, {"rzi", Rounding::kIntZero},
    {"rmi", Rounding::kIntDown}, {"rpi", Rounding::kIntUp},      {"rna", Rounding::kNearestAway}};

Op op_of(const std::string& base, const Instruction& i) {
  if (base == "cp") return i.has("bulk") ? Op::kCpAsyncBulk : Op::kCpAsync;
  if (base == "barrier") return i.has("cluster") ? Op::kBarCluster : Op::kBar;
  if (base == "bar" && i.has("warp")) return Op::kBarWarp;
  const auto found = kOps.find(base);
  return found != kOps.end() ? found->second : Op::kUnknown;
}

}  // namespace

int size_of(Type t) {
  switch (t) {
    case Type::kPred:
    case Type::kB8:
    case Type::kU8:
    case Type::kS8:
    case Type::kE4m3:
    case Type::kE5m2:
      return 1;
    case Type::kB16:
    case Type::kU16:
    case Type::kS16:
    case Type::kF16:
    case Type::kBf16:
    case Type::kE4m3x2:
    case Type::kE5m2x2:
      return 2;
    case Type::kB64:
    case Type::kU64:
    case Type::kS64:
    case Type::kF64:
      return 8;
    case Type::kB128:
      return 16;
    default:
      return 4;
  }
}

Unit unit_of(Op op) {
  if (op < Op::kAnd) return Unit::kArithmetic;
  if (op < Op::kCvt) return Unit::kBits;
  if (op < Op::kLd) return Unit::kConvert;
  return op < Op::kBra ? Unit::kMemory : Unit::kWarp;
}

std::optional<Type> type_named(const std::string& name) {
  const auto found = kTypes.find(name);
  return found != kTypes.end() ? std::optional(found->second) : std::nullopt;
}

void decode(Instruction& i, const std::string& opcode) {
  std::vector<std::string> parts;
  for (std::size_t from = 0;;) {
    const std::size_t dot = opcode.find('.', from);
    parts.push_back(opcode.substr(from, dot - from));
    if (dot == std::string::npos) break;
    from = dot + 1;
  }
  i.modifiers.assign(parts.begin() + 1, parts.end());
  i.op = op_of(parts[0], i);
  for (const std::string& m : i.modifiers) {
    if (const auto type = type_named(m)) {
      i.type_before = i.type;
      i.type = *type;
    } else if (const auto space = kSpaces.find(m); space != kSpaces.end()) {
      i.space = space->second;
    } else if (const auto rounding = kRoundings.find(m); rounding != kRoundings.end()) {
      i.rounding = rounding->second;
    } else if (m == "v2" || m == "v4" || m == "v8") {
      i.vector = static_cast<u8>(m[1] - '0');
    } else if (m == "wide") {
      i.wide = true;
    } else if (m == "hi") {
      i.hi = true;
    } else if (m == "ftz") {
      i.ftz = true;
    } else if (m == "sat") {
      i.sat = true;
    } else if (m == "approx" || m == "full") {
      i.approx = true;
    } else if (m == "cc") {
      i.op = Op::kUnknown;  // carries
    }
  }
  if (i.op == Op::kSetp || i.op == Op::kSet) {
    for (u8 c = 0; c < std::size(kCompares); ++c) {
      if (i.modifiers[0] == kCompares[c]) i.comparison = c;
    }
    i.boolean = i.has("and")   ? Boolean::kAnd
                : i.has("or")  ? Boolean::kOr
                : i.has("xor") ? Boolean::kXor
                               : Boolean::kNone;
  }
}

}  // namespace ptx
