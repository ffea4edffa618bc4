// The machine that runs decoded PTX: a grid of blocks, warps with divergence, asynchronous copies and
// products.
#pragma once

#include <cstdlib>
#include <functional>
#include <random>
#include <set>

#include "ptx/counters.hpp"
#include "ptx/program.hpp"
#include "ptx/races.hpp"

namespace ptx {

constexpr int kLanes = 32;
constexpr u32 kAllLanes = 0xffffffffu;

struct Dim {
  u32 x = 1, y = 1, z = 1;
  u64 count() const { return u64{x} * y * z; }
};

// Asynchronous work is done when it is begun, when nothing else can be done, or at some time.
enum class When { kEager, kLate, kRandom };

struct Settings {
  u64 seed = 0;
  When when = When::kRandom;
  int blocks_at_once = 1;  // clusters, where there are any
  // What goes wrong on some hardware or under some timing only: false lets it pass.
  bool check_proxy = true;  // generic writes that the asynchronous proxy reads are fenced
  bool check_tma = true;    // the rules of TMA that the documentation leaves out: docs/hardware.md, H1 and H2
  bool check_end = true;    // a block waits for its bulk stores before it ends
  bool wgmma_by_warp = true;  // a wait says nothing of the other warps of its group
  bool check_races = false;   // happens-before in shared memory
  bool values = true;         // false: products and boxes of tensors move none, where only counts are wanted
  static Settings from_environment();  // README.md
};
// A whole number in the environment.
int environment(const char* name, int otherwise);

struct Machine;
struct Block;

// Lanes of a warp that are at the same place.
struct Group {
  enum State : u8 { kReady, kRetry, kAtBarrier };
  u32 mask;
  int pc;
  State state = kReady;
  int barrier = 0;
  u64 tried = 0;  // the turn in which it could not go on
};

// Asynchronous work that a thread waits for by groups: cp.async, or bulk stores.
struct Copies {
  struct Item {
    int lane;
    u32 group;
    std::function<void()> run;
    const Instruction* by;
  };
  std::vector<Item> items;
  u32 open[kLanes] = {};  // the number of each lane's open group
  // Does what `lane` has begun, all but its last `keep` committed groups.
  void finish(int lane, u32 keep);
  void finish_all(int lane);

 private:
  template <class F>
  void finish_if(F&& due);
};

struct Product {  // of wgmma, under way
  u32 group;
  u32 number;         // of the warp's products
  bool read = false;  // nothing reads its operands any more
  const Instruction* by;
  u64 a, b;  // descriptors
  bool a_in_registers, trans_a, trans_b, accumulate;
  float scale;
  u32 columns;
  std::vector<u16> values_a, values_b;  // as they were read
};

// What a warp has left to do to registers of sums, in order: a product, or a mov of one that is under way.
struct ProductEvent {
  u32 number;  // of the product; 0: a mov
  int to, from;
  u32 mask;
};

struct Warp {
  Block* block = nullptr;
  int index = 0;
  u32 live = 0;
  std::vector<u64> registers;
  std::vector<u8> local;
  std::vector<Group> groups;
  Copies copies, bulk;
  // wgmma
  std::vector<Product> products;
  u32 products_open = 0, products_begun = 0;
  std::vector<u32> in_flight;  // register -> 1 + group of the product that writes it, 0: none
  bool any_in_flight = false;
  std::vector<ProductEvent> product_events;
  bool fenced = false;
  std::vector<std::pair<u32, int>> unfenced;  // granule, lane
  u64 last_low = 1, last_high = 0;            // the allocation found last
  bool last_written = false;                  // by this warp
  u32 waited = 0;                             // lanes that executed griddepcontrol.wait
  u32 fenced_global = 0;                      // lanes that executed fence.proxy.async for global memory since
  u64 turns = 0;
  s64 register_share = 0;  // of a thread, as setmaxnreg counts them; 0: not known
  int actor = 0;           // among the warps of the cluster
  u32 cluster_rounds = 0;  // arrivals at the barrier of the cluster

  u64* reg(int n) { return registers.data() + static_cast<std::size_t>(n) * kLanes; }
  const u64* values(const Operand& o) { return o.index >= 0 ? reg(o.index) : o.pool; }
  u64* target(const Operand& o) {
    if (o.index < 0) throw Error("no destination");
    return reg(o.index);
  }
  int thread(int lane) const { return index * kLanes + lane; }
};

struct Block {
  u32 id[3] = {};
  u32 rank = 0;  // in its cluster
  std::vector<Block*>* cluster = nullptr;
  u8* shared = nullptr;
  u32 shared_bytes = 0;
  std::vector<Warp> warps;
  struct Barrier {
    Clock clock;
    u32 arrived = 0, expected = 0, sum = 0;
    bool all = true, any = false;
  } barriers[16];
  std::shared_ptr<Races> races;  // of all blocks of the cluster; null: not checked
  u32 races_at = 0;              // where this block's memory begins there
  std::vector<u32> dirty;        // granule of 16 bytes -> 1 + thread whose generic write was not fenced
  s64 spare_registers = 0;       // given back by setmaxnreg.dec

  explicit Block(u32 bytes);
  ~Block() { std::free(shared); }
  Block(const Block&) = delete;
  bool holds(const void* p) const {
    return reinterpret_cast<u64>(p) - reinterpret_cast<u64>(shared) < shared_bytes;
  }
  u32 offset(const void* p) const {
    return static_cast<u32>(reinterpret_cast<u64>(p) - reinterpret_cast<u64>(shared));
  }
  bool ended() const {
    return std::all_of(warps.begin(), warps.end(), [](const Warp& w) { return w.live == 0; });
  }
};

// What kernels wrote that may still run: allocations, by their first address.
struct Written {
  std::set<u64> by_threads, by_bulk_stores;
  bool holds(u64 allocation) const {
    return by_threads.contains(allocation) || by_bulk_stores.contains(allocation);
  }
  void add(const Written& other) {
    by_threads.insert(other.by_threads.begin(), other.by_threads.end());
    by_bulk_stores.insert(other.by_bulk_stores.begin(), other.by_bulk_stores.end());
  }
};

struct Launch {
  Kernel* kernel;
  Dim grid, block, cluster;
  std::size_t dynamic_shared;
  bool overlaps = false;  // launched to begin before the kernel before it has ended
  Written before;         // by the kernels that it may overlap
};

struct Machine {
  Settings settings;
  std::mt19937_64 random;
  const Launch* launch = nullptr;
  Kernel* kernel = nullptr;
  struct Load {
    Block* block;
    std::function<void()> run;
    const Instruction* by;
  };
  std::vector<Load> loads;  // bulk copies to shared memory that have not arrived
  u64 steps = 0;
  Counter* counter = nullptr;  // null: nothing is counted
  Written written;             // by this launch

  explicit Machine(Settings s) : settings(s), random(s.seed) {}
  // Runs a grid. Throws Error, saying where, when it does what it may not.
  void run(const Launch&);

  [[noreturn]] void fail(const Warp&, const Instruction&, const std::string& what, int lane = -1) const;
  [[noreturn]] void refuse(const Warp&, const Instruction&) const;  // what is not modelled
  std::string where(const Instruction&) const;
  bool chance(int one_in) { return random() % static_cast<u64>(one_in) == 0; }
  // Whether asynchronous work is done as soon as it is begun.
  bool now() { return settings.when == When::kEager || (settings.when == When::kRandom && chance(2)); }

  // machine.cpp
  std::unique_ptr<Block> make_block(u64 number, u32 rank, u32 shared_bytes, std::vector<Block*>* cluster);
  void fill_specials(Warp&) const;
  u64 special(const Warp&, const std::string& name, u32 lane) const;
  void run_set(std::vector<std::unique_ptr<Block>>& blocks);
  void check_ended(Block&);
  [[noreturn]] void report_deadlock(std::vector<std::unique_ptr<Block>>& blocks) const;
  bool one_load();

  // warps.cpp: control, and instructions of several lanes. False: not yet.
  bool turn(Warp&, int budget);
  std::size_t pick_group(Warp&, bool fair);
  void merge_groups(Warp&, std::size_t& pick);
  bool advance(Warp&, std::size_t pick, int budget_of_group, int& budget);
  bool branch(Warp&, std::size_t pick, const Instruction&, u32 mask);
  void leave(Warp&, std::size_t pick, u32 mask);
  u32 guarded(Warp&, const Instruction&, u32 mask);
  void execute(Warp&, const Instruction&, u32 mask);
  bool together(Warp&, std::size_t group, const Instruction&);
  bool whole_warp(Warp&, const Instruction&, u32 mask);
  bool setmaxnreg(Warp&, const Instruction&);

  // barriers.cpp
  bool barrier(Warp&, Group&, const Instruction&);
  bool cluster_barrier(Warp&, Group&, const Instruction&);
  void check_other_block(Warp&, const Instruction&, const Block& other) const;
  void release_barrier(Block&, int id);

  // collectives.cpp
  bool collective(Warp&, std::size_t group, const Instruction&);
  u32 meeting(Warp&, const Instruction&, u32 mask);
  void shfl(Warp&, const Instruction&, u32 mask);
  void vote(Warp&, const Instruction&, u32 mask);
  void redux(Warp&, const Instruction&, u32 mask);
  void match(Warp&, const Instruction&, u32 mask);
  void elect(Warp&, const Instruction&, u32 mask);

  // arithmetic.cpp, bits.cpp, convert.cpp, memory.cpp
  void arithmetic(Warp&, const Instruction&, u32 mask);
  void bits(Warp&, const Instruction&, u32 mask);
  void convert(Warp&, const Instruction&, u32 mask);
  void memory(Warp&, const Instruction&, u32 mask);

  // addresses.cpp
  u8* address(Warp&, const Instruction&, int lane, Space, u64 at, u32 bytes, Races::Kind kind);
  // Who accesses global memory.
  enum class By { kRead, kWrite, kBulkRead, kBulkWrite };
  u8* global(Warp&, const Instruction&, int lane, u64 at, u32 bytes, By);
  void check_kernels_before(Warp&, const Instruction&, int lane, u64 allocation, By);
  u8* shared_at(Warp&, const Instruction&, u64 at, u32 bytes, Block** whose = nullptr);

  // checks.cpp
  void check_in_flight(Warp&, const Instruction&, u32 mask);
  void wrote_shared(Warp&, int lane, Block&, const u8* at, u32 bytes);
  void check_async_read(Warp&, const Instruction&, Block&, u32 at, u32 bytes);
  void fence_proxy(Warp&, u32 mask);
  void note_access(Warp&, const Instruction&, int lane, Block&, u32 at, u32 bytes, Races::Kind);
  void note_copy(Warp&, const Instruction&, int lane, Block&, u32 at, u32 bytes, bool done);
  void note_bulk_write(Warp&, const Instruction&, int lane, Block&, u32 at, u32 bytes, u32 barrier);
  Races::Access access_of(Warp&, const Instruction&, int lane, u32 at, u32 bytes, Races::Kind) const;
  void report_race(Warp&, const Instruction&, int lane, u32 at, const char* problem,
                   const Instruction* other) const;

  // mbarrier.cpp
  bool mbarrier(Warp&, const Instruction&, u32 mask);
  u8* mbarrier_at(Warp&, const Instruction&, const Operand&, int lane);
  bool mbarrier_wait(Warp&, const Instruction&, u32 mask);
  void mbarrier_arrive(Warp&, const Instruction&, int lane);
  void complete_bytes(Block&, u8* barrier, s64 bytes);

  // copies.cpp, bulk.cpp, tensor_copies.cpp
  void copy(Warp&, const Instruction&, u32 mask);
  void copy_lane(Warp&, const Instruction&, int lane);
  void bulk(Warp&, const Instruction&, u32 mask);
  void bulk_lane(Warp&, const Instruction&, int lane);
  void bulk_load(Warp&, const Instruction&, int lane);
  void bulk_store(Warp&, const Instruction&, int lane);
  void tensor_load(Warp&, const Instruction&, int lane, int rank);
  void tensor_store(Warp&, const Instruction&, int lane, int rank);

  // wgmma.cpp
  bool wgmma(Warp&, const Instruction&);
  void begin_product(Warp&, const Instruction&);
  void do_products(Warp&);
  void do_product(Warp&, Product&);
  bool wait_products(Warp&, const Instruction&, u32 keep);
  void note_reads(Warp&, const Product&);
  void check_unchanged(Warp&, Product&, const Instruction& waited);

  // matrices.cpp
  void ldmatrix(Warp&, const Instruction&);
  void stmatrix(Warp&, const Instruction&);
  void mma(Warp&, const Instruction&);
};

// An mbarrier object in shared memory.
struct MbarrierWord {
  u64 phase : 1, pending : 20, count : 20;
  s64 bytes : 21;
  u64 magic : 2;
};
static_assert(sizeof(MbarrierWord) == 8);
MbarrierWord load_mbarrier(const u8* at);

// What cuTensorMapEncodeTiled() makes here, in the 128 bytes of a CUtensorMap.
struct TensorMap {
  u64 base;
  u64 sizes[5];
  u64 strides[4];  // bytes
  u16 box[5];
  u16 magic;
  u8 steps[5];
  u8 rank, element_bytes, swizzle, interleave, fill, type;
};
static_assert(sizeof(TensorMap) <= 128);
constexpr u16 kTensorMapMagic = 0x7a5c;

// Exchanges the bits of an address that the swizzle of `width` bytes does: for 128, bits 4-6 ^= bits 7-9.
u32 swizzled(u32 address, int width);

// Memory that kernels may use.
void note_allocation(const void*, std::size_t);
bool forget_allocation(const void*);
bool find_allocation(u64 at, u64* low, u64* high);

}  // namespace ptx
