// Clusters: blocks that meet and use each other's shared memory.
#include "simt/state.hpp"

namespace simt {

namespace {

bool holds(const Block& block, const void* address) {
  const auto* const at = static_cast<const char*>(address);
  return at >= block.dynamic && at < block.dynamic + block.dynamic_bytes;
}

// Two addresses, used in turn, keep the order of one meeting from reaching into the next.
const void* passed_at(const Barrier& barrier) {
  return reinterpret_cast<const char*>(&barrier) + 1 + barrier.phase % 2;
}

void release(Cluster& cluster) {
  Barrier& b = cluster.barrier;
  order_acquire(&b);
  order_release(passed_at(b));
  cluster.met = true;
  b.arrived = 0;
  ++b.phase;
  for (Thread* t : std::exchange(b.waiting, {})) make_ready(t);
}

}  // namespace

unsigned cluster_rank() {
  const Unseen unseen;
  return self().block->rank;
}

unsigned cluster_size() {
  const Unseen unseen;
  return engine().cluster;
}

void cluster_barrier(const Place& where) {
  const Unseen unseen;
  Cluster& cluster = *self().block->cluster;
  Barrier& b = cluster.barrier;
  const void* const passed = passed_at(b);
  order_release(&b);
  if (++b.arrived < cluster.live) {
    b.waiting.push_back(&self());
    park("a barrier of the cluster", where, nullptr);
  } else {
    release(cluster);
    maybe_yield();
  }
  order_acquire(passed);
}

void leave_cluster(Cluster& cluster) {
  --cluster.live;
  if (cluster.barrier.arrived > 0 && cluster.barrier.arrived == cluster.live) release(cluster);
}

void* in_block(void* address, unsigned rank, const Place& where) {
  const Unseen unseen;
  const Block& own = *self().block;
  const Cluster& cluster = *own.cluster;
  if (rank >= cluster.blocks.size()) fail(where, "a block beyond the cluster");
  if (!holds(own, address)) fail(where, "expected an address of the block's dynamic shared memory");
  if (!cluster.met) fail(where, "shared memory of a block of the cluster that may not have begun");
  const Block& other = *cluster.blocks[rank];
  if (other.live == 0) fail(where, "shared memory of a block of the cluster that has ended");
  return other.dynamic + (static_cast<char*>(address) - own.dynamic);
}

void check_lives(const void* address, const char* what, const Place& where) {
  const Unseen unseen;
  Engine& e = engine();
  for (const Block* block : e.running) {
    if (holds(*block, address) && block->live == 0 && e.error.empty())
      e.error = at(where) + ": " + what + " to shared memory of a block that has ended";
  }
}

}  // namespace simt
