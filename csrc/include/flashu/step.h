/** @file
 * C API of the step family: one Euler step with guidance, how far features moved, and extrapolating them. */
#ifndef FLASHU_STEP_H
#define FLASHU_STEP_H

#include "flashu/flashu.h"

#ifdef __cplusplus
extern "C" {
#endif

/** Arguments of flashu_guided_euler_step(). */
typedef struct flashu_guided_euler_step_args {
  uint32_t struct_size;  /**< sizeof this struct */
  uint32_t reserved;     /**< zero */
  flashu_tensor latents; /**< [images, channels, H, W] f32, bf16 or f16, contiguous */
  flashu_tensor v; /**< f32, bf16 or f16 [images or 2 * images, n, m], contiguous, n * m = H * W * channels */
  flashu_tensor s; /**< f32 [steps] */
  flashu_tensor dt;       /**< f32 [steps] */
  flashu_tensor step;     /**< i64, one element: which step this is, from 0 */
  flashu_tensor velocity; /**< absent, or as latents: receives the guided velocity */
  void* stream;           /**< CUDA stream; ignored on the CPU */
} flashu_guided_euler_step_args;
/** latents[i, c, y, x] += dt[step] * v, v being number (y * W + x) * channels + c of row i of `v`
 *
 * `v` holds pixels row by row, the channels of each together. Only the product of its last two sizes
 * counts, and nothing is unpatchified: where a head writes patches of more than one pixel, its caller
 * reorders them into pixels first. With twice as many rows of v as latents the second half is the
 * unconditional one, vu, and v = vu + s[step] * (vc - vu). */
FLASHU_API int32_t flashu_guided_euler_step(const flashu_guided_euler_step_args* args);

/** Arguments of flashu_feature_delta(). */
typedef struct flashu_feature_delta_args {
  uint32_t struct_size;     /**< sizeof this struct */
  uint32_t reserved;        /**< zero */
  flashu_tensor a;          /**< any shape */
  flashu_tensor b;          /**< as a */
  flashu_tensor out;        /**< f32 [3] */
  void* workspace;          /**< see flashu.h */
  uint64_t workspace_bytes; /**< its size */
  void* stream;             /**< CUDA stream; ignored on the CPU */
} flashu_feature_delta_args;
/** out = (sum|a - b| / sum|b|, |a - b|_2 / |b|_2, cosine(a, b)); 0 / 0 is 0
 *
 * Summed in fp64 on the CPU; on CUDA devices in fp32 within a block, and the blocks' sums in fp64. */
FLASHU_API int32_t flashu_feature_delta(const flashu_feature_delta_args* args);
/** Bytes of workspace that flashu_feature_delta() needs with these arguments. */
FLASHU_API int32_t flashu_feature_delta_workspace(const flashu_feature_delta_args* args, uint64_t* bytes);

/** Arguments of flashu_taylor_update(). */
typedef struct flashu_taylor_update_args {
  uint32_t struct_size;  /**< sizeof this struct */
  uint32_t reserved;     /**< zero */
  flashu_tensor state;   /**< [order + 1, ...], contiguous, order 0 to 8 */
  flashu_tensor feature; /**< [...], contiguous */
  double interval;       /**< steps between two updates */
  int64_t count;         /**< of updates before this call */
  void* stream;          /**< CUDA stream; ignored on the CPU */
} flashu_taylor_update_args;
/** state[0] = feature, state[i] = (new state[i - 1] - old state[i - 1]) / interval
 *
 * For i at most min(order, count), else 0, where count is the number of updates before this one. */
FLASHU_API int32_t flashu_taylor_update(const flashu_taylor_update_args* args);

/** Arguments of flashu_taylor_predict(). */
typedef struct flashu_taylor_predict_args {
  uint32_t struct_size; /**< sizeof this struct */
  uint32_t reserved;    /**< zero */
  flashu_tensor state;  /**< [order + 1, ...], contiguous */
  double ahead;         /**< steps since the last update */
  int64_t count;        /**< of updates before this call */
  flashu_tensor out;    /**< [...], contiguous */
  void* stream;         /**< CUDA stream; ignored on the CPU */
} flashu_taylor_predict_args;
/** out = sum over i of state[i] * ahead^i / i!
 *
 * For i at most min(order, count - 1), count being the updates so far, at least 1. */
FLASHU_API int32_t flashu_taylor_predict(const flashu_taylor_predict_args* args);

#ifdef __cplusplus
} /* extern "C" */
#endif
#endif /* FLASHU_STEP_H */
