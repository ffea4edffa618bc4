// The grid: blocks are made, run in turns and checked when they end.
#include "ptx/machine.hpp"

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace ptx {

namespace {

constexpr u32 kSharedLimit = 228 * 1024;  // of a multiprocessor
constexpr s64 kRegisters = 65536;         // of a multiprocessor
constexpr int kTurn = 400;                // instructions of a warp before others go on

std::size_t local_stride(const Kernel& k) { return (k.local_bytes + 15) / 16 * 16; }

}  // namespace

int environment(const char* name, int otherwise) {
  const char* value = std::getenv(name);
  return value != nullptr ? std::atoi(value) : otherwise;
}

Settings Settings::from_environment() {
  Settings s;
  s.seed = static_cast<u64>(environment("FLASHU_PTX_SEED", 0));
  if (const char* value = std::getenv("FLASHU_PTX_WHEN")) {
    const std::string when = value;
    if (when != "eager" && when != "late" && when != "random")
      throw Error("FLASHU_PTX_WHEN: expected eager, late or random, got " + when);
    s.when = when == "eager" ? When::kEager : when == "late" ? When::kLate : When::kRandom;
  }
  s.blocks_at_once = environment("FLASHU_PTX_BLOCKS", 1);
  s.wgmma_by_warp = environment("FLASHU_PTX_WGMMA_BY_WARP", 0) != 0;
  s.check_tma = environment("FLASHU_PTX_TMA", 1) != 0;
  s.check_races = environment("FLASHU_PTX_RACES", 0) != 0;
  s.values = environment("FLASHU_PTX_VALUES", 1) != 0;
  s.check_end = environment("FLASHU_PTX_END", 1) != 0;
  s.check_proxy = environment("FLASHU_PTX_PROXY", 1) != 0;
  return s;
}

// ---- reports

std::string Machine::where(const Instruction& i) const {
  std::string s = kernel->name.substr(0, 200) + ", PTX line " + std::to_string(i.line);
  const auto& files = kernel->module->files;
  if (const auto f = files.find(i.loc_file); f != files.end() && i.loc_line > 0)
    s += " (" + f->second + ":" + std::to_string(i.loc_line) + ")";
  return s + ": " + i.text;
}

void Machine::fail(const Warp& w, const Instruction& i, const std::string& what, int lane) const {
  const u32* id = w.block->id;
  std::string s = what + "\n  block (" + std::to_string(id[0]) + ", " + std::to_string(id[1]) + ", " +
                  std::to_string(id[2]) + ") warp " + std::to_string(w.index);
  if (lane >= 0) s += " lane " + std::to_string(lane);
  throw Error(s + "\n  " + where(i));
}

void Machine::refuse(const Warp& w, const Instruction& i) const {
  fail(w, i, "an instruction that this machine does not know");
}

void Machine::report_deadlock(std::vector<std::unique_ptr<Block>>& blocks) const {
  std::string s = "deadlock: no thread can go on";
  int said = 0;
  for (const auto& b : blocks) {
    for (const Warp& w : b->warps) {
      for (const Group& g : w.groups) {
        if (said++ == 16) throw Error(s);
        char mask[16];
        std::snprintf(mask, sizeof mask, "%08x", g.mask);
        s += "\n  block " + std::to_string(b->id[0]) + " warp " + std::to_string(w.index) + " lanes " + mask +
             " at " + where(kernel->code[static_cast<std::size_t>(g.pc)]);
      }
    }
  }
  throw Error(s);
}

// ---- launch

Block::Block(u32 bytes) : shared_bytes(bytes), dirty(bytes / 16 + 1) {
  // The window is aligned so that descriptors may be made from the low bits of a generic address.
  void* window = nullptr;
  if (posix_memalign(&window, 1 << 24, bytes) != 0) throw std::bad_alloc();
  shared = static_cast<u8*>(window);
  std::memset(shared, 0xff, bytes);  // NaN
}

void Machine::run(const Launch& l) {
  launch = &l;
  kernel = l.kernel;
  const Kernel& k = *l.kernel;
  if (k.max_threads != 0 && l.block.count() > static_cast<u64>(k.max_threads))
    throw Error(k.name + ": more threads than .maxntid");
  const std::size_t fixed = std::max<std::size_t>(k.static_shared, kSharedBase);
  const std::size_t dynamic = (fixed + k.dynamic_align - 1) / k.dynamic_align * k.dynamic_align;
  for (u64* p : k.dynamic_pools) std::fill_n(p, kLanes, dynamic);
  const auto shared_bytes = static_cast<u32>(dynamic + l.dynamic_shared);
  if (shared_bytes > kSharedLimit) {
    throw Error(k.name + ": " + std::to_string(shared_bytes) +
                " bytes of shared memory (static, aligned, dynamic and 1 KiB)");
  }
  const u64 waited = [&] {
    u64 n = 0;
    for (const Instruction& i : k.code) n += i.op == Op::kGriddepcontrol && i.has("wait") ? i.executed : 0;
    return n;
  }();
  const u64 total = l.grid.count();
  for (u64 next = 0; next < total;) {
    std::vector<std::unique_ptr<Block>> blocks;
    std::vector<std::unique_ptr<std::vector<Block*>>> clusters;
    for (int n = 0; n < settings.blocks_at_once && next < total; ++n) {
      clusters.push_back(std::make_unique<std::vector<Block*>>());
      for (u32 rank = 0; rank < l.cluster.count(); ++rank)
        blocks.push_back(make_block(next++, rank, shared_bytes, clusters.back().get()));
    }
    run_set(blocks);
  }
  u64 waits = 0;
  for (const Instruction& i : k.code) waits += i.op == Op::kGriddepcontrol && i.has("wait") ? i.executed : 0;
  if (l.overlaps && waits == waited)
    throw Error(k.name + ": launched to overlap the kernel before, but does not wait for it");
}

std::unique_ptr<Block> Machine::make_block(u64 number, u32 rank, u32 shared_bytes,
                                           std::vector<Block*>* cluster) {
  const Launch& l = *launch;
  auto block = std::make_unique<Block>(shared_bytes);
  // Clusters are along x only, so they are numbered like blocks.
  block->id[0] = static_cast<u32>(number % l.grid.x);
  block->id[1] = static_cast<u32>(number / l.grid.x % l.grid.y);
  block->id[2] = static_cast<u32>(number / l.grid.x / l.grid.y);
  block->rank = rank;
  block->cluster = cluster;
  cluster->push_back(block.get());
  const auto threads = static_cast<u32>(l.block.count());
  block->warps.resize((threads + kLanes - 1) / kLanes);
  if (settings.check_races) {
    const auto count = static_cast<u32>(l.cluster.count());
    block->races = rank > 0 ? (*cluster)[0]->races
                            : std::make_shared<Races>(shared_bytes * count, block->warps.size() * count);
    block->races_at = shared_bytes * rank;
  }
  for (std::size_t n = 0; n < block->warps.size(); ++n) {
    Warp& w = block->warps[n];
    w.block = block.get();
    w.index = static_cast<int>(n);
    w.actor = static_cast<int>(rank * block->warps.size() + n);
    const u32 left = threads - static_cast<u32>(n) * kLanes;
    w.live = left >= kLanes ? kAllLanes : (1u << left) - 1;
    const auto registers = static_cast<std::size_t>(kernel->registers);
    w.registers.assign(registers * kLanes, 0xbadbadbadbadbadbull);
    if (kernel->uses_async_proxy) w.in_flight.resize(registers);
    w.local.assign(local_stride(*kernel) * kLanes + 64, 0xff);
    // What ptxas gives a kernel with setmaxnreg: all that its launch bounds leave.
    if (kernel->max_threads > 0)
      w.register_share = std::min<s64>(255, kRegisters / (kernel->max_threads * kernel->min_blocks)) / 8 * 8;
    w.groups = {Group{w.live, 0}};
    fill_specials(w);
  }
  return block;
}

void Machine::fill_specials(Warp& w) const {
  const u64 local = (reinterpret_cast<u64>(w.local.data()) + 63) / 64 * 64;
  for (const auto& [name, reg] : kernel->specials) {
    const auto variable = kernel->locals.find(name);
    for (u32 lane = 0; lane < kLanes; ++lane) {
      w.reg(reg)[lane] = variable == kernel->locals.end()
                             ? special(w, name, lane)
                             : local + lane * local_stride(*kernel) + variable->second;
    }
  }
}

u64 Machine::special(const Warp& w, const std::string& name, u32 lane) const {
  const Launch& l = *launch;
  const auto along = [&](u32 x, u32 y, u32 z) { return name.back() == 'x' ? x : name.back() == 'y' ? y : z; };
  const auto is = [&](const char* base) {
    return name.size() == std::string_view(base).size() + 2 && name.starts_with(base);
  };
  const u32 t = static_cast<u32>(w.thread(static_cast<int>(lane)));
  const auto* id = w.block->id;
  const auto cluster = static_cast<u32>(l.cluster.count());
  if (is("%tid")) return along(t % l.block.x, t / l.block.x % l.block.y, t / l.block.x / l.block.y);
  if (is("%ntid")) return along(l.block.x, l.block.y, l.block.z);
  if (is("%ctaid")) return along(id[0], id[1], id[2]);
  if (is("%nctaid")) return along(l.grid.x, l.grid.y, l.grid.z);
  if (is("%cluster_ctaid")) return along(w.block->rank, 0, 0);
  if (is("%cluster_nctaid")) return along(cluster, 1, 1);
  if (is("%clusterid")) return along(id[0] / cluster, id[1], id[2]);
  if (is("%nclusterid")) return along(l.grid.x / cluster, l.grid.y, l.grid.z);
  if (name == "%cluster_ctarank") return w.block->rank;
  if (name == "%cluster_nctarank") return cluster;
  if (name == "%laneid") return lane;
  if (name == "%warpid") return static_cast<u64>(w.index);
  if (name == "%lanemask_lt") return (1u << lane) - 1;
  if (name == "%lanemask_le") return (2u << lane) - 1;
  if (name == "%lanemask_eq") return 1u << lane;
  if (name == "%lanemask_ge") return ~((1u << lane) - 1);
  if (name == "%lanemask_gt") return ~((2u << lane) - 1);
  if (name == "%dynamic_smem_size") return l.dynamic_shared;
  if (name == "%smid") return id[0];
  if (name == "%clock" || name == "%clock64" || name == "%globaltimer") return 0;
  throw Error("special register " + name + " is not modelled");
}

// ---- running

void Machine::run_set(std::vector<std::unique_ptr<Block>>& blocks) {
  std::vector<Warp*> warps;
  for (const auto& b : blocks) {
    for (Warp& w : b->warps) warps.push_back(&w);
  }
  for (;;) {
    bool live = false, progress = false;
    std::shuffle(warps.begin(), warps.end(), random);
    for (Warp* w : warps) {
      if (w->live == 0) continue;
      live = true;
      progress |= turn(*w, settings.when == When::kEager ? kTurn : static_cast<int>(1 + random() % kTurn));
      if (settings.when == When::kRandom && chance(3)) progress |= one_load();
    }
    if (!live) break;
    if (!progress && !one_load()) report_deadlock(blocks);
  }
  for (const auto& b : blocks) check_ended(*b);
}

// Nothing of a block is under way when it ends.
void Machine::check_ended(Block& block) {
  for (const Load& p : loads) {
    if (p.block == &block) throw Error("a block ended before its bulk load arrived\n  " + where(*p.by));
  }
  for (Warp& w : block.warps) {
    if (settings.check_end && !w.bulk.items.empty()) {
      throw Error("a block ended while a bulk store may still read its shared memory\n  " +
                  where(*w.bulk.items[0].by));
    }
    if (!w.products.empty())
      throw Error("a block ended before its products were waited for\n  " + where(*w.products[0].by));
    for (const Copies::Item& item : w.bulk.items) item.run();
  }
}

// Lets a bulk copy to shared memory arrive.
bool Machine::one_load() {
  if (loads.empty()) return false;
  const auto n = static_cast<std::ptrdiff_t>(random() % loads.size());
  const auto run = std::move(loads[static_cast<std::size_t>(n)].run);
  loads.erase(loads.begin() + n);
  run();
  return true;
}

}  // namespace ptx
