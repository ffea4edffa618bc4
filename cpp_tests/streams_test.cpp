// Every C++ wrapper hands the caller's stream to the C API, which functions here stand for.
#include <gtest/gtest.h>

#include "flashu/ffn.h"
#include "flashu/linear.h"
#include "flashu/norm.h"
#include "flashu/routing.h"
#include "flashu/step.h"

namespace {

void* seen = nullptr;

template <class Args>
int32_t record(const Args* args) {
  seen = args->stream;
  return FLASHU_OK;
}

}  // namespace

// The wrappers of this file, in a namespace of their own.
#define flashu recorded
#define flashu_gathered_swiglu record<flashu_swiglu_args>
#define flashu_gathered_down record<flashu_down_args>
#define flashu_gathered_ffn record<flashu_ffn_args>
#define flashu_neuron_norms record<flashu_neuron_norms_args>
#define flashu_linear record<flashu_linear_args>
#define flashu_linears record<flashu_linears_args>
#define flashu_rms_norm record<flashu_rms_norm_args>
#define flashu_add_rms_norm record<flashu_add_rms_norm_args>
#define flashu_gate_add record<flashu_gate_add_args>
#define flashu_rotary_cache record<flashu_rotary_cache_args>
#define flashu_cosine_importance record<flashu_cosine_importance_args>
#define flashu_value_norms record<flashu_value_norms_args>
#define flashu_select_topk record<flashu_select_topk_args>
#define flashu_select_threshold record<flashu_select_threshold_args>
#define flashu_gather_rows record<flashu_move_rows_args>
#define flashu_scatter_rows record<flashu_move_rows_args>
#define flashu_scatter_add_rows record<flashu_move_rows_args>
#define flashu_guided_euler_step record<flashu_guided_euler_step_args>
#define flashu_feature_delta record<flashu_feature_delta_args>
#define flashu_taylor_update record<flashu_taylor_update_args>
#define flashu_taylor_predict record<flashu_taylor_predict_args>
#include "flashu/ffn.hpp"
#include "flashu/linear.hpp"
#include "flashu/norm.hpp"
#include "flashu/routing.hpp"
#include "flashu/step.hpp"

namespace {

using namespace recorded;

template <class Args>
Args on(void* stream) {
  auto args = make_args<Args>();
  args.stream = stream;
  return args;
}

TEST(Streams, EveryWrapperTakesOne) {
  float data[4] = {};
  int number = 0;
  void* const stream = &number;
  const flashu_tensor x = tensor(data, FLASHU_F32, {2, 2}, {}, FLASHU_DEVICE_CUDA(0));
  const auto hands_over = [&](const char* name, const auto& call) {
    seen = nullptr;
    call();
    EXPECT_EQ(seen, stream) << name;
  };
  auto swiglu = on<SwigluArgs>(stream);
  auto down = on<DownArgs>(stream);
  auto ffn = on<FfnArgs>(stream);
  swiglu.x = down.h = ffn.x = x;
  hands_over("gathered_swiglu", [&] { gathered_swiglu(swiglu); });
  hands_over("gathered_down", [&] { gathered_down(down); });
  hands_over("gathered_ffn", [&] { gathered_ffn(ffn); });
  auto dense = on<LinearArgs>(stream);
  dense.x = x;
  hands_over("linear", [&] { linear(dense); });
  auto several = on<LinearsArgs>(stream);
  several.x = x;
  hands_over("linears", [&] { linears(several); });
  hands_over("neuron_norms", [&] { neuron_norms(x, x, stream); });
  hands_over("rms_norm", [&] { rms_norm(x, x, 1e-6, x, {}, {}, stream); });
  hands_over("add_rms_norm", [&] { add_rms_norm(x, x, x, 1e-6, stream); });
  hands_over("gate_add", [&] { gate_add(x, x, {}, stream); });
  hands_over("rotary_cache", [&] { rotary_cache(on<RotaryCacheArgs>(stream)); });
  hands_over("cosine_importance", [&] { cosine_importance(x, x, FLASHU_REDUCE_NONE, x, {}, stream); });
  hands_over("value_norms", [&] { value_norms(x, x, stream); });
  hands_over("select_topk", [&] { select_topk(x, 1, x, x, stream); });
  hands_over("select_threshold", [&] { select_threshold(x, 1, x, x, stream); });
  hands_over("gather_rows", [&] { gather_rows(x, x, x, stream); });
  hands_over("scatter_rows", [&] { scatter_rows(x, x, x, stream); });
  hands_over("scatter_add_rows", [&] { scatter_add_rows(x, x, x, stream); });
  hands_over("guided_euler_step", [&] { guided_euler_step(on<EulerStepArgs>(stream)); });
  hands_over("feature_delta", [&] { feature_delta(x, x, x, {}, stream); });
  hands_over("taylor_update", [&] { taylor_update(x, x, 1, 0, stream); });
  hands_over("taylor_predict", [&] { taylor_predict(x, 1, 1, x, stream); });
}

}  // namespace
