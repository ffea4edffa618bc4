// Linear layers on CUDA devices: each is the down half of the FFN with all of its neurons, and an epilogue.
// Few rows have a kernel of their own.
#include <algorithm>

#include "cuda/ffn.hpp"
#include "cuda/linear.hpp"
#include "cuda/linear_few_rows.hpp"
#include "cuda/projection.hpp"

namespace flashu::cuda {

LinearPlan plan_linear(const core::LinearProblem& p) {
  const DeviceFacts facts = device_facts(core::cuda_ordinal(p.device));
  LinearPlan plan;
  plan.few_rows = ffn_limits().decodes && p.m <= core::kFewRows;
  if (plan.few_rows) return plan;
  plan.multiprocessors = facts.multiprocessors;
  core::FfnQuestion q{};
  q.rows = p.m;
  q.neurons = p.k;
  q.has_down = true;
  q.type = p.type;
  q.block = 1;
  q.capability = std::min(facts.capability, ffn_limits().capability.load());
  q.has_sm90 = FLASHU_HAS_SM90 != 0;
  q.multiprocessors = facts.multiprocessors;
  for (int32_t i = 0; i < p.count; ++i) {
    const core::LinearPart& part = p.parts[i];
    q.width = part.n;
    // Without columns of x there is nothing that TMA could fetch: the other kernels take no step then.
    q.aligned = p.type != FLASHU_F32 && p.k > 0 && takes_tma(p.x, p.k) && takes_tma(part.weight, p.k) &&
                takes_tma(part.out, part.n);
    const core::FfnCandidate tile = core::ffn_candidates(q, false).front();
    plan.parts[i] = {tile, core::ffn_partials(tile, p.m, part.n)};
  }
  return plan;
}

void linear(const core::LinearProblem& p, const LinearPlan& plan, void* workspace) {
  const DeviceGuard guard(p.device);
  for (int32_t i = 0; i < p.count; ++i) {
    const core::LinearPart& part = p.parts[i];
    FfnGemm g{};
    g.a = p.x.data;
    g.a_stride = p.x.stride;
    g.m = p.m;
    g.b = part.weight.data;
    g.b_stride = part.weight.stride;
    g.n = part.n;
    g.k = p.k;
    g.intermediate = p.k;
    g.block = 1;
    g.residual = part.residual.data;
    g.residual_stride = part.residual.stride;
    g.out = part.out.data;
    g.out_stride = part.out.stride;
    g.epilogue = {part.bias, p.epilogue};
    const auto stream = static_cast<Stream>(p.stream);
    if (plan.few_rows) {
      linear_few_rows(g, p.type, stream);
    } else {
      project(g, plan.parts[i].tile.tile, plan.parts[i].partials, workspace, p.type, stream,
              plan.multiprocessors);
    }
  }
}

}  // namespace flashu::cuda
