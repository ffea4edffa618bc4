// cp.async: 4, 8 or 16 bytes of a thread, zeros behind the source's end.
#include <cstring>

#include "ptx/machine.hpp"
#include "ptx/numbers.hpp"

namespace ptx {

template <class F>
void Copies::finish_if(F&& due) {
  std::vector<Item> left;
  for (Item& item : items) {
    if (due(item)) {
      item.run();
    } else {
      left.push_back(std::move(item));
    }
  }
  items = std::move(left);
}

void Copies::finish(int lane, u32 keep) {
  finish_if([&](const Item& item) {
    return item.lane == lane && open[lane] >= keep && item.group < open[lane] - keep;
  });
}

void Copies::finish_all(int lane) {
  finish_if([&](const Item& item) { return item.lane == lane; });
}

void Machine::copy(Warp& w, const Instruction& i, u32 mask) {
  lanes(mask, [&](int l) {
    if (i.has("commit_group")) {
      ++w.copies.open[l];
    } else if (i.has("wait_group")) {
      w.copies.finish(l, static_cast<u32>(i.operands[0].value()));
    } else if (i.has("wait_all")) {
      w.copies.finish_all(l);
    } else if (i.has("mbarrier")) {  // arrives when the copies so far are done
      w.copies.finish_all(l);
      if (!i.has("noinc")) refuse(w, i);
      mbarrier_arrive(w, i, l);
    } else {
      copy_lane(w, i, l);
    }
  });
}

// cp.async.{ca,cg}.shared.global [to], [from], bytes[, bytes that are read]
void Machine::copy_lane(Warp& w, const Instruction& i, int lane) {
  const auto at = [&](const Operand& o) { return w.values(o)[lane] + static_cast<u64>(o.offset); };
  const auto bytes = static_cast<u32>(i.operands[2].value());
  const u32 read = i.operands.size() > 3 ? static_cast<u32>(w.values(i.operands[3])[lane]) : bytes;
  if (bytes != 16 && (i.has("cg") || (bytes != 4 && bytes != 8))) fail(w, i, "cp.async: size");
  if (read > bytes) fail(w, i, "cp.async: more bytes than its size", lane);
  const u64 to = at(i.operands[0]), from = at(i.operands[1]);
  if (to % bytes != 0 || from % bytes != 0) fail(w, i, "cp.async: misaligned", lane);
  Block* block = nullptr;
  u8* p = shared_at(w, i, to, bytes, &block);
  if (read > 0) global(w, i, lane, from, read, By::kRead);
  note_copy(w, i, lane, *block, block->offset(p), bytes, false);
  const auto write = [this, &w, lane, block, p, bytes, read, from] {
    std::memset(p, 0, bytes);
    std::memcpy(p, reinterpret_cast<const u8*>(from), read);
    wrote_shared(w, lane, *block, p, bytes);
  };
  const bool late = !now();
  if (late) {
    std::memset(p, 0xff, bytes);  // until it is there
  } else {
    write();
    if (block->races == nullptr) return;
  }
  const auto run = [=, this, &w, &i] {
    if (late) write();
    note_copy(w, i, lane, *block, block->offset(p), bytes, true);
  };
  w.copies.items.push_back({lane, w.copies.open[lane], run, &i});
}

}  // namespace ptx
