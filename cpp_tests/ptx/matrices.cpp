// ldmatrix, stmatrix and mma.sync: matrices whose values are spread over the lanes of a warp.
#include <cstring>

#include "ptx/machine.hpp"
#include "ptx/numbers.hpp"

namespace ptx {

namespace {

// Up to four matrices of 8 x 8 16-bit values; lane 8 m + r has the address of row r of matrix m.
struct Matrices {
  u16 rows[4][8][8];
  int count;
  bool transposed;

  explicit Matrices(const Instruction& i)
      : count(i.has("x4")   ? 4
              : i.has("x2") ? 2
                            : 1),
        transposed(i.has("trans")) {}
  // The two values of matrix m that a lane holds.
  u16& low(int m, int lane) { return at(m, lane / 4, lane % 4 * 2); }
  u16& high(int m, int lane) { return at(m, lane / 4, lane % 4 * 2 + 1); }

 private:
  u16& at(int m, int r, int c) { return transposed ? rows[m][c][r] : rows[m][r][c]; }
};

const Operand& part(const Operand& o, int n) {
  return o.kind == Operand::kVector ? o.sub[static_cast<std::size_t>(n)] : o;
}

u64 row_address(Machine& m, Warp& w, const Instruction& i, const Operand& o, int lane) {
  const u64 at = w.values(o)[lane] + static_cast<u64>(o.offset);
  if (at % 16 != 0) m.fail(w, i, "a row of a matrix is misaligned", lane);
  return at;
}

}  // namespace

void Machine::ldmatrix(Warp& w, const Instruction& i) {
  if (!i.has("m8n8") || i.type != Type::kB16) refuse(w, i);
  Matrices m(i);
  if (counter != nullptr) counter->matrix(w, i, m.count);
  for (int l = 0; l < m.count * 8; ++l) {
    Block* block = nullptr;
    const u8* row = shared_at(w, i, row_address(*this, w, i, i.operands[1], l), 16, &block);
    for (int x = 0; x < 4; ++x)
      note_access(w, i, l % 8 * 4 + x, *block, block->offset(row) + static_cast<u32>(x) * 4, 4,
                  Races::Kind::kRead);
    std::memcpy(m.rows[l / 8][l % 8], row, 16);
  }
  for (int n = 0; n < m.count; ++n) {
    u64* d = w.target(part(i.operands[0], n));
    for (int l = 0; l < kLanes; ++l) d[l] = m.low(n, l) | u32{m.high(n, l)} << 16;
  }
}

void Machine::stmatrix(Warp& w, const Instruction& i) {
  if (!i.has("m8n8") || i.type != Type::kB16) refuse(w, i);
  Matrices m(i);
  if (counter != nullptr) counter->matrix(w, i, m.count);
  for (int n = 0; n < m.count; ++n) {
    const u64* s = w.values(part(i.operands[1], n));
    for (int l = 0; l < kLanes; ++l) {
      m.low(n, l) = static_cast<u16>(s[l]);
      m.high(n, l) = static_cast<u16>(s[l] >> 16);
    }
  }
  for (int l = 0; l < m.count * 8; ++l) {
    Block* block = nullptr;
    u8* row = shared_at(w, i, row_address(*this, w, i, i.operands[0], l), 16, &block);
    std::memcpy(row, m.rows[l / 8][l % 8], 16);
    // Written by the lanes whose values these are, each of which has to fence.
    for (int x = 0; x < 4; ++x) {
      wrote_shared(w, l % 8 * 4 + x, *block, row, 16);
      note_access(w, i, l % 8 * 4 + x, *block, block->offset(row) + static_cast<u32>(x) * 4, 4,
                  Races::Kind::kWrite);
    }
  }
}

// mma.sync.aligned.m16n8k{8,16}.row.col.dtype.atype.btype.ctype d, a, b, c
void Machine::mma(Warp& w, const Instruction& i) {
  const bool wide = i.has("m16n8k16");
  const Type in = i.has("bf16") ? Type::kBf16 : i.has("f16") ? Type::kF16 : Type::kNone;
  const bool half_sums = i.type == Type::kF16;
  const bool known = (wide || i.has("m16n8k8")) && in != Type::kNone && (i.type == Type::kF32 || half_sums);
  if (!known || !i.has("row") || !i.has("col")) refuse(w, i);
  if (!settings.values) return;
  const auto& o = i.operands;
  const auto value = [&](const Operand& from, int n, int l, int half) {
    return static_cast<u16>(w.values(part(from, n))[l] >> (16 * half));
  };
  const int depth = wide ? 16 : 8;
  float a[16][16], b[8][16];
  for (int l = 0; l < kLanes; ++l) {
    const int g = l / 4;
    for (int half = 0; half < 2; ++half) {
      const int k = l % 4 * 2 + half;
      for (int r = 0; r < depth / 4; ++r)
        a[g + r % 2 * 8][k + r / 2 * 8] = element(in, value(o[1], r, l, half));
      for (int r = 0; r < depth / 8; ++r) b[g][k + r * 8] = element(in, value(o[2], r, l, half));
    }
  }
  float result[kLanes][4];
  for (int l = 0; l < kLanes; ++l) {
    for (int r = 0; r < 4; ++r) {
      float sum =
          half_sums ? half_to_float(value(o[3], r / 2, l, r % 2)) : as_float(w.values(part(o[3], r))[l]);
      for (int k = 0; k < depth; ++k) sum += a[l / 4 + r / 2 * 8][k] * b[l % 4 * 2 + r % 2][k];
      result[l][r] = sum;
    }
  }
  for (int r = 0; r < (half_sums ? 2 : 4); ++r) {
    u64* d = w.target(part(o[0], r));
    for (int l = 0; l < kLanes; ++l) {
      d[l] = half_sums ? u64{float_to_half(result[l][2 * r])} | u64{float_to_half(result[l][2 * r + 1])} << 16
                       : as_bits(result[l][r]);
    }
  }
}

}  // namespace ptx
