// The linear layer on CUDA devices: the down half of the FFN with all of its neurons, and an epilogue.
#include <algorithm>

#include "cuda/ffn.hpp"
#include "cuda/linear.hpp"
#include "cuda/projection.hpp"

namespace flashu::cuda {

LinearPlan plan_linear(const core::LinearProblem& p) {
  const DeviceFacts facts = device_facts(core::cuda_ordinal(p.device));
  core::FfnQuestion q{};
  q.rows = p.m;
  q.width = p.n;
  q.neurons = p.k;
  q.has_down = true;
  q.type = p.type;
  q.block = 1;
  // Without columns of x there is nothing that TMA could fetch: the other kernels take no step then.
  q.aligned = p.type != FLASHU_F32 && p.k > 0 && takes_tma(p.x, p.k) && takes_tma(p.weight, p.k) &&
              takes_tma(p.out, p.n);
  q.capability = std::min(facts.capability, ffn_limits().capability.load());
  q.has_sm90 = FLASHU_HAS_SM90 != 0;
  q.multiprocessors = facts.multiprocessors;
  const core::FfnCandidate tile = core::ffn_candidates(q, false).front();
  return {tile, facts.multiprocessors, core::ffn_partials(tile, p.m, p.n)};
}

void linear(const core::LinearProblem& p, const LinearPlan& plan, void* workspace) {
  const DeviceGuard guard(p.device);
  FfnGemm g{};
  g.a = p.x.data;
  g.a_stride = p.x.stride;
  g.m = p.m;
  g.b = p.weight.data;
  g.b_stride = p.weight.stride;
  g.n = p.n;
  g.k = p.k;
  g.intermediate = p.k;
  g.block = 1;
  g.residual = p.residual.data;
  g.residual_stride = p.residual.stride;
  g.out = p.out.data;
  g.out_stride = p.out.stride;
  g.epilogue = {p.bias, p.epilogue};
  project(g, plan.tile.tile, plan.partials, workspace, p.type, static_cast<Stream>(p.stream),
          plan.multiprocessors);
}

}  // namespace flashu::cuda
