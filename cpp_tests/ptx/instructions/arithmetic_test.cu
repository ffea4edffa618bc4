// Integer and float arithmetic, comparison, bits and conversions.
#include "device.cuh"

namespace flashu::test {
namespace {

// ---- integers

FLASHU_OP(Add, "add.u32 %0, %1, %2;");
FLASHU_OP(MulHiU, "mul.hi.u32 %0, %1, %2;");
FLASHU_OP(MulHiS, "mul.hi.s32 %0, %1, %2;");
FLASHU_OP(MadLo, "mad.lo.s32 %0, %1, %2, %3;");
FLASHU_OP(MulWideS16, ".reg .b16 x, y; cvt.u16.u32 x, %1; cvt.u16.u32 y, %2; mul.wide.s16 %0, x, y;");
FLASHU_OP(DivS, "div.s32 %0, %1, %2;");
FLASHU_OP(RemS, "rem.s32 %0, %1, %2;");
FLASHU_OP(MinS, "min.s32 %0, %1, %2;");
FLASHU_OP(MaxU, "max.u32 %0, %1, %2;");
FLASHU_OP(AbsS, "abs.s32 %0, %1;");
FLASHU_OP(Sad, "sad.u32 %0, %1, %2, %3;");

TEST(Integers, WrapAndWiden) {
  EXPECT_EQ(each<Three>(Add{}, {{0xffffffffu, 2}, {1, 2}}), (Words{1, 3}));
  EXPECT_EQ(each<Three>(MulHiU{}, {{0xffffffffu, 0xffffffffu}, {0x80000000u, 2}}), (Words{0xfffffffeu, 1}));
  EXPECT_EQ(each<Three>(MulHiS{}, {{0xffffffffu, 0xffffffffu}, {0x80000000u, 2}}), (Words{0, 0xffffffffu}));
  EXPECT_EQ(each<Three>(MadLo{}, {{0xffffffffu, 3, 5}, {65536, 65536, 7}}), (Words{2, 7}));
  EXPECT_EQ(each<Three>(MulWideS16{}, {{0xffff, 2}, {0x8000, 0x8000}}), (Words{0xfffffffeu, 0x40000000u}));
  EXPECT_EQ(each<Three>(Sad{}, {{3, 10, 100}, {10, 3, 100}}), (Words{107, 107}));
}

TEST(Integers, DivideTowardZero) {
  const std::vector<Three> pairs = {{7, 2}, {0xfffffff9u, 2}, {7, 0xfffffffeu}};
  EXPECT_EQ(each<Three>(DivS{}, pairs), (Words{3, 0xfffffffdu, 0xfffffffdu}));
  EXPECT_EQ(each<Three>(RemS{}, pairs), (Words{1, 0xffffffffu, 1}));
}

TEST(Integers, CompareWithTheirSign) {
  EXPECT_EQ(each<Three>(MinS{}, {{0xffffffffu, 1}}), (Words{0xffffffffu}));
  EXPECT_EQ(each<Three>(MaxU{}, {{0xffffffffu, 1}}), (Words{0xffffffffu}));
  EXPECT_EQ(each<Three>(AbsS{}, {{0xfffffffbu}, {5}}), (Words{5, 5}));
}

// ---- floats

FLASHU_OP(AddRn, "add.rn.f32 %0, %1, %2;");
FLASHU_OP(AddRz, "add.rz.f32 %0, %1, %2;");
FLASHU_OP(AddRm, "add.rm.f32 %0, %1, %2;");
FLASHU_OP(AddRp, "add.rp.f32 %0, %1, %2;");
FLASHU_OP(AddSat, "add.sat.f32 %0, %1, %2;");
FLASHU_OP(MulFtz, "mul.ftz.f32 %0, %1, %2;");
FLASHU_OP(Mul, "mul.f32 %0, %1, %2;");
FLASHU_OP(Fma, "fma.rn.f32 %0, %1, %2, %3;");
FLASHU_OP(MinF, "min.f32 %0, %1, %2;");
FLASHU_OP(MaxF, "max.f32 %0, %1, %2;");
FLASHU_OP(MinNan, "min.NaN.f32 %0, %1, %2;");
FLASHU_OP(Copysign, "copysign.f32 %0, %1, %2;");

TEST(Floats, RoundAsTheyAreTold) {
  // 1 + 2^-24 lies half way between two floats, 1 + 2^-25 nearer to 1.
  const std::vector<Three> half = {{bits(1.0f), bits(0x1p-24f)}, {bits(-1.0f), bits(-0x1p-24f)}};
  EXPECT_EQ(each<Three>(AddRn{}, half), (Words{0x3f800000u, 0xbf800000u}));
  EXPECT_EQ(each<Three>(AddRz{}, half), (Words{0x3f800000u, 0xbf800000u}));
  EXPECT_EQ(each<Three>(AddRm{}, half), (Words{0x3f800000u, 0xbf800001u}));
  EXPECT_EQ(each<Three>(AddRp{}, half), (Words{0x3f800001u, 0xbf800000u}));
  // One rounding: (1 + 2^-12)^2 - 1 - 2^-11 = 2^-24.
  EXPECT_EQ(each<Three>(Fma{}, {{bits(0x1.001p0f), bits(0x1.001p0f), bits(-0x1.002p0f)}}),
            (Words{bits(0x1p-24f)}));
}

TEST(Floats, FlushAndSaturate) {
  const std::vector<Three> tiny = {{bits(0x1p-126f), bits(0.5f)}, {bits(-0x1p-126f), bits(0.5f)}};
  EXPECT_EQ(each<Three>(Mul{}, tiny), (Words{0x00400000u, 0x80400000u}));
  EXPECT_EQ(each<Three>(MulFtz{}, tiny), (Words{0, 0x80000000u}));
  EXPECT_EQ(each<Three>(AddSat{}, {{bits(0.75f), bits(0.75f)}, {bits(-1.0f), 0}, {bits(kQuiet), 0}}),
            (Words{bits(1.0f), 0, 0}));
}

TEST(Floats, HandleNanAndSignedZero) {
  EXPECT_EQ(each<Three>(MinF{}, {{bits(kQuiet), bits(2.0f)}, {0, 0x80000000u}, {bits(kQuiet), bits(kQuiet)}}),
            (Words{bits(2.0f), 0x80000000u, kNan}));
  EXPECT_EQ(each<Three>(MaxF{}, {{bits(2.0f), bits(kQuiet)}, {0x80000000u, 0}}), (Words{bits(2.0f), 0}));
  EXPECT_EQ(each<Three>(MinNan{}, {{bits(kQuiet), bits(2.0f)}}), (Words{kNan}));
  EXPECT_EQ(each<Three>(AddRn{}, {{bits(kInfinity), bits(-kInfinity)}}), (Words{kNan}));
  // The sign of the first, the rest of the second.
  EXPECT_EQ(each<Three>(Copysign{}, {{bits(-1.0f), bits(3.0f)}}), (Words{bits(-3.0f)}));
}

FLASHU_OP(Ex2, "ex2.approx.f32 %0, %1;");
FLASHU_OP(Lg2, "lg2.approx.f32 %0, %1;");
FLASHU_OP(Rcp, "rcp.approx.f32 %0, %1;");
FLASHU_OP(Rsqrt, "rsqrt.approx.f32 %0, %1;");
FLASHU_OP(Sqrt, "sqrt.approx.f32 %0, %1;");
FLASHU_OP(DivApprox, "div.approx.f32 %0, %1, %2;");

// The documentation's tables of special values.
TEST(Floats, SpecialValuesOfApproximations) {
  EXPECT_EQ(each<Three>(Ex2{}, {{bits(-kInfinity)}, {0x80000000u}, {0}, {bits(kInfinity)}, {bits(kQuiet)}}),
            (Words{0, bits(1.0f), bits(1.0f), bits(kInfinity), kNan}));
  EXPECT_EQ(each<Three>(Lg2{}, {{bits(-kInfinity)}, {0x80000000u}, {0}, {bits(kInfinity)}}),
            (Words{kNan, bits(-kInfinity), bits(-kInfinity), bits(kInfinity)}));
  EXPECT_EQ(each<Three>(Rcp{}, {{bits(-kInfinity)}, {0x80000000u}, {0}, {bits(kInfinity)}}),
            (Words{0x80000000u, bits(-kInfinity), bits(kInfinity), 0}));
  EXPECT_EQ(each<Three>(Rsqrt{}, {{bits(-1.0f)}, {0x80000000u}, {0}, {bits(kInfinity)}}),
            (Words{kNan, bits(-kInfinity), bits(kInfinity), 0}));
  EXPECT_EQ(each<Three>(Sqrt{}, {{bits(-1.0f)}, {0x80000000u}, {0}, {bits(kInfinity)}}),
            (Words{kNan, 0x80000000u, 0, bits(kInfinity)}));
  // 2^126 < |b| < 2^128: 0, and NaN for an infinite dividend.
  EXPECT_EQ(each<Three>(DivApprox{}, {{bits(8.0f), bits(2.0f)},
                                      {bits(0x1p127f), bits(0x1p127f)},
                                      {bits(kInfinity), bits(0x1p127f)}}),
            (Words{bits(4.0f), 0, kNan}));
}

// ---- pairs of 16-bit floats

FLASHU_OP(AddHalf2, "add.f16x2 %0, %1, %2;");
FLASHU_OP(FmaHalf2, "fma.rn.f16x2 %0, %1, %2, %3;");
FLASHU_OP(FmaBrain2, "fma.rn.bf16x2 %0, %1, %2, %3;");

TEST(Floats, PairsOfSixteenBits) {
  EXPECT_EQ(each<Three>(AddHalf2{}, {{0x3c004000u, 0x3c003c00u}}), (Words{0x40004200u}));  // (2, 1) + (1, 1)
  // 1 + 2^-11 is half way between 1 and the next f16; with more than that it is rounded up.
  EXPECT_EQ(each<Three>(FmaHalf2{}, {{0x10001001u, 0x3c003c00u, 0x3c003c00u}}), (Words{0x3c003c01u}));
  EXPECT_EQ(each<Three>(FmaBrain2{}, {{0x3f803f80u, 0x40003f80u, 0x3f803f80u}}), (Words{0x40404000u}));
}

// ---- comparison

FLASHU_OP(Lt, ".reg .pred p; setp.lt.f32 p, %1, %2; selp.u32 %0, 1, 0, p;");
FLASHU_OP(Ltu, ".reg .pred p; setp.ltu.f32 p, %1, %2; selp.u32 %0, 1, 0, p;");
FLASHU_OP(Ne, ".reg .pred p; setp.ne.f32 p, %1, %2; selp.u32 %0, 1, 0, p;");
FLASHU_OP(Neu, ".reg .pred p; setp.neu.f32 p, %1, %2; selp.u32 %0, 1, 0, p;");
FLASHU_OP(Num, ".reg .pred p; setp.num.f32 p, %1, %2; selp.u32 %0, 1, 0, p;");
FLASHU_OP(GtS, ".reg .pred p; setp.gt.s32 p, %1, %2; selp.u32 %0, 1, 0, p;");
FLASHU_OP(GtU, ".reg .pred p; setp.gt.u32 p, %1, %2; selp.u32 %0, 1, 0, p;");
FLASHU_OP(LtBoth,
          ".reg .pred p, q, r; .reg .b32 x, y; setp.ne.u32 r, %3, 0; setp.lt.and.s32 p|q, %1, %2, r; "
          "selp.u32 x, 1, 0, p; selp.u32 y, 2, 0, q; or.b32 %0, x, y;");

TEST(Compare, OrderedAndUnordered) {
  const std::vector<Three> pairs = {
      {bits(1.0f), bits(2.0f)}, {bits(2.0f), bits(1.0f)}, {bits(kQuiet), bits(1.0f)}};
  EXPECT_EQ(each<Three>(Lt{}, pairs), (Words{1, 0, 0}));
  EXPECT_EQ(each<Three>(Ltu{}, pairs), (Words{1, 0, 1}));
  EXPECT_EQ(each<Three>(Ne{}, pairs), (Words{1, 1, 0}));
  EXPECT_EQ(each<Three>(Neu{}, pairs), (Words{1, 1, 1}));
  EXPECT_EQ(each<Three>(Num{}, pairs), (Words{1, 1, 0}));
  EXPECT_EQ(each<Three>(GtS{}, {{1, 0xffffffffu}}), (Words{1}));
  EXPECT_EQ(each<Three>(GtU{}, {{1, 0xffffffffu}}), (Words{0}));
}

// p = (a < b) and c, q = not (a < b) and c
TEST(Compare, TwoPredicatesWithAThird) {
  EXPECT_EQ(each<Three>(LtBoth{}, {{1, 2, 1}, {2, 1, 1}, {1, 2, 0}, {2, 1, 0}}), (Words{1, 2, 0, 0}));
}

// ---- bits

FLASHU_OP(Prmt, "prmt.b32 %0, %1, %2, %3;");
FLASHU_OP(LopAndOr, "lop3.b32 %0, %1, %2, %3, 0xea;");   // (a & b) | c
FLASHU_OP(LopXor, "lop3.b32 %0, %1, %2, %3, 0x96;");     // a ^ b ^ c
FLASHU_OP(LopChoose, "lop3.b32 %0, %1, %2, %3, 0xca;");  // a ? b : c
FLASHU_OP(ShfLWrap, "shf.l.wrap.b32 %0, %1, %2, %3;");
FLASHU_OP(ShfLClamp, "shf.l.clamp.b32 %0, %1, %2, %3;");
FLASHU_OP(ShfRWrap, "shf.r.wrap.b32 %0, %1, %2, %3;");
FLASHU_OP(ShfRClamp, "shf.r.clamp.b32 %0, %1, %2, %3;");
FLASHU_OP(Shl, "shl.b32 %0, %1, %2;");
FLASHU_OP(ShrU, "shr.u32 %0, %1, %2;");
FLASHU_OP(ShrS, "shr.s32 %0, %1, %2;");
FLASHU_OP(BfeU, "bfe.u32 %0, %1, %2, %3;");
FLASHU_OP(BfeS, "bfe.s32 %0, %1, %2, %3;");
FLASHU_OP(Bfi, "bfi.b32 %0, %1, %2, %3, 8;");
FLASHU_OP(BfindU, "bfind.u32 %0, %1;");
FLASHU_OP(BfindS, "bfind.s32 %0, %1;");
FLASHU_OP(BfindShift, "bfind.shiftamt.u32 %0, %1;");
FLASHU_OP(Brev, "brev.b32 %0, %1;");
FLASHU_OP(Popc, "popc.b32 %0, %1;");
FLASHU_OP(Clz, "clz.b32 %0, %1;");

TEST(Bits, Permute) {
  // Bytes of {b, a} are numbered 7 .. 0; bit 3 of a selector repeats the sign of its byte.
  const uint32_t a = 0x83028180u, b = 0x87068504u;
  EXPECT_EQ(
      each<Three>(Prmt{}, {{a, b, 0x3210}, {a, b, 0x7654}, {a, b, 0x0246}, {a, b, 0x5410}, {a, b, 0xba98}}),
      (Words{0x83028180u, 0x87068504u, 0x80020406u, 0x85048180u, 0xff00ffffu}));
}

TEST(Bits, LogicOfThree) {
  const std::vector<Three> o = {{0xf0f0f0f0u, 0xccccccccu, 0xaaaaaaaau}};
  EXPECT_EQ(each<Three>(LopAndOr{}, o), (Words{0xeaeaeaeau}));
  EXPECT_EQ(each<Three>(LopXor{}, o), (Words{0x96969696u}));
  EXPECT_EQ(each<Three>(LopChoose{}, o), (Words{0xcacacacau}));
}

TEST(Bits, Shifts) {
  const uint32_t a = 0x89abcdefu, b = 0x01234567u;
  EXPECT_EQ(each<Three>(ShfLWrap{}, {{a, b, 8}, {a, b, 40}}), (Words{0x23456789u, 0x23456789u}));
  EXPECT_EQ(each<Three>(ShfLClamp{}, {{a, b, 8}, {a, b, 40}}), (Words{0x23456789u, a}));
  EXPECT_EQ(each<Three>(ShfRWrap{}, {{a, b, 8}, {a, b, 40}}), (Words{0x6789abcdu, 0x6789abcdu}));
  EXPECT_EQ(each<Three>(ShfRClamp{}, {{a, b, 8}, {a, b, 40}}), (Words{0x6789abcdu, b}));
  EXPECT_EQ(each<Three>(Shl{}, {{1, 31}, {1, 32}}), (Words{0x80000000u, 0}));
  EXPECT_EQ(each<Three>(ShrU{}, {{0x80000000u, 31}, {0x80000000u, 32}}), (Words{1, 0}));
  EXPECT_EQ(each<Three>(ShrS{}, {{0x80000000u, 31}, {0x80000000u, 40}}), (Words{0xffffffffu, 0xffffffffu}));
}

TEST(Bits, Fields) {
  EXPECT_EQ(each<Three>(BfeU{}, {{0x12345678u, 8, 8}, {0x12345678u, 28, 8}, {0x12345678u, 4, 0}}),
            (Words{0x56, 1, 0}));
  EXPECT_EQ(each<Three>(BfeS{}, {{0x00000f00u, 8, 4}, {0x00000700u, 8, 4}, {0x80000000u, 28, 8}}),
            (Words{0xffffffffu, 7, 0xfffffff8u}));
  EXPECT_EQ(each<Three>(Bfi{}, {{0xab, 0, 4}, {0xab, 0xffffffffu, 28}}), (Words{0xab0, 0xbfffffffu}));
}

TEST(Bits, Counts) {
  EXPECT_EQ(each<Three>(BfindU{}, {{0x00010000u}, {0}}), (Words{16, 0xffffffffu}));
  EXPECT_EQ(each<Three>(BfindS{}, {{0xfffeffffu}, {0xffffffffu}}), (Words{16, 0xffffffffu}));
  EXPECT_EQ(each<Three>(BfindShift{}, {{0x00010000u}}), (Words{15}));
  EXPECT_EQ(each<Three>(Brev{}, {{1}, {0x80000001u}}), (Words{0x80000000u, 0x80000001u}));
  EXPECT_EQ(each<Three>(Popc{}, {{0xf0f0f0f1u}}), (Words{17}));
  EXPECT_EQ(each<Three>(Clz{}, {{1}, {0}}), (Words{31, 32}));
}

// ---- conversions

FLASHU_OP(CvtRni, "cvt.rni.s32.f32 %0, %1;");
FLASHU_OP(CvtRzi, "cvt.rzi.s32.f32 %0, %1;");
FLASHU_OP(CvtRmi, "cvt.rmi.s32.f32 %0, %1;");
FLASHU_OP(CvtRpi, "cvt.rpi.s32.f32 %0, %1;");
FLASHU_OP(CvtU, "cvt.rzi.u32.f32 %0, %1;");
FLASHU_OP(FloatRni, "cvt.rni.f32.f32 %0, %1;");
FLASHU_OP(FromS, "cvt.rn.f32.s32 %0, %1;");
FLASHU_OP(FromURz, "cvt.rz.f32.u32 %0, %1;");
FLASHU_OP(SatU8, ".reg .b16 x; cvt.sat.u8.s32 x, %1; cvt.u32.u16 %0, x;");
FLASHU_OP(SignS8, "cvt.s32.s8 %0, %1;");
FLASHU_OP(ToHalf, ".reg .b16 x; cvt.rn.f16.f32 x, %1; cvt.u32.u16 %0, x;");
FLASHU_OP(ToHalfRz, ".reg .b16 x; cvt.rz.f16.f32 x, %1; cvt.u32.u16 %0, x;");
FLASHU_OP(ToBrain, ".reg .b16 x; cvt.rn.bf16.f32 x, %1; cvt.u32.u16 %0, x;");
FLASHU_OP(ToBrainRz, ".reg .b16 x; cvt.rz.bf16.f32 x, %1; cvt.u32.u16 %0, x;");
FLASHU_OP(ToBrain2, "cvt.rn.bf16x2.f32 %0, %1, %2;");
FLASHU_OP(ToHalf2Relu, "cvt.rn.relu.f16x2.f32 %0, %1, %2;");
FLASHU_OP(FromHalf, ".reg .b16 x; cvt.u16.u32 x, %1; cvt.f32.f16 %0, x;");
FLASHU_OP(FromBrain, ".reg .b16 x; cvt.u16.u32 x, %1; cvt.f32.bf16 %0, x;");
FLASHU_OP(ToTf32, "cvt.rna.tf32.f32 %0, %1;");

TEST(Convert, FloatsToIntegers) {
  const std::vector<Three> o = {{bits(0.5f)}, {bits(1.5f)},  {bits(-1.5f)},
                                {bits(2.5f)}, {bits(1e10f)}, {bits(kQuiet)}};
  EXPECT_EQ(each<Three>(CvtRni{}, o), (Words{0, 2, 0xfffffffeu, 2, 0x7fffffffu, 0}));
  EXPECT_EQ(each<Three>(CvtRzi{}, o), (Words{0, 1, 0xffffffffu, 2, 0x7fffffffu, 0}));
  EXPECT_EQ(each<Three>(CvtRmi{}, o), (Words{0, 1, 0xfffffffeu, 2, 0x7fffffffu, 0}));
  EXPECT_EQ(each<Three>(CvtRpi{}, o), (Words{1, 2, 0xffffffffu, 3, 0x7fffffffu, 0}));
  EXPECT_EQ(each<Three>(CvtU{}, {{bits(-1.0f)}, {bits(5e9f)}}), (Words{0, 0xffffffffu}));
  EXPECT_EQ(each<Three>(FloatRni{}, {{bits(2.5f)}, {bits(-0.25f)}}), (Words{bits(2.0f), 0x80000000u}));
}

TEST(Convert, IntegersToFloatsAndIntegers) {
  EXPECT_EQ(each<Three>(FromS{}, {{0xffffffffu}, {16777217}}), (Words{bits(-1.0f), bits(16777216.0f)}));
  EXPECT_EQ(each<Three>(FromURz{}, {{0xffffffffu}}), (Words{0x4f7fffffu}));
  EXPECT_EQ(each<Three>(SatU8{}, {{300}, {0xfffffffbu}, {7}}), (Words{255, 0, 7}));
  EXPECT_EQ(each<Three>(SignS8{}, {{0x80}, {0x17f}}), (Words{0xffffff80u, 0x7f}));
}

TEST(Convert, ToSixteenBits) {
  // Ties to even, overflow to infinity (to the largest toward zero), NaN to 0x7fff.
  EXPECT_EQ(each<Three>(ToHalf{}, {{bits(1.0f)},
                                   {bits(0x1.002p0f)},
                                   {bits(0x1.006p0f)},
                                   {bits(65520.0f)},
                                   {bits(kQuiet)},
                                   {bits(0x1p-25f)}}),
            (Words{0x3c00, 0x3c00, 0x3c02, 0x7c00, 0x7fff, 0}));
  EXPECT_EQ(each<Three>(ToHalfRz{}, {{bits(0x1.006p0f)}, {bits(-0x1.006p0f)}, {bits(65520.0f)}}),
            (Words{0x3c01, 0xbc01, 0x7bff}));
  EXPECT_EQ(
      each<Three>(ToBrain{}, {{0x3f808000u}, {0x3f818000u}, {0x3f808001u}, {bits(kQuiet)}, {0x7f7fffffu}}),
      (Words{0x3f80, 0x3f82, 0x3f81, 0x7fff, 0x7f80}));
  EXPECT_EQ(each<Three>(ToBrainRz{}, {{0x3f80ffffu}, {0xbf80ffffu}}), (Words{0x3f80, 0xbf80}));
  // The first source is the upper half.
  EXPECT_EQ(each<Three>(ToBrain2{}, {{bits(1.0f), bits(2.0f)}}), (Words{0x3f804000u}));
  EXPECT_EQ(each<Three>(ToHalf2Relu{}, {{bits(-1.0f), bits(2.0f)}}), (Words{0x00004000u}));
}

TEST(Convert, FromSixteenBits) {
  EXPECT_EQ(each<Three>(FromHalf{}, {{0x3c01}, {0x0001}, {0xfc00}}),
            (Words{bits(0x1.004p0f), bits(0x1p-24f), bits(-kInfinity)}));
  EXPECT_EQ(each<Three>(FromBrain{}, {{0x3f81}, {0x0001}}), (Words{0x3f810000u, 0x00010000u}));
  EXPECT_EQ(each<Three>(ToTf32{}, {{0x3f801000u}, {0x3f800fffu}}), (Words{0x3f802000u, 0x3f800000u}));
}

}  // namespace
}  // namespace flashu::test
