/** @file
 * C API of the routing family: what decides which tokens and layers take part, and moving the tokens that do.
 * Scores are summed in fp64 on the CPU; on CUDA devices in fp32, their mean over tokens in fp64. What would
 * have to be read back from a CUDA device is not checked there: NaN counts as smaller than every number and
 * passes no threshold, an index out of range counts as padding. */
#ifndef FLASHU_ROUTING_H
#define FLASHU_ROUTING_H

#include "flashu/flashu.h"

#ifdef __cplusplus
extern "C" {
#endif

/** Which importance flashu_cosine_importance() gives. */
typedef enum flashu_reduce {
  FLASHU_REDUCE_NONE = 0, /**< out: the leading dimensions of x_in */
  FLASHU_REDUCE_MEAN = 1, /**< out: no dimensions; the mean over all tokens (NaN where there are none) */
  FLASHU_REDUCE_LAST = 2 /**< out: the leading dimensions without the token one; each sequence's last token */
} flashu_reduce;
/** Arguments of flashu_cosine_importance(). */
typedef struct flashu_cosine_importance_args {
  uint32_t struct_size;     /**< sizeof this struct */
  int32_t reduce;           /**< flashu_reduce */
  flashu_tensor x_in;       /**< [..., width] */
  flashu_tensor x_out;      /**< as x_in */
  flashu_tensor out;        /**< f32, contiguous */
  void* workspace;          /**< see flashu.h */
  uint64_t workspace_bytes; /**< its size */
  void* stream;             /**< CUDA stream; ignored on the CPU */
} flashu_cosine_importance_args;
/** 1 - cosine(x_in, x_out) per token, norms clamped to 1e-8 from below */
FLASHU_API int32_t flashu_cosine_importance(const flashu_cosine_importance_args* args);
/** Bytes of workspace that flashu_cosine_importance() needs with these arguments. */
FLASHU_API int32_t flashu_cosine_importance_workspace(const flashu_cosine_importance_args* args,
                                                      uint64_t* bytes);

/** Arguments of flashu_value_norms(). */
typedef struct flashu_value_norms_args {
  uint32_t struct_size; /**< sizeof this struct */
  uint32_t reserved;    /**< zero */
  flashu_tensor v;      /**< [batch, kv_heads, tokens, head_dim], any strides but the last, which is 1 */
  flashu_tensor out;    /**< f32 [batch, tokens], contiguous */
  void* stream;         /**< CUDA stream; ignored on the CPU */
} flashu_value_norms_args;
/** out[b, t] = L2 norm of v[b, :, t, :] */
FLASHU_API int32_t flashu_value_norms(const flashu_value_norms_args* args);

/** Arguments of flashu_select_topk(). */
typedef struct flashu_select_topk_args {
  uint32_t struct_size; /**< sizeof this struct */
  uint32_t reserved;    /**< zero */
  flashu_tensor scores; /**< [..., tokens] f32, bf16, f16 */
  int64_t k;            /**< at most tokens */
  flashu_tensor index;  /**< i64 [..., k], contiguous */
  flashu_tensor count;  /**< i32 [...], contiguous: k */
  void* stream;         /**< CUDA stream; ignored on the CPU */
} flashu_select_topk_args;
/** The k best scores of each row, their indices in ascending order; of equal scores the lower index wins.
 * NaN is refused on the CPU. */
FLASHU_API int32_t flashu_select_topk(const flashu_select_topk_args* args);

/** Arguments of flashu_select_threshold(). */
typedef struct flashu_select_threshold_args {
  uint32_t struct_size; /**< sizeof this struct */
  uint32_t reserved;    /**< zero */
  flashu_tensor scores; /**< [..., tokens] f32, bf16, f16 */
  double threshold;     /**< rounded to f32 */
  flashu_tensor index;  /**< i64 [..., capacity], contiguous */
  flashu_tensor count;  /**< i32 [...], contiguous */
  void* stream;         /**< CUDA stream; ignored on the CPU */
} flashu_select_threshold_args;
/** The scores >= threshold of each row, in order: the first `capacity` indices, then -1.
 *
 * `count` says how many passed, which may be more than the capacity. NaN is refused on the CPU. */
FLASHU_API int32_t flashu_select_threshold(const flashu_select_threshold_args* args);

/** Arguments of flashu_gather_rows(), flashu_scatter_rows() and flashu_scatter_add_rows(). */
typedef struct flashu_move_rows_args {
  uint32_t struct_size; /**< sizeof this struct */
  uint32_t reserved;    /**< zero */
  flashu_tensor rows;   /**< the long side: [.., tokens, width]; read by gather, written by scatter */
  flashu_tensor index;  /**< i32 or i64 [.., n] */
  flashu_tensor moved;  /**< the short side: [.., n, width]; written by gather, read by scatter */
  void* stream;         /**< CUDA stream; ignored on the CPU */
} flashu_move_rows_args;
/** moved = rows[index]
 *
 * One sequence ([tokens, width] and [n]) or a batch ([batch, tokens, width] and [batch, n]). An index of
 * -1 is padding: it reads zeros. */
FLASHU_API int32_t flashu_gather_rows(const flashu_move_rows_args* args);
/** rows[index] = moved
 *
 * An index of -1 writes nothing; where a row is named twice the later entry stays. */
FLASHU_API int32_t flashu_scatter_rows(const flashu_move_rows_args* args);
/** rows[index] += moved, in order; an index of -1 adds nothing */
FLASHU_API int32_t flashu_scatter_add_rows(const flashu_move_rows_args* args);

#ifdef __cplusplus
} /* extern "C" */
#endif
#endif /* FLASHU_ROUTING_H */
