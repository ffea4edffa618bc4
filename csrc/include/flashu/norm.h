/** @file
 * C API of the norm family: RMSNorm, plain, modulated or with the residual added, the gated residual, and the
 * step from projected queries, keys and values to what attention reads. On the CPU statistics are
 * summed in fp64 and products taken one step wider than the storage (fp64 for f32, else fp32); on CUDA
 * devices both are fp32. Results are rounded once. Storage types are f32, bf16 or f16, one for all floating
 * tensors of a call; last strides are 1. Every row is computed by itself, in one fixed order. */
#ifndef FLASHU_NORM_H
#define FLASHU_NORM_H

#include "flashu/flashu.h"

#ifdef __cplusplus
extern "C" {
#endif

/** Arguments of flashu_rms_norm(). */
typedef struct flashu_rms_norm_args {
  uint32_t struct_size; /**< sizeof this struct */
  uint32_t reserved;    /**< zero */
  flashu_tensor x;      /**< [..., width]; with shift and scale [batches, tokens, width] */
  flashu_tensor weight; /**< [width] */
  flashu_tensor shift;  /**< [batches, width], or absent */
  flashu_tensor scale;  /**< as shift */
  double eps;           /**< added to the mean square */
  flashu_tensor out;    /**< as x */
  void* stream;         /**< CUDA stream; ignored on the CPU */
} flashu_rms_norm_args;
/** out = weight * x / sqrt(mean(x^2) + eps), per row
 *
 * With shift and scale (adaLN) out = out * (1 + scale[b]) + shift[b] in every row of batch b. */
FLASHU_API int32_t flashu_rms_norm(const flashu_rms_norm_args* args);

/** Arguments of flashu_add_rms_norm(). */
typedef struct flashu_add_rms_norm_args {
  uint32_t struct_size;   /**< sizeof this struct */
  uint32_t reserved;      /**< zero */
  flashu_tensor x;        /**< [..., width], overwritten by the norm */
  flashu_tensor residual; /**< as x, overwritten by the sum */
  flashu_tensor weight;   /**< [width] */
  double eps;             /**< added to the mean square */
  void* stream;           /**< CUDA stream; ignored on the CPU */
} flashu_add_rms_norm_args;
/** residual += x (rounded), then x = rms_norm(residual) */
FLASHU_API int32_t flashu_add_rms_norm(const flashu_add_rms_norm_args* args);

/** Arguments of flashu_gate_add(). */
typedef struct flashu_gate_add_args {
  uint32_t struct_size;   /**< sizeof this struct */
  uint32_t reserved;      /**< zero */
  flashu_tensor residual; /**< [batches, tokens, width] */
  flashu_tensor y;        /**< as residual */
  flashu_tensor gate;     /**< [batches, width], or absent */
  void* stream;           /**< CUDA stream; ignored on the CPU */
} flashu_gate_add_args;
/** residual += gate[b] * y in every row of batch b; residual += y without a gate */
FLASHU_API int32_t flashu_gate_add(const flashu_gate_add_args* args);

/** Arguments of flashu_rotary_cache(). */
typedef struct flashu_rotary_cache_args {
  uint32_t struct_size;     /**< sizeof this struct */
  uint32_t reserved;        /**< zero */
  flashu_tensor query;      /**< [rows, n, heads, d], d even */
  flashu_tensor key;        /**< [rows, n, kv_heads, d] */
  flashu_tensor value;      /**< as key */
  flashu_tensor cos;        /**< [rows or 1, n, d] */
  flashu_tensor sin;        /**< as cos */
  flashu_tensor keys;       /**< [rows, capacity, kv_heads, d], written */
  flashu_tensor values;     /**< as keys, written */
  flashu_tensor start;      /**< i64 [rows], [1] or of no dimension; absent: 0, and then n <= capacity */
  flashu_tensor query_norm; /**< [d], or absent */
  flashu_tensor key_norm;   /**< [d], or absent, as query_norm is */
  double eps;               /**< of the norms */
  flashu_tensor out;        /**< [rows, heads, n, d]: the queries */
  void* stream;             /**< CUDA stream; ignored on the CPU */
} flashu_rotary_cache_args;
/** Rotary position embedding of queries and keys; keys and values go into a cache.
 *
 * Halves convention: the angle of element j is that of j + d / 2. Each head is normed before it where
 * norms are given. Token i of row r has slot start[r] + i in the cache; a slot outside [0, capacity) is
 * not written. The norm is that of flashu_rms_norm(), rounded to the storage type; the rotation is rounded
 * once. What is written overlaps nothing else, by extent. */
FLASHU_API int32_t flashu_rotary_cache(const flashu_rotary_cache_args* args);

#ifdef __cplusplus
} /* extern "C" */
#endif
#endif /* FLASHU_NORM_H */
