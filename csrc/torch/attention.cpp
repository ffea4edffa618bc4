// torch adapter of attention: views in, C API, output and workspace from torch's allocator.
#include "flashu/attention.h"

#include "api/attention_plan.hpp"
#include "torch/planned.hpp"

namespace flashu::torch_ops {
namespace {

using OptionalTensor = std::optional<Tensor>;

Tensor attention_into(const Tensor& query, const Tensor& key, const Tensor& value,
                      const OptionalTensor& lengths, const OptionalTensor& mask, const Tensor& out) {
  const char* op = "attention";
  auto args = make_args<flashu_attention_args>(query);
  args.query = view(op, "query", query);
  args.key = view(op, "key", key);
  args.value = view(op, "value", value);
  args.lengths = view(op, "lengths", lengths);
  args.mask = view(op, "mask", mask);
  args.out = view(op, "out", out);
  run_planned<api::AttentionPlan>(op, args, query);
  return out;
}

Tensor attention(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& lengths,
                 const OptionalTensor& mask) {
  std::vector<int64_t> sizes = sizes_of(query);
  if (sizes.size() == 4) std::swap(sizes[1], sizes[2]);
  return attention_into(query, key, value, lengths, mask, new_empty(query, sizes));
}

}  // namespace

template <class Library>
void register_attention(Library& m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention.out", TORCH_BOX(&attention_into));
}

}  // namespace flashu::torch_ops

FLASHU_REGISTER(attention)
