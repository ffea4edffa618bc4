/* A denoising loop in C without torch: a model of one feed-forward block over the pixels of a latent, with
 * some of its neurons left out, classifier-free guidance, and Euler steps. Prints the latents, a number a
 * line.
 *
 * Build it in one of two ways (README.md): find_package(flashu) or pkg-config.
 */
#include <flashu/ffn.h>
#include <flashu/norm.h>
#include <flashu/step.h>
#include <stdio.h>
#include <stdlib.h>

enum { kImages = 2, kChannels = 32, kSide = 6, kPixels = kSide * kSide, kNeurons = 96, kSteps = 4 };

/* Ends the program with the library's own words. */
static void check(int32_t status) {
  if (status == FLASHU_OK) return;
  fprintf(stderr, "%s\n", flashu_last_error());
  exit(1);
}

/* A contiguous float tensor on the CPU. */
static flashu_tensor view(float* data, int32_t ndim, const int64_t* sizes) {
  flashu_tensor tensor = {0};
  int64_t stride = 1;
  tensor.data = data;
  tensor.dtype = FLASHU_F32;
  tensor.device = FLASHU_DEVICE_CPU;
  tensor.ndim = ndim;
  for (int32_t d = ndim - 1; d >= 0; --d) {
    tensor.sizes[d] = sizes[d];
    tensor.strides[d] = stride;
    stride *= sizes[d];
  }
  return tensor;
}
#define VIEW(data, ...) \
  view(data, (int32_t)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)), (int64_t[]){__VA_ARGS__})

/* Numbers in [-scale / 2, scale / 2), the same on every machine. */
static void fill(float* data, size_t count, float scale, uint32_t seed) {
  for (size_t i = 0; i < count; ++i) {
    seed = seed * 1664525u + 1013904223u;
    data[i] = ((float)(seed >> 8) / 16777216.0f - 0.5f) * scale;
  }
}

static float latents[kImages][kChannels][kPixels];
static float x[2 * kImages][kPixels][kChannels]; /* conditional images, then unconditional ones */
static float normed[2 * kImages][kPixels][kChannels];
static float v[2 * kImages][kPixels][kChannels]; /* velocities */
static float weight[kChannels];
static float w_gate[kNeurons][kChannels];
static float w_up[kNeurons][kChannels];
static float w_down[kChannels][kNeurons];

/* The model: v = x + ffn(rms_norm(x)). What it is given as the unconditional input is half the latent. */
static void run_model(void) {
  static const int64_t runs[] = {0, 40, 64, 24}; /* neurons 0 to 39 and 64 to 87 are kept */
  flashu_rms_norm_args norm = {0};
  flashu_ffn_args ffn = {0};

  for (int i = 0; i < kImages; ++i) {
    for (int p = 0; p < kPixels; ++p) {
      for (int c = 0; c < kChannels; ++c) {
        x[i][p][c] = latents[i][c][p];
        x[kImages + i][p][c] = 0.5f * latents[i][c][p];
      }
    }
  }
  norm.struct_size = sizeof norm;
  norm.x = VIEW(&x[0][0][0], 2 * kImages, kPixels, kChannels);
  norm.weight = VIEW(weight, kChannels);
  norm.eps = 1e-6;
  norm.out = VIEW(&normed[0][0][0], 2 * kImages, kPixels, kChannels);
  check(flashu_rms_norm(&norm));

  ffn.struct_size = sizeof ffn;
  ffn.x = norm.out;
  ffn.w_gate = VIEW(&w_gate[0][0], kNeurons, kChannels);
  ffn.w_up = VIEW(&w_up[0][0], kNeurons, kChannels);
  ffn.w_down = VIEW(&w_down[0][0], kChannels, kNeurons);
  ffn.selection.kind = FLASHU_SELECT_RUNS;
  ffn.selection.num_runs = 2;
  ffn.selection.runs = runs;
  ffn.residual = norm.x;
  ffn.out = VIEW(&v[0][0][0], 2 * kImages, kPixels, kChannels);
  /* The caller owns the workspace; an engine allocates it once. */
  check(flashu_gathered_ffn_workspace(&ffn, &ffn.workspace_bytes));
  ffn.workspace = aligned_alloc(64, (ffn.workspace_bytes + 63) / 64 * 64 + 64);
  check(flashu_gathered_ffn(&ffn));
  free(ffn.workspace);
}

int main(void) {
  float guidance[kSteps] = {1.5f, 1.5f, 3.0f, 3.0f}; /* low first, high later */
  float dt[kSteps] = {0.1f, 0.2f, 0.3f, 0.4f};
  int64_t step = 0;
  flashu_guided_euler_step_args euler = {0};

  if (flashu_abi_version() != FLASHU_ABI_VERSION) {
    fprintf(stderr, "headers of flashu %s, library %s\n", FLASHU_VERSION, flashu_version());
    return 1;
  }
  fill(&latents[0][0][0], sizeof latents / sizeof(float), 2.0f, 1);
  fill(weight, sizeof weight / sizeof(float), 2.0f, 2);
  fill(&w_gate[0][0], sizeof w_gate / sizeof(float), 0.5f, 3);
  fill(&w_up[0][0], sizeof w_up / sizeof(float), 0.5f, 4);
  fill(&w_down[0][0], sizeof w_down / sizeof(float), 0.5f, 5);

  euler.struct_size = sizeof euler;
  euler.latents = VIEW(&latents[0][0][0], kImages, kChannels, kSide, kSide);
  euler.v = VIEW(&v[0][0][0], 2 * kImages, kPixels, kChannels);
  euler.s = VIEW(guidance, kSteps);
  euler.dt = VIEW(dt, kSteps);
  euler.step.data = &step;
  euler.step.dtype = FLASHU_I64;
  euler.step.device = FLASHU_DEVICE_CPU;
  for (step = 0; step < kSteps; ++step) {
    run_model();
    check(flashu_guided_euler_step(&euler));
  }
  for (size_t i = 0; i < sizeof latents / sizeof(float); ++i) printf("%.9g\n", (&latents[0][0][0])[i]);
  return 0;
}
