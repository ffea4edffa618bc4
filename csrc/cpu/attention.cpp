// Attention on the CPU: tasks of a few panels of queries, which meet the keys of their head block after
// block.
#include "cpu/attention.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/attention_kernels.hpp"
#include "cpu/gemm.hpp"

namespace flashu::cpu {
namespace {

using core::AttentionProblem;
using core::Heads;

constexpr int64_t kMostPanels = 4;  // of a task: enough to read keys for, few enough to stay in the cache

const char* at(const Heads& heads, int64_t row, int64_t head, int64_t token, int32_t type) {
  return static_cast<const char*>(heads.data) +
         (row * heads.row + head * heads.head + token * heads.token) * element_bytes(type);
}

// The scratch of a task, in floats.
struct Scratch {
  int64_t rows = 0;    // of one panel or block, [lanes or kKeyBlock][d or kKeyBlock]
  int64_t scores = 0;  // [kKeyBlock][lanes]
  int64_t mask = 0;    // the same
  int64_t panel = 0;   // queries and sums, [d][lanes] each, with [lanes] maxima and totals
  int64_t block = 0;   // keys or values as floats, [kKeyBlock][d]

  Scratch(const AttentionProblem& p, int64_t lanes)
      : rows(align_floats(lanes * std::max(p.d, p.mask == nullptr ? 0 : kKeyBlock))),
        scores(align_floats(kKeyBlock * lanes)),
        mask(p.mask == nullptr ? 0 : scores),
        panel(2 * align_floats(p.d * lanes) + 2 * align_floats(lanes)),
        block(p.type == FLASHU_F32 ? 0 : align_floats(kKeyBlock * p.d)) {}
  int64_t floats(int64_t panels) const { return rows + scores + mask + panels * panel + 2 * block; }
};

// The queries [first, first + count) of a head of keys: the query of head h and token i is i * group + h, so
// that neighbours see the same keys.
struct Queries {
  int64_t first, count;
};

// The task of one row and head of keys.
class Task {
 public:
  Task(const AttentionProblem& problem, const AttentionPlan& plan, const MaskSpan* spans, float* memory)
      : p_(problem),
        kernels_(FLASHU_PICK_ISA(attention_kernels)),
        lanes_(plan.lanes),
        shape_(static_cast<int>(std::find(kernels_.lanes, kernels_.lanes + kPanelShapes, lanes_) -
                                kernels_.lanes)),
        group_(p_.heads / p_.kv_heads),
        scratch_(p_, lanes_),
        spans_(spans),
        rows_(memory),
        scores_(rows_ + scratch_.rows),
        mask_(scores_ + scratch_.scores),
        blocks_(mask_ + scratch_.mask),
        panels_(blocks_ + 2 * scratch_.block) {}

  void run(int64_t row, int64_t kv_head, Queries queries) const {
    const int64_t panels = divide_up(queries.count, lanes_);
    MaskSpan seen[kMostPanels];
    int64_t begin = p_.tokens;
    int64_t end = 0;
    for (int64_t i = 0; i < panels; ++i) {
      const Queries own = part(queries, i);
      start(panel(i), row, kv_head, own);
      seen[i] = span(row, own);
      begin = std::min(begin, seen[i].begin);
      end = std::max(end, seen[i].end);
    }
    for (int64_t key = begin / kKeyBlock * kKeyBlock; key < end; key += kKeyBlock) {
      const int64_t count = std::min(kKeyBlock, end - key);
      const KeyRows block = keys(row, kv_head, key, count);
      for (int64_t i = 0; i < panels; ++i) {
        if (seen[i].begin >= key + count || seen[i].end <= key) continue;
        KeyRows own = block;
        own.count = std::min(count, seen[i].end - key);
        kernels_.attend[shape_](panel(i), own, mask(row, part(queries, i), key, own.count), scores_);
      }
    }
    for (int64_t i = 0; i < panels; ++i) finish(panel(i), row, kv_head, part(queries, i));
  }

 private:
  Queries part(Queries queries, int64_t i) const {
    return {queries.first + i * lanes_, std::min(lanes_, queries.count - i * lanes_)};
  }

  QueryPanel panel(int64_t i) const {
    float* const memory = panels_ + i * scratch_.panel;
    const int64_t floats = align_floats(p_.d * lanes_);
    return {memory, memory + floats, memory + 2 * floats, memory + 2 * floats + align_floats(lanes_)};
  }

  void start(const QueryPanel& panel, int64_t row, int64_t kv_head, Queries queries) const {
    const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(p_.d)));
    for (int64_t j = 0; j < queries.count; ++j) {
      const int64_t q = queries.first + j;
      const char* const from = at(p_.query, row, kv_head * group_ + q % group_, q / group_, p_.type);
      kernels_.widen[p_.type](rows_ + j * p_.d, from, p_.d, scale);
    }
    std::fill(rows_ + queries.count * p_.d, rows_ + lanes_ * p_.d, 0.0f);
    kernels_.transpose(panel.queries, lanes_, rows_, p_.d, lanes_, p_.d);
    std::fill_n(panel.sums, p_.d * lanes_, 0.0f);
    std::fill_n(panel.most, lanes_, -std::numeric_limits<float>::max());
    std::fill_n(panel.total, lanes_, 0.0f);
  }

  const MaskSpan& span_of(int64_t row, int64_t q) const {
    return spans_[row * p_.mask_queries + (p_.mask_queries > 1 ? q / group_ : 0)];
  }

  // What any of the queries sees.
  MaskSpan span(int64_t row, Queries queries) const {
    const int64_t length = p_.lengths == nullptr ? p_.tokens : p_.lengths[row * p_.lengths_stride];
    if (p_.mask == nullptr) return {0, length, 0.0f};
    MaskSpan all{length, 0, 0.0f};
    for (int64_t j = 0; j < queries.count; ++j) {
      const MaskSpan& own = span_of(row, queries.first + j);
      if (own.begin == own.end) continue;
      all.begin = std::min(all.begin, own.begin);
      all.end = std::max(all.end, own.end);
    }
    return all;
  }

  // Keys and values as floats: where they lie, or a copy.
  KeyRows keys(int64_t row, int64_t kv_head, int64_t first, int64_t count) const {
    const char* const key = at(p_.key, row, kv_head, first, p_.type);
    const char* const value = at(p_.value, row, kv_head, first, p_.type);
    if (p_.type == FLASHU_F32) {
      return {reinterpret_cast<const float*>(key),
              p_.key.token,
              reinterpret_cast<const float*>(value),
              p_.value.token,
              count,
              p_.d};
    }
    float* const values = blocks_ + scratch_.block;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t bytes = i * element_bytes(p_.type);
      kernels_.widen[p_.type](blocks_ + i * p_.d, key + bytes * p_.key.token, p_.d, 1.0f);
      kernels_.widen[p_.type](values + i * p_.d, value + bytes * p_.value.token, p_.d, 1.0f);
    }
    return {blocks_, p_.d, values, p_.d, count, p_.d};
  }

  const float* mask(int64_t row, Queries queries, int64_t first, int64_t count) const {
    if (p_.mask == nullptr) return nullptr;
    for (int64_t j = 0; j < lanes_; ++j) {
      const int64_t q = queries.first + std::min(j, queries.count - 1);
      const int64_t offset = row * p_.mask_row + q / group_ * p_.mask_query + first;
      const char* const from = static_cast<const char*>(p_.mask) + offset * element_bytes(p_.type);
      kernels_.widen_mask[p_.type](rows_ + j * kKeyBlock, from, count, span_of(row, q).hidden);
    }
    kernels_.transpose(mask_, lanes_, rows_, kKeyBlock, lanes_, count);
    return mask_;
  }

  void finish(const QueryPanel& panel, int64_t row, int64_t kv_head, Queries queries) const {
    kernels_.transpose(rows_, p_.d, panel.sums, lanes_, p_.d, lanes_);
    for (int64_t j = 0; j < queries.count; ++j) {
      const int64_t q = queries.first + j;
      const char* const to = at(p_.out, row, kv_head * group_ + q % group_, q / group_, p_.type);
      kernels_.narrow[p_.type](const_cast<char*>(to), rows_ + j * p_.d, p_.d, panel.total[j]);
    }
  }

  const AttentionProblem& p_;
  const AttentionKernels& kernels_;
  const int64_t lanes_;
  const int shape_;
  const int64_t group_;
  const Scratch scratch_;
  const MaskSpan* const spans_;
  float* const rows_;
  float* const scores_;
  float* const mask_;
  float* const blocks_;
  float* const panels_;
};

// What every query of every row sees.
void find_spans(const AttentionProblem& p, MaskSpan* spans) {
  const AttentionKernels& kernels = FLASHU_PICK_ISA(attention_kernels);
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, p.tokens));
  core::parallel_for(0, p.rows * p.mask_queries, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = i / p.mask_queries;
      const int64_t length = p.lengths == nullptr ? p.tokens : p.lengths[row * p.lengths_stride];
      const int64_t offset = row * p.mask_row + i % p.mask_queries * p.mask_query;
      spans[i] =
          kernels.span[p.type](static_cast<const char*>(p.mask) + offset * element_bytes(p.type), length);
    }
  });
}

}  // namespace

AttentionPlan plan_attention(const AttentionProblem& p) {
  const AttentionKernels& kernels = FLASHU_PICK_ISA(attention_kernels);
  const int64_t queries = p.heads / p.kv_heads * p.n;
  AttentionPlan s;
  for (const int64_t lanes : kernels.lanes) {
    s.lanes = lanes;
    if (lanes >= queries) break;
  }
  s.slots = slots_for(2.0 * static_cast<double>(p.rows * p.heads * p.n) * static_cast<double>(p.tokens) *
                      static_cast<double>(p.d));
  // Threads should find several tasks each.
  const int64_t panels = divide_up(queries, s.lanes);
  const int64_t per_thread = p.rows * p.kv_heads * panels / (4 * s.slots);
  s.panels = std::clamp<int64_t>(per_thread, 1, kMostPanels);
  s.tasks_of_head = divide_up(panels, s.panels);
  s.slots = std::min(s.slots, p.rows * p.kv_heads * s.tasks_of_head);
  if (p.mask != nullptr)
    s.span_floats = align_floats(divide_up(p.rows * p.mask_queries * int64_t{sizeof(MaskSpan)}, 4));
  s.slot_floats = Scratch(p, s.lanes).floats(s.panels);
  return s;
}

void attention(const AttentionProblem& p, const AttentionPlan& s, void* workspace) {
  auto* const spans = static_cast<MaskSpan*>(workspace);
  float* const scratch = static_cast<float*>(workspace) + s.span_floats;
  if (p.mask != nullptr) find_spans(p, spans);
  const int64_t queries = p.heads / p.kv_heads * p.n;
  const int64_t own = s.panels * s.lanes;
  const int64_t tasks = p.rows * p.kv_heads * s.tasks_of_head;
  core::parallel_for(0, s.slots, 1, [&](int64_t first, int64_t last) {
    for (int64_t slot = first; slot < last; ++slot) {
      const Task task(p, s, spans, scratch + slot * s.slot_floats);
      // By turns: what the queries of a mask see grows from the first to the last.
      for (int64_t i = slot; i < tasks; i += s.slots) {
        const int64_t begin = i % s.tasks_of_head * own;
        const int64_t head = i / s.tasks_of_head;
        task.run(head / p.kv_heads, head % p.kv_heads, {begin, std::min(own, queries - begin)});
      }
    }
  });
}

}  // namespace flashu::cpu
