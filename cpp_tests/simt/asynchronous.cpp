// Asynchronous work, and the fences without which other proxies do not see what threads wrote.
#include <algorithm>

#include "simt/state.hpp"

namespace simt {

std::shared_ptr<Deferred> defer(Kind kind, std::function<void()> work, std::shared_ptr<Deferred> after) {
  const Unseen unseen;
  Engine& e = engine();
  auto deferred = std::make_shared<Deferred>();
  deferred->work = std::move(work);
  deferred->after = std::move(after);
  order_release(deferred.get());
  switch (e.manner.of[static_cast<int>(kind)]) {
    case When::kAtOnce:
      complete(*deferred);
      break;
    case When::kSometime:
      e.sometime.push_back(deferred);
      break;
    case When::kLast:
      if (kind == Kind::kLoad) e.last.push_back(deferred);
      break;  // the others are done when their group is waited for
  }
  return deferred;
}

void complete(Deferred& deferred) {
  if (deferred.done) return;
  if (deferred.after) complete(*deferred.after);
  deferred.done = true;
  as_own_thread(
      [](void* context) {
        auto& own = *static_cast<Deferred*>(context);
        order_acquire(&own);  // what its issuer did before
        if (own.after) order_acquire(&own.after->done);
        own.work();
        order_release(&own.done);
      },
      &deferred);
  deferred.work = nullptr;
  deferred.after = nullptr;
}

void Groups::commit() {
  const Unseen unseen;
  committed_.push_back(std::exchange(open_, {}));
}

void Groups::wait(unsigned pending) {
  finish(pending);
  maybe_yield();
}

void Groups::finish(unsigned pending) {
  const Unseen unseen;
  while (committed_.size() > pending) {
    for (const auto& work : committed_.front()) {
      complete(*work);
      work->waited_for = true;
      order_acquire(&work->done);
    }
    committed_.erase(committed_.begin());
  }
}

Groups& copy_groups() { return self().copies; }
Groups& bulk_groups() { return self().bulks; }
Groups& product_groups() { return self().block->threads[self().linear / kLanes * kLanes]->products; }

void note_generic_write(const void* address, std::size_t bytes, std::shared_ptr<Deferred> copy) {
  const Unseen unseen;
  const auto* begin = static_cast<const char*>(address);
  std::vector<Range>& unfenced = self().unfenced;
  // Kernels without asynchronous readers never fence; the latest writes are enough to find a forgotten one.
  if (unfenced.size() == 512) unfenced.erase(unfenced.begin(), unfenced.begin() + 256);
  unfenced.push_back({begin, begin + bytes, std::move(copy)});
}

void fence_proxy_async() {
  const Unseen unseen;
  std::erase_if(self().unfenced,
                [](const Range& range) { return range.copy == nullptr || range.copy->waited_for; });
  self().unfenced_barriers.clear();
}

void note_initialised(const void* barrier) {
  const Unseen unseen;
  self().unfenced_barriers.push_back(barrier);
}

void fence_initialised() {
  const Unseen unseen;
  self().unfenced_barriers.clear();
}

void check_initialised(const void* barrier, const char* what, const Place& where) {
  const Unseen unseen;
  for (const Block* block : self().block->cluster->blocks) {
    for (const Thread* thread : block->threads) {
      const auto& list = thread->unfenced_barriers;
      if (std::find(list.begin(), list.end(), barrier) != list.end())
        fail(where, std::string(what) + " uses an mbarrier whose initialisation was not fenced");
    }
  }
}

void note_waited_for_previous() {
  const Unseen unseen;
  self().waited_for_previous = true;
  self().fenced_global = false;
}

void note_fenced_global() {
  const Unseen unseen;
  self().fenced_global = true;
}

bool fenced_global() {
  const Unseen unseen;
  return self().fenced_global;
}

bool waited_for_previous() {
  const Unseen unseen;
  return self().waited_for_previous;
}

void check_proxy(const void* address, std::size_t bytes, const char* what, const Place& where) {
  const Unseen unseen;
  const auto* begin = static_cast<const char*>(address);
  for (const Thread* thread : self().block->threads) {
    for (const Range& range : thread->unfenced) {
      if (range.begin < begin + bytes && begin < range.end)
        fail(where, std::string(what) + " reads shared memory that thread " + std::to_string(thread->linear) +
                        " wrote without fence.proxy.async");
    }
  }
}

}  // namespace simt
