// wgmma: products of a warpgroup, whose operands are in shared memory and whose sums are under way until
// waited for.
#include <algorithm>

#include "ptx/machine.hpp"
#include "ptx/numbers.hpp"

namespace ptx {

namespace {

constexpr u32 kDepth = 16;
constexpr u32 kRows = 16;  // of A, for each warp

// A descriptor: where a matrix of 16-bit values is in shared memory.
struct Matrix {
  u32 start, leading, stride;
  int width;  // of the swizzle, 0 for none
  u32 base_offset;
  bool by_depth;  // M or N is what is contiguous ("transposed")

  Matrix(u64 d, bool transposed) : by_depth(transposed) {
    const auto field = [&](int bit) { return static_cast<u32>(d >> bit & 0x3fff) << 4; };
    start = field(0);
    leading = field(16);
    stride = field(32);
    base_offset = static_cast<u32>(d >> 49 & 7) << 7;
    constexpr int kWidths[] = {0, 128, 64, 32};
    width = kWidths[d >> 62];
  }
  // Shared address of value k of row (column) n. Core matrices are 8 x 16 bytes.
  u32 at(u32 n, u32 k) const {
    const auto bytes = static_cast<u32>(width);
    u32 a = start;
    if (!by_depth && width == 0) a += n / 8 * stride + n % 8 * 16 + k / 8 * leading + k % 8 * 2;
    if (!by_depth && width != 0) a += n / 8 * stride + n % 8 * bytes + k * 2;
    if (by_depth && width == 0) a += n / 8 * stride + n % 8 * 2 + k % 8 * 16 + k / 8 * leading;
    if (by_depth && width != 0)
      a += n / (bytes / 2) * leading + n % (bytes / 2) * 2 + k % 8 * bytes + k / 8 * stride;
    return swizzled(a + base_offset, width) - base_offset;
  }
};

// wgmma.mma_async.sync.aligned.mMnNkK.dtype.atype.btype d, a, b, scale-d, imm-scale-a, imm-scale-b[,
// imm-trans-a], [imm-trans-b]: the number behind `letter` in the shape.
u32 dimension(const Instruction& i, char letter) {
  for (const std::string& m : i.modifiers) {
    if (m.starts_with("m64n")) return static_cast<u32>(std::atoi(m.c_str() + m.rfind(letter) + 1));
  }
  return 0;
}

// The warps that begin and wait for products together.
std::pair<std::size_t, std::size_t> warps_of_group(const Warp& w, bool by_warp) {
  const auto index = static_cast<std::size_t>(w.index);
  return by_warp ? std::pair(index, index + 1) : std::pair(index / 4 * 4, index / 4 * 4 + 4);
}

u32 first_row(const Warp& w) { return static_cast<u32>(w.index) % 4 * kRows; }

// A from registers: as for mma.sync.m16n8k16.
std::vector<u16> values_of_registers(Warp& w, const Operand& a) {
  std::vector<u16> values(kRows * kDepth);
  for (u32 l = 0; l < kLanes; ++l) {
    for (u32 r = 0; r < 4; ++r) {
      const u64 pair = w.values(a.sub[r])[l];
      const u32 row = l / 4 + r % 2 * 8, k = l % 4 * 2 + r / 2 * 8;
      values[row * kDepth + k] = static_cast<u16>(pair);
      values[row * kDepth + k + 1] = static_cast<u16>(pair >> 16);
    }
  }
  return values;
}

}  // namespace

bool Machine::wgmma(Warp& w, const Instruction& i) {
  if (i.has("fence")) {
    w.fenced = true;
  } else if (i.has("commit_group")) {
    ++w.products_open;
  } else if (i.has("wait_group")) {
    return wait_products(w, i, static_cast<u32>(i.operands[0].value()));
  } else {
    begin_product(w, i);
  }
  return true;
}

void Machine::begin_product(Warp& w, const Instruction& i) {
  if (launch->block.count() % 128 != 0) fail(w, i, "wgmma without whole warpgroups");
  if (!w.fenced) fail(w, i, "wgmma before wgmma.fence");
  const u32 columns = dimension(i, 'n');
  const bool known = (i.type == Type::kBf16 || i.type == Type::kF16) && i.type_before == i.type;
  if (!known || dimension(i, 'k') != kDepth || columns == 0) refuse(w, i);
  const auto& o = i.operands;
  if (o[0].sub.size() != columns / (i.has("f32") ? 2 : 4)) fail(w, i, "wgmma: the number of registers");
  const auto uniform = [&](std::size_t n, u64 otherwise) {
    if (n >= o.size()) return otherwise;
    const u64* p = w.values(o[n]);
    for (int l = 1; l < kLanes; ++l) {
      if (p[l] != p[0]) fail(w, i, "wgmma: an operand differs between lanes", l);
    }
    return p[0];
  };
  const auto scale = [&](std::size_t n) { return static_cast<float>(static_cast<s32>(uniform(n, 1))); };
  Product p{};
  p.a_in_registers = o[1].kind == Operand::kVector;
  p.group = w.products_open;
  p.number = ++w.products_begun;
  p.by = &i;
  p.a = p.a_in_registers ? 0 : uniform(1, 0);
  p.b = uniform(2, 0);
  p.accumulate = (uniform(3, 1) & 1) != 0;
  p.scale = scale(4) * scale(5);
  p.trans_a = !p.a_in_registers && uniform(6, 0) != 0;
  p.trans_b = uniform(p.a_in_registers ? 6 : 7, 0) != 0;
  p.columns = columns;
  if (counter != nullptr) counter->product(w, columns);
  if (p.a_in_registers && settings.values) p.values_a = values_of_registers(w, o[1]);
  for (const Operand& d : o[0].sub) w.in_flight[static_cast<std::size_t>(d.index)] = p.group + 1;
  for (const Operand& a : o[1].sub) w.in_flight[static_cast<std::size_t>(a.index)] = p.group + 1;
  w.any_in_flight = true;
  w.product_events.push_back({p.number, 0, 0, 0});
  w.products.push_back(std::move(p));
  do_products(w);
}

// Products are done when all four warps of the group have begun them.
void Machine::do_products(Warp& w) {
  auto& warps = w.block->warps;
  const auto [from, to] = warps_of_group(w, settings.wgmma_by_warp);
  u32 begun = ~0u;
  for (std::size_t n = from; n < to; ++n) begun = std::min(begun, warps[n].products_begun);
  for (std::size_t n = from; n < to; ++n) {
    Warp& x = warps[n];
    std::ptrdiff_t done = 0;
    for (const ProductEvent& e : x.product_events) {
      if (e.number > begun) break;
      ++done;
      if (e.number == 0) {
        lanes(e.mask, [&](int l) { x.reg(e.to)[l] = x.reg(e.from)[l]; });
        continue;
      }
      for (Product& p : x.products) {
        if (p.number == e.number) do_product(x, p);
      }
    }
    x.product_events.erase(x.product_events.begin(), x.product_events.begin() + done);
  }
}

void Machine::do_product(Warp& w, Product& p) {
  if (!settings.values) return;
  const Instruction& i = *p.by;
  Block& block = *w.block;
  const auto fetch = [&](const Matrix& m, u32 row, u32 k) {
    const u32 at = m.at(row, k);
    if (at < kSharedBase || at + 2 > block.shared_bytes)
      fail(w, i, "wgmma reads outside shared memory, at " + std::to_string(at));
    if (block.dirty[at / 16] != 0) check_async_read(w, i, block, at, 2);
    u16 v;
    std::memcpy(&v, block.shared + at, sizeof v);
    return v;
  };
  const auto fetch_all = [&](u64 descriptor, bool transposed, u32 first, u32 rows) {
    const Matrix m(descriptor, transposed);
    std::vector<u16> values(rows * kDepth);
    for (u32 n = 0; n < values.size(); ++n) values[n] = fetch(m, first + n / kDepth, n % kDepth);
    return values;
  };
  if (!p.a_in_registers) p.values_a = fetch_all(p.a, p.trans_a, first_row(w), kRows);
  p.values_b = fetch_all(p.b, p.trans_b, 0, p.columns);
  static thread_local float left[kRows][kDepth], right[256][kDepth];
  for (u32 n = 0; n < kRows * kDepth; ++n) left[n / kDepth][n % kDepth] = element(i.type, p.values_a[n]);
  for (u32 n = 0; n < p.columns * kDepth; ++n) right[n / kDepth][n % kDepth] = element(i.type, p.values_b[n]);
  note_reads(w, p);
  for (const Product& first : block.warps[static_cast<std::size_t>(w.index) / 4 * 4].products) {
    if (first.number == p.number && (first.a != p.a || first.b != p.b))
      fail(w, i, "wgmma: a descriptor differs between the warps of the group");
  }
  const bool half_sums = !i.has("f32");  // f16: two to a register
  for (u32 l = 0; l < kLanes; ++l) {
    for (u32 r = 0; r < p.columns / 2; ++r) {
      const float* x = left[l / 4 + r / 2 % 2 * 8];
      const float* y = right[r / 4 * 8 + l % 4 * 2 + r % 2];
      float sum = 0;
      for (u32 k = 0; k < kDepth; ++k) sum += x[k] * y[k];
      sum *= p.scale;
      u64& to = w.reg(i.operands[0].sub[half_sums ? r / 2 : r].index)[l];
      if (!half_sums) {
        to = as_bits(p.accumulate ? as_float(to) + sum : sum);
        continue;
      }
      const u32 shift = r % 2 * 16;
      const float old = p.accumulate ? half_to_float(static_cast<u16>(to >> shift)) : 0;
      to = (to & ~(u64{0xffff} << shift)) | u64{float_to_half(old + sum)} << shift;
    }
  }
}

// For the check of order: the operands are read when the product begins and until it is waited for.
void Machine::note_reads(Warp& w, const Product& p) {
  if (w.block->races == nullptr) return;
  const auto note = [&](u64 descriptor, bool transposed, u32 first, u32 rows) {
    const Matrix m(descriptor, transposed);
    for (u32 n = 0; n < rows * kDepth; ++n)
      note_access(w, *p.by, Races::kAllOfWarp, *w.block, m.at(first + n / kDepth, n % kDepth), 2,
                  Races::Kind::kRead);
  };
  if (!p.a_in_registers) note(p.a, p.trans_a, first_row(w), kRows);
  note(p.b, p.trans_b, 0, p.columns);
}

// The hardware may have read the operands at any time until they were waited for.
void Machine::check_unchanged(Warp& w, Product& p, const Instruction& waited) {
  const auto same = [&](u64 descriptor, bool transposed, u32 first, const std::vector<u16>& values) {
    const Matrix m(descriptor, transposed);
    for (u32 n = 0; n < values.size(); ++n) {
      u16 v;
      std::memcpy(&v, w.block->shared + m.at(first + n / kDepth, n % kDepth), sizeof v);
      if (v == values[n]) continue;
      fail(w, *p.by,
           "shared memory that wgmma reads was changed before it was waited for at PTX line " +
               std::to_string(waited.line));
    }
  };
  if (!p.a_in_registers) same(p.a, p.trans_a, first_row(w), p.values_a);
  same(p.b, p.trans_b, 0, p.values_b);
  p.read = true;
  p.values_a.clear();
  p.values_b.clear();
}

// A product is one of the whole warpgroup: it is complete when its four warps have begun it, and then for all
// of them. Each warp's registers are its own again at its own wait.
bool Machine::wait_products(Warp& w, const Instruction& i, u32 keep) {
  const u32 done = w.products_open >= keep ? w.products_open - keep : 0;  // groups below are waited for
  u32 number = 0;
  for (const Product& p : w.products) number = std::max(number, p.group < done ? p.number : 0);
  auto& warps = w.block->warps;
  const auto [from, to] = warps_of_group(w, settings.wgmma_by_warp);
  for (std::size_t n = from; n < to; ++n) {
    if (warps[n].products_begun < number) return false;
  }
  for (std::size_t n = from; n < to; ++n) {
    for (Product& p : warps[n].products) {
      if (p.number <= number && !p.read) check_unchanged(warps[n], p, i);
    }
  }
  for (const Product& p : w.products) {
    if (p.group < done) note_reads(w, p);
  }
  std::erase_if(w.products, [&](const Product& p) { return p.group < done; });
  w.any_in_flight = false;
  for (u32& group : w.in_flight) {
    if (group != 0 && group - 1 < done) group = 0;
    w.any_in_flight = w.any_in_flight || group != 0;
  }
  if (w.products.empty()) w.fenced = false;  // registers may be written; a fence is due before the next
  return true;
}

}  // namespace ptx
