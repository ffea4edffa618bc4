// What a launch executes and moves, counted exactly from the instructions and addresses that the machine
// sees. Nothing here is a time.
#pragma once

#include <array>
#include <functional>
#include <unordered_map>

#include "ptx/program.hpp"

namespace ptx {

struct Machine;
struct TensorMap;
struct Warp;

// Kinds of instructions.
// clang-format off
enum class Kind : u8 {
  kInteger, kFloat, kSpecial, kConvert, kBranch, kLoadGlobal, kStoreGlobal, kAtomic, kLoadShared, kStoreShared,
  kLdmatrix, kStmatrix, kLocal, kShuffle, kBarrier, kMbarrier, kCpAsync, kTma, kMma, kWgmma, kFence, kOther,
  kFree,  // mov, cvta, parameters: most of them are gone after ptxas
  kKinds
};
// clang-format on
constexpr std::size_t kKinds = static_cast<std::size_t>(Kind::kKinds);
constexpr std::size_t kRoles = 8;  // warpgroups of a block, by their number

// Accesses to global memory: a request is an instruction of a warp, a bulk copy or a box of a tensor; sectors
// are of 32 bytes, each once for a request.
struct GlobalCounts {
  u64 requests = 0, bytes = 0, sectors = 0;
};

// Accesses to shared memory. A wavefront is what 32 banks of 4 bytes give at once; `least` is how many there
// would be without conflicts of banks.
struct SharedCounts {
  u64 requests = 0, wavefronts = 0, least = 0;
};

// 32-byte sectors, each once.
class Sectors {
 public:
  void add(u64 first, u64 last);
  u64 count() const;

 private:
  std::unordered_map<u64, std::array<u64, 2>> pages_;  // of 128 sectors
  u64 last_page_ = ~u64{0};
  std::array<u64, 2>* last_ = nullptr;
};

struct Counts {
  std::array<std::array<u64, kKinds>, kRoles>
      instructions{};  // of warps, also where no lane's predicate holds
  GlobalCounts loads, stores, atomics, copies, box_loads, box_stores;
  SharedCounts shared_loads, shared_stores, shared_copies, ldmatrix, stmatrix;
  u64 multicast_bytes = 0;                 // that boxes brought to further blocks of a cluster
  Sectors read, written;                   // of the whole launch
  std::map<u32, u64> products;             // wgmma of a warpgroup, by its columns
  u64 mma = 0, mma_depth = 0;              // mma.sync of 16 x 8, and the sum of their depths
  u64 product_drains = 0;                  // waits of a warpgroup that leave no product under way
  u64 product_groups = 0;                  // wgmma.commit_group of a warpgroup
  u64 arrivals = 0;                        // threads that arrived at an mbarrier
  std::unordered_map<u64, u64> stages_of;  // by block
  u64 stages = 0;                          // phases that wait for bytes (expect_tx)
  std::array<u64, kRoles> mbarrier_waits{}, product_waits{}, copy_waits{}, barrier_waits{};  // of warps
};

// Counts one launch. The machine calls it where it executes.
class Counter {
 public:
  explicit Counter(const Kernel& kernel);
  // Before an instruction that lanes execute for themselves, and after one of several lanes together.
  void issued(Machine&, Warp&, const Instruction&, u32 mask);
  // ldmatrix and stmatrix, before they overwrite the addresses.
  void matrix(Warp&, const Instruction&, int matrices);
  void box(const TensorMap&, const s64* first, bool load, u32 blocks);
  void bulk(u64 at, u32 bytes, bool load);
  void product(Warp&, u32 columns);
  const Counts& counts() const { return counts_; }

 private:
  void access(Warp&, const Instruction&, u32 mask);
  void global(GlobalCounts&, Sectors&, const u64* at, u32 mask, u32 bytes);
  void shared(SharedCounts&, const u32* at, u32 mask, u32 bytes);

  const Kernel& kernel_;
  std::vector<Kind> kinds_;  // of kernel_.code
  Counts counts_;
  std::unordered_map<std::string, u64> boxes_;  // sectors of boxes that were counted before
};

struct Launch;
// A launch as one line of JSON.
std::string to_json(const Launch&, const Counts&);

// Called for every launch; null counts nothing. FLASHU_PTX_COUNTERS=file appends lines of JSON to a file.
using CountListener = std::function<void(const Launch&, const Counts&)>;
CountListener& count_listener();

}  // namespace ptx
