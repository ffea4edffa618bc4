// C API of attention: every check, then the kernels of the CPU.
#include "flashu/attention.h"

#include "api/attention_plan.hpp"
#include "api/calls.hpp"
#include "api/operands.hpp"

namespace flashu::api {
namespace {

// [rows, heads, tokens, d], or [rows, tokens, heads, d] where `by_tokens`.
core::Heads heads(const char* name, const flashu_tensor& tensor, bool by_tokens = false) {
  core::check_inner_contiguous(name, tensor);
  const int64_t* const s = tensor.strides;
  return by_tokens ? core::Heads{tensor.data, s[0], s[2], s[1]} : core::Heads{tensor.data, s[0], s[1], s[2]};
}

void check_lengths(const flashu_tensor& lengths, core::AttentionProblem& p) {
  core::check_dtype("lengths", lengths, {FLASHU_I64});
  core::check_rank("lengths", lengths, 1);
  core::check_size("lengths", lengths, 0, p.rows);
  p.lengths = static_cast<const int64_t*>(lengths.data);
  p.lengths_stride = lengths.strides[0];
  for (int64_t row = 0; row < p.rows; ++row) {
    const int64_t length = p.lengths[row * p.lengths_stride];
    FLASHU_CHECK(length >= 0 && length <= p.tokens, FLASHU_INVALID_VALUE, "lengths: expected 0 to ", p.tokens,
                 " keys, got ", length, " in row ", row);
  }
}

void check_mask(const flashu_tensor& mask, const flashu_tensor& query, core::AttentionProblem& p) {
  core::check_same_dtype("mask", mask, "query", query);
  core::check_rank("mask", mask, 4);
  const int64_t* const sizes = mask.sizes;
  FLASHU_CHECK((sizes[0] == p.rows || sizes[0] == 1) && sizes[1] == 1 && (sizes[2] == p.n || sizes[2] == 1) &&
                   sizes[3] == p.tokens,
               FLASHU_INVALID_VALUE, "mask: expected shape [", p.rows, " or 1, 1, ", p.n, " or 1, ", p.tokens,
               "], got ", core::shape_text(mask));
  core::check_inner_contiguous("mask", mask);
  p.mask = mask.data;
  p.mask_row = sizes[0] == 1 ? 0 : mask.strides[0];
  p.mask_query = sizes[2] == 1 ? 0 : mask.strides[2];
  p.mask_queries = sizes[2];
}

core::AttentionProblem checked(const flashu_attention_args& a) {
  check_all({{"query", &a.query},
             {"key", &a.key},
             {"value", &a.value},
             {"lengths", &a.lengths},
             {"mask", &a.mask},
             {"out", &a.out}});
  FLASHU_CHECK(a.query.device == FLASHU_DEVICE_CPU, FLASHU_UNSUPPORTED,
               "query: expected a CPU tensor, because attention has no CUDA kernel, got cuda:",
               core::cuda_ordinal(a.query.device));
  core::check_floating("query", a.query);
  core::check_rank("query", a.query, 4);
  core::check_rank("key", a.key, 4);
  core::AttentionProblem p{};
  p.type = a.query.dtype;
  p.rows = a.query.sizes[0];
  p.heads = a.query.sizes[1];
  p.n = a.query.sizes[2];
  p.d = a.query.sizes[3];
  p.kv_heads = a.key.sizes[1];
  p.tokens = a.key.sizes[2];
  core::check_same_dtype("key", a.key, "query", a.query);
  core::check_size("key", a.key, 0, p.rows);
  core::check_size("key", a.key, 3, p.d);
  FLASHU_CHECK(p.kv_heads == 0 ? p.heads == 0 : p.heads % p.kv_heads == 0, FLASHU_INVALID_VALUE,
               "key: expected a number of heads that divides query's ", p.heads, ", got ", p.kv_heads,
               " (shape ", core::shape_text(a.key), ")");
  core::check_like("value", a.value, "key", a.key);
  p.query = heads("query", a.query);
  p.key = heads("key", a.key);
  p.value = heads("value", a.value);
  if (core::present(a.lengths)) check_lengths(a.lengths, p);
  if (core::present(a.mask)) check_mask(a.mask, a.query, p);
  core::check_rank("out", a.out, 4);
  core::check_same_dtype("out", a.out, "query", a.query);
  constexpr int kOfQuery[] = {0, 2, 1, 3};
  for (int dim = 0; dim < 4; ++dim) core::check_size("out", a.out, dim, a.query.sizes[kOfQuery[dim]]);
  p.out = heads("out", a.out, true);
  core::check_output("out", a.out,
                     {{"query", &a.query},
                      {"key", &a.key},
                      {"value", &a.value},
                      {"lengths", &a.lengths},
                      {"mask", &a.mask}});
  return p;
}

}  // namespace

AttentionPlan::AttentionPlan(const flashu_attention_args& args) : problem_(checked(args)) {
  if (!empty()) plan_ = cpu::plan_attention(problem_);
}

uint64_t AttentionPlan::workspace_bytes() const { return static_cast<uint64_t>(plan_.bytes()); }

void AttentionPlan::run(void* workspace, uint64_t bytes) const {
  if (empty()) return;
  core::check_workspace(workspace, bytes, workspace_bytes());
  cpu::attention(problem_, plan_, workspace);
}

}  // namespace flashu::api

extern "C" {

int32_t flashu_attention(const flashu_attention_args* args) {
  return flashu::api::run<flashu::api::AttentionPlan>("attention", args);
}
int32_t flashu_attention_workspace(const flashu_attention_args* args, uint64_t* bytes) {
  return flashu::api::workspace<flashu::api::AttentionPlan>("attention", args, bytes);
}

}  // extern "C"
