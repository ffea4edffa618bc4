#include "ptx/counters.hpp"

#include <cxxabi.h>

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstring>

#include "ptx/machine.hpp"
#include "ptx/numbers.hpp"

namespace ptx {

namespace {

constexpr u64 kSector = 32;
constexpr u32 kBanks = 32;
constexpr u32 kOffset = 0xffffff;  // of an address of shared memory, see addresses.cpp
constexpr u64 kPageSectors = 128;

constexpr const char* kNames[] = {"integer",     "float",        "special", "convert",     "branch",
                                  "load_global", "store_global", "atomic",  "load_shared", "store_shared",
                                  "ldmatrix",    "stmatrix",     "local",   "shuffle",     "barrier",
                                  "mbarrier",    "cp_async",     "tma",     "mma",         "wgmma",
                                  "fence",       "other",        "free"};
static_assert(std::size(kNames) == kKinds);

bool is_float(Type t) {
  return t == Type::kF16 || t == Type::kBf16 || t == Type::kF32 || t == Type::kF64 || t == Type::kF16x2 ||
         t == Type::kBf16x2;
}

Kind kind_of_load(const Instruction& i) {
  switch (i.space) {
    case Space::kShared:
      return i.op == Op::kLd ? Kind::kLoadShared : Kind::kStoreShared;
    case Space::kLocal:
      return Kind::kLocal;
    case Space::kParam:
    case Space::kConst:
      return Kind::kFree;
    default:
      return i.op == Op::kLd ? Kind::kLoadGlobal : Kind::kStoreGlobal;
  }
}

Kind kind_of(const Instruction& i) {
  switch (i.op) {
    case Op::kMov:
    case Op::kCvta:
    case Op::kNop:
    case Op::kCreatepolicy:
      return Kind::kFree;
    case Op::kDiv:  // of floats: a reciprocal and some more
    case Op::kRcp:
    case Op::kSqrt:
    case Op::kRsqrt:
    case Op::kEx2:
    case Op::kLg2:
    case Op::kSin:
    case Op::kCos:
    case Op::kTanh:
      return is_float(i.type) ? Kind::kSpecial : Kind::kInteger;
    case Op::kCvt:
      return Kind::kConvert;
    case Op::kLd:
    case Op::kSt:
      return kind_of_load(i);
    case Op::kAtom:
    case Op::kRed:
      return Kind::kAtomic;
    case Op::kFence:
      return Kind::kFence;
    case Op::kCpAsync:
      return Kind::kCpAsync;
    case Op::kCpAsyncBulk:
      return Kind::kTma;
    case Op::kBra:
    case Op::kRet:
    case Op::kExit:
    case Op::kTrap:
    case Op::kCall:
      return Kind::kBranch;
    case Op::kBar:
    case Op::kBarWarp:
    case Op::kBarCluster:
      return Kind::kBarrier;
    case Op::kShfl:
    case Op::kVote:
    case Op::kMatch:
    case Op::kRedux:
    case Op::kActivemask:
    case Op::kElect:
      return Kind::kShuffle;
    case Op::kMbarrier:
      return Kind::kMbarrier;
    case Op::kWgmma:
      return Kind::kWgmma;
    case Op::kLdmatrix:
      return Kind::kLdmatrix;
    case Op::kStmatrix:
      return Kind::kStmatrix;
    case Op::kMma:
      return Kind::kMma;
    case Op::kIsspacep:
    case Op::kMapa:
    case Op::kGriddepcontrol:
    case Op::kSetmaxnreg:
    case Op::kUnknown:
      return Kind::kOther;
    default:
      return is_float(i.type) ? Kind::kFloat : Kind::kInteger;
  }
}

// How many times the banks have to give something for these words.
u32 wavefronts_of(std::vector<u32>& words) {
  std::sort(words.begin(), words.end());
  words.erase(std::unique(words.begin(), words.end()), words.end());
  u32 of_bank[kBanks] = {}, most = 0;
  for (const u32 word : words) most = std::max(most, ++of_bank[word % kBanks]);
  return most;
}

}  // namespace

void Sectors::add(u64 first, u64 last) {
  for (u64 sector = first; sector <= last; ++sector) {
    const u64 page = sector / kPageSectors;
    if (page != last_page_ || last_ == nullptr) {
      last_ = &pages_[page];
      last_page_ = page;
    }
    (*last_)[sector % kPageSectors / 64] |= u64{1} << sector % 64;
  }
}

u64 Sectors::count() const {
  u64 n = 0;
  for (const auto& [page, bits] : pages_)
    n += static_cast<u64>(std::popcount(bits[0]) + std::popcount(bits[1]));
  return n;
}

Counter::Counter(const Kernel& kernel) : kernel_(kernel) {
  for (const Instruction& i : kernel.code) kinds_.push_back(kind_of(i));
}

void Counter::issued(Machine&, Warp& w, const Instruction& i, u32 mask) {
  const auto role = std::min<std::size_t>(static_cast<std::size_t>(w.index) / 4, kRoles - 1);
  const Kind kind = kinds_[static_cast<std::size_t>(&i - kernel_.code.data())];
  ++counts_.instructions[role][static_cast<std::size_t>(kind)];
  if (mask == 0) return;
  switch (kind) {
    case Kind::kLoadGlobal:
    case Kind::kStoreGlobal:
    case Kind::kLoadShared:
    case Kind::kStoreShared:
    case Kind::kAtomic:
      return access(w, i, mask);
    case Kind::kCpAsync:
      if (i.has("wait_group") || i.has("wait_all")) {
        ++counts_.copy_waits[role];
      } else if (!i.has("commit_group") && !i.has("mbarrier")) {
        access(w, i, mask);
      }
      return;
    case Kind::kTma:
      if (i.has("wait_group")) ++counts_.copy_waits[role];
      return;
    case Kind::kBarrier:
      if (i.op != Op::kBarWarp && !i.has("arrive")) ++counts_.barrier_waits[role];
      return;
    case Kind::kMbarrier:
      if (i.has("expect_tx")) {
        counts_.stages += static_cast<u64>(std::popcount(mask));
        const u32* id = w.block->id;
        counts_.stages_of[u64{id[2]} << 48 | u64{id[1]} << 32 | id[0]] +=
            static_cast<u64>(std::popcount(mask));
      }
      if (i.modifiers[0] == "arrive") counts_.arrivals += static_cast<u64>(std::popcount(mask));
      if (i.modifiers[0] == "try_wait" || i.modifiers[0] == "test_wait") ++counts_.mbarrier_waits[role];
      return;
    case Kind::kMma:
      ++counts_.mma;
      counts_.mma_depth += i.has("m16n8k16") ? 16 : 8;
      return;
    case Kind::kWgmma:
      if (i.has("wait_group")) ++counts_.product_waits[role];
      if (i.has("commit_group") && w.index % 4 == 0) ++counts_.product_groups;
      if (i.has("wait_group") && i.operands[0].value() == 0 && w.index % 4 == 0) ++counts_.product_drains;
      return;
    default:
      return;
  }
}

void Counter::global(GlobalCounts& counts, Sectors& all, const u64* at, u32 mask, u32 bytes) {
  if (mask == 0) return;
  u64 sectors[kLanes * 2];
  std::size_t n = 0;
  lanes(mask, [&](int l) {
    for (u64 s = at[l] / kSector; s <= (at[l] + bytes - 1) / kSector && n < std::size(sectors); ++s) {
      sectors[n++] = s;
      all.add(s, s);
    }
  });
  std::sort(sectors, sectors + n);
  ++counts.requests;
  counts.bytes += static_cast<u64>(std::popcount(mask)) * bytes;
  counts.sectors += static_cast<u64>(std::unique(sectors, sectors + n) - sectors);
}

// Accesses of 8 bytes are by half warps, of 16 bytes by quarters of a warp.
void Counter::shared(SharedCounts& counts, const u32* at, u32 mask, u32 bytes) {
  if (mask == 0) return;
  const u32 together = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
  ++counts.requests;
  for (u32 first = 0; first < kLanes; first += together) {
    std::vector<u32> words;
    for (u32 l = first; l < first + together; ++l) {
      if ((mask >> l & 1) == 0) continue;
      for (u32 b = 0; b < bytes; b += 4) words.push_back((at[l] + b) / 4);
    }
    if (words.empty()) continue;
    counts.wavefronts += wavefronts_of(words);
    ++counts.least;
  }
}

// ld, st, atom, red and cp.async.
void Counter::access(Warp& w, const Instruction& i, u32 mask) {
  const bool copy = i.op == Op::kCpAsync;
  const Operand& where = i.operands[i.op == Op::kLd || i.op == Op::kAtom || copy ? 1 : 0];
  const u64* values = w.values(where);
  u64 at[kLanes] = {};
  lanes(mask, [&](int l) { at[l] = values[l] + static_cast<u64>(where.offset); });
  if (copy) {
    const Operand& to = i.operands[0];
    const auto bytes = static_cast<u32>(i.operands[2].value());
    const u64* read = i.operands.size() > 3 ? w.values(i.operands[3]) : nullptr;
    u32 offsets[kLanes] = {}, reading = 0;
    lanes(mask, [&](int l) {
      offsets[l] = static_cast<u32>(w.values(to)[l] + static_cast<u64>(to.offset)) & kOffset;
      if (read == nullptr || static_cast<u32>(read[l]) != 0) reading |= 1u << l;
    });
    shared(counts_.shared_copies, offsets, mask, bytes);
    return global(counts_.copies, counts_.read, at, reading, bytes);
  }
  const u32 bytes = static_cast<u32>(size_of(i.type)) * i.vector;
  u32 offsets[kLanes] = {}, to_shared = 0, to_global = 0;
  lanes(mask, [&](int l) {
    if (i.space == Space::kShared) {
      offsets[l] = static_cast<u32>(at[l]) & kOffset;
      to_shared |= 1u << l;
      return;
    }
    if (i.space == Space::kGeneric) {
      for (const Block* b : *w.block->cluster) {
        if (!b->holds(reinterpret_cast<const void*>(at[l]))) continue;
        offsets[l] = b->offset(reinterpret_cast<const void*>(at[l]));
        to_shared |= 1u << l;
        return;
      }
      const u64 parameter = at[l] - reinterpret_cast<u64>(kernel_.param_memory.data());
      if (at[l] - reinterpret_cast<u64>(w.local.data()) < w.local.size() ||
          parameter < kernel_.param_memory.size())
        return;
    }
    to_global |= 1u << l;
  });
  const bool load = i.op == Op::kLd;
  shared(load ? counts_.shared_loads : counts_.shared_stores, offsets, to_shared, bytes);
  GlobalCounts& counts = load ? counts_.loads : i.op == Op::kSt ? counts_.stores : counts_.atomics;
  global(counts, load ? counts_.read : counts_.written, at, to_global, bytes);
}

// Eight rows of 16 bytes for each of the matrices.
void Counter::matrix(Warp& w, const Instruction& i, int matrices) {
  const bool load = i.op == Op::kLdmatrix;
  const Operand& where = i.operands[load ? 1 : 0];
  const u64* values = w.values(where);
  u32 offsets[kLanes] = {};
  for (int l = 0; l < 8 * matrices; ++l)
    offsets[l] = static_cast<u32>(values[l] + static_cast<u64>(where.offset)) & kOffset;
  const u32 mask = matrices == 4 ? kAllLanes : (1u << 8 * matrices) - 1;
  shared(load ? counts_.ldmatrix : counts_.stmatrix, offsets, mask, 16);
}

// The sectors of a box's rows that are inside the tensor. What lies outside is not read.
void Counter::box(const TensorMap& map, const s64* first, bool load, u32 blocks) {
  GlobalCounts& counts = load ? counts_.box_loads : counts_.box_stores;
  u64 bytes = map.element_bytes;
  for (int r = 0; r < map.rank; ++r) bytes *= map.box[r];
  ++counts.requests;
  counts.bytes += bytes;
  if (blocks > 1) counts_.multicast_bytes += bytes * (blocks - 1);
  std::string key(reinterpret_cast<const char*>(&map), sizeof map);
  key.append(reinterpret_cast<const char*>(first), sizeof *first * map.rank);
  key.push_back(load ? 1 : 0);
  const auto [known, is_new] = boxes_.try_emplace(std::move(key), 0);
  if (is_new) {
    Sectors& all = load ? counts_.read : counts_.written;
    u32 n[5] = {};
    const s64 begin = std::max<s64>(first[0], 0);
    const s64 end = std::min<s64>(first[0] + s64{map.box[0]} * map.steps[0], static_cast<s64>(map.sizes[0]));
    for (;;) {
      u64 at = map.base + static_cast<u64>(begin) * map.element_bytes;
      bool inside = begin < end;
      for (int r = 1; r < map.rank; ++r) {
        const s64 x = first[r] + s64{n[r]} * map.steps[r];
        inside = inside && x >= 0 && static_cast<u64>(x) < map.sizes[r];
        at += static_cast<u64>(x) * map.strides[r - 1];
      }
      if (inside) {
        const u64 last = (at + static_cast<u64>(end - begin) * map.element_bytes - 1) / kSector;
        known->second += last - at / kSector + 1;
        all.add(at / kSector, last);
      }
      int r = 1;
      while (r < map.rank && ++n[r] == map.box[r]) n[r++] = 0;
      if (r >= map.rank) break;
    }
  }
  counts.sectors += known->second;
}

void Counter::bulk(u64 at, u32 bytes, bool load) {
  if (bytes == 0) return;
  GlobalCounts& counts = load ? counts_.box_loads : counts_.box_stores;
  ++counts.requests;
  counts.bytes += bytes;
  counts.sectors += (at + bytes - 1) / kSector - at / kSector + 1;
  (load ? counts_.read : counts_.written).add(at / kSector, (at + bytes - 1) / kSector);
}

void Counter::product(Warp& w, u32 columns) {
  if (w.index % 4 == 0) ++counts_.products[columns];
}

// ---- JSON

namespace {

std::string quoted(const std::string& s) {
  std::string out = "\"";
  for (const char c : s) {
    if (c == '"' || c == '\\') out += '\\';
    out += c;
  }
  return out + "\"";
}

std::string demangled(const std::string& name) {
  int status = 0;
  char* const text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  if (text == nullptr) return name;
  std::string s = text;
  std::free(text);
  return s;
}

// An object of JSON, built member by member.
class Object {
 public:
  Object& add(const char* key, const std::string& value) {
    text_ += (text_.empty() ? "{" : ", ") + quoted(key) + ": " + value;
    return *this;
  }
  Object& add(const char* key, u64 value) { return add(key, std::to_string(value)); }
  std::string text() const { return text_.empty() ? "{}" : text_ + "}"; }

 private:
  std::string text_;
};

std::string of(const GlobalCounts& c) {
  return Object().add("requests", c.requests).add("bytes", c.bytes).add("sectors", c.sectors).text();
}
std::string of(const SharedCounts& c) {
  return Object().add("requests", c.requests).add("wavefronts", c.wavefronts).add("least", c.least).text();
}
std::string of(const Dim& d) {
  return "[" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + "]";
}
std::string of(const std::array<u64, kRoles>& by_role) {
  std::size_t n = kRoles;
  while (n > 0 && by_role[n - 1] == 0) --n;
  std::string s;
  for (std::size_t r = 0; r < n; ++r) s += (r == 0 ? "" : ", ") + std::to_string(by_role[r]);
  return "[" + s + "]";
}

}  // namespace

std::string to_json(const Launch& l, const Counts& c) {
  Object kinds, products;
  for (std::size_t kind = 0; kind < kKinds; ++kind) {
    std::array<u64, kRoles> by_role{};
    u64 sum = 0;
    for (std::size_t r = 0; r < kRoles; ++r) sum += by_role[r] = c.instructions[r][kind];
    if (sum != 0) kinds.add(kNames[kind], of(by_role));
  }
  u64 busiest = 0;
  for (const auto& [block, stages] : c.stages_of) busiest = std::max(busiest, stages);
  for (const auto& [columns, n] : c.products) products.add(std::to_string(columns).c_str(), n);
  return Object()
      .add("kernel", quoted(demangled(l.kernel->name)))
      .add("grid", of(l.grid))
      .add("cluster", l.cluster.count())
      .add("threads", l.block.count())
      .add("shared_bytes", l.dynamic_shared + std::max<std::size_t>(l.kernel->static_shared, kSharedBase))
      .add("instructions", kinds.text())
      .add("global", Object()
                         .add("loads", of(c.loads))
                         .add("stores", of(c.stores))
                         .add("atomics", of(c.atomics))
                         .add("copies", of(c.copies))
                         .add("box_loads", of(c.box_loads))
                         .add("box_stores", of(c.box_stores))
                         .text())
      .add("multicast_bytes", c.multicast_bytes)
      .add("distinct", Object().add("read", c.read.count()).add("written", c.written.count()).text())
      .add("shared", Object()
                         .add("loads", of(c.shared_loads))
                         .add("stores", of(c.shared_stores))
                         .add("copies", of(c.shared_copies))
                         .add("ldmatrix", of(c.ldmatrix))
                         .add("stmatrix", of(c.stmatrix))
                         .text())
      .add("wgmma", products.text())
      .add("wgmma_groups", c.product_groups)
      .add("wgmma_drains", c.product_drains)
      .add("mma", c.mma)
      .add("mma_depth", c.mma_depth)
      .add("stages", c.stages)
      .add("stages_of_busiest_block", busiest)
      .add("arrivals", c.arrivals)
      .add("waits", Object()
                        .add("mbarrier", of(c.mbarrier_waits))
                        .add("wgmma", of(c.product_waits))
                        .add("copies", of(c.copy_waits))
                        .add("barrier", of(c.barrier_waits))
                        .text())
      .text();
}

CountListener& count_listener() {
  static CountListener listener = [] {
    const char* const file = std::getenv("FLASHU_PTX_COUNTERS");
    if (file == nullptr) return CountListener();
    return CountListener([name = std::string(file)](const Launch& l, const Counts& c) {
      std::FILE* const f = std::fopen(name.c_str(), "a");
      if (f == nullptr) throw Error("FLASHU_PTX_COUNTERS: cannot write " + name);
      std::fprintf(f, "%s\n", to_json(l, c).c_str());
      std::fclose(f);
    });
  }();
  return listener;
}

}  // namespace ptx
