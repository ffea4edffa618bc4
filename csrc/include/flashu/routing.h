/* C API of the routing family: what decides which tokens and layers take part, and moving the tokens that do.
 * Scores are summed in fp64 on the CPU; on CUDA devices in fp32, their mean over tokens in fp64. What would
 * have to be read back from a CUDA device is not checked there: NaN counts as smaller than every number and
 * passes no threshold, an index out of range counts as padding. */
#ifndef FLASHU_ROUTING_H
#define FLASHU_ROUTING_H

#include "flashu/flashu.h"

#ifdef __cplusplus
extern "C" {
#endif

/* 1 - cosine(x_in, x_out) per token, norms clamped to 1e-8 from below. */
typedef enum flashu_reduce {
  FLASHU_REDUCE_NONE = 0, /* out: the leading dimensions of x_in */
  FLASHU_REDUCE_MEAN = 1, /* out: no dimensions; the mean over all tokens (NaN where there are none) */
  FLASHU_REDUCE_LAST =
      2 /* out: the leading dimensions without the token dimension; each sequence's last token */
} flashu_reduce;
typedef struct flashu_cosine_importance_args {
  uint32_t struct_size;
  int32_t reduce;
  flashu_tensor x_in;  /* [..., width] */
  flashu_tensor x_out; /* as x_in */
  flashu_tensor out;   /* f32, contiguous */
  void* workspace;
  uint64_t workspace_bytes;
  void* stream;
} flashu_cosine_importance_args;
FLASHU_API int32_t flashu_cosine_importance(const flashu_cosine_importance_args* args);
FLASHU_API int32_t flashu_cosine_importance_workspace(const flashu_cosine_importance_args* args,
                                                      uint64_t* bytes);

/* out[b, t] = L2 norm of v[b, :, t, :]. */
typedef struct flashu_value_norms_args {
  uint32_t struct_size;
  uint32_t reserved;
  flashu_tensor v;   /* [batch, kv_heads, tokens, head_dim], any strides but the last, which is 1 */
  flashu_tensor out; /* f32 [batch, tokens], contiguous */
  void* stream;
} flashu_value_norms_args;
FLASHU_API int32_t flashu_value_norms(const flashu_value_norms_args* args);

/* The k best scores of each row, their indices in ascending order; of equal scores the lower index wins. NaN
 * is refused on the CPU. */
typedef struct flashu_select_topk_args {
  uint32_t struct_size;
  uint32_t reserved;
  flashu_tensor scores; /* [..., tokens] f32, bf16, f16 */
  int64_t k;
  flashu_tensor index; /* i64 [..., k], contiguous */
  flashu_tensor count; /* i32 [...], contiguous: k */
  void* stream;
} flashu_select_topk_args;
FLASHU_API int32_t flashu_select_topk(const flashu_select_topk_args* args);

/* The scores >= threshold of each row, in order: the first `capacity` indices, then -1; count says how many
 * passed, which may be more than the capacity. NaN is refused on the CPU. */
typedef struct flashu_select_threshold_args {
  uint32_t struct_size;
  uint32_t reserved;
  flashu_tensor scores; /* [..., tokens] f32, bf16, f16 */
  double threshold;
  flashu_tensor index; /* i64 [..., capacity], contiguous */
  flashu_tensor count; /* i32 [...], contiguous */
  void* stream;
} flashu_select_threshold_args;
FLASHU_API int32_t flashu_select_threshold(const flashu_select_threshold_args* args);

/* Rows by index, in one sequence ([tokens, width] and [n]) or a batch ([batch, tokens, width] and [batch,
 * n]). An index of -1 is padding: it reads zeros and writes nothing. Where scatter_rows names a row twice the
 * later entry stays; scatter_add_rows adds in order. */
typedef struct flashu_move_rows_args {
  uint32_t struct_size;
  uint32_t reserved;
  flashu_tensor rows;  /* the long side: [.., tokens, width]; read by gather, written by scatter */
  flashu_tensor index; /* i32 or i64 [.., n] */
  flashu_tensor moved; /* the short side: [.., n, width]; written by gather, read by scatter */
  void* stream;
} flashu_move_rows_args;
FLASHU_API int32_t flashu_gather_rows(const flashu_move_rows_args* args);
FLASHU_API int32_t flashu_scatter_rows(const flashu_move_rows_args* args);
FLASHU_API int32_t flashu_scatter_add_rows(const flashu_move_rows_args* args);

#ifdef __cplusplus
} /* extern "C" */
#endif
#endif /* FLASHU_ROUTING_H */
