/** @file
 * C API of linear layers. Every function checks its arguments before touching memory and returns a
 * flashu_status. */
#ifndef FLASHU_LINEAR_H
#define FLASHU_LINEAR_H

#include "flashu/flashu.h"

#ifdef __cplusplus
extern "C" {
#endif

/** What is applied to a sum before the residual is added. */
typedef enum flashu_epilogue {
  FLASHU_EPILOGUE_NONE = 0,      /**< v */
  FLASHU_EPILOGUE_GELU = 1,      /**< v (1 + erf(v / sqrt(2))) / 2 */
  FLASHU_EPILOGUE_GELU_TANH = 2, /**< v (1 + tanh(sqrt(2 / pi) (v + 0.044715 v^3))) / 2 */
  FLASHU_EPILOGUE_SILU = 3       /**< v / (1 + e^-v) */
} flashu_epilogue;

/** Arguments of flashu_linear(). */
typedef struct flashu_linear_args {
  uint32_t struct_size;     /**< sizeof this struct */
  int32_t epilogue;         /**< flashu_epilogue */
  flashu_tensor x;          /**< [..., K], last stride 1; leading dimensions as rows of one stride */
  flashu_tensor weight;     /**< [N, K], last stride 1 */
  flashu_tensor scale;      /**< [N] f32, stride 1, where weight is i8, else absent */
  flashu_tensor bias;       /**< [N], stride 1, or absent */
  flashu_tensor residual;   /**< [..., N] as rows like x, or absent */
  flashu_tensor out;        /**< [..., N] as rows like x; shares no memory with the others */
  void* workspace;          /**< of at least workspace_bytes, a multiple of 64 */
  uint64_t workspace_bytes; /**< see flashu_linear_workspace() */
  void* stream;             /**< CUDA stream; ignored on the CPU */
} flashu_linear_args;
/** out = epilogue(x weight^T + bias) + residual
 *
 * Storage types are f32, bf16 or f16, the same for all tensors of a call. Sums are taken in float, in an
 * order that K alone decides, and rounded once at the end: a row's result has the same bits whatever the
 * number of rows and of threads, and whichever row it is. On CUDA this holds among calls of at most 16 rows,
 * which have a kernel of their own, and among calls of more rows in tensors of equal strides and alignment,
 * but not between the two: they sum in different orders. FLASHU_FFN_DECODE=0 in the environment takes the
 * kernels of more rows for all. K = 0 gives epilogue(bias) + residual. The weight may be i8, on the CPU:
 * its row r stands for weight[r] * scale[r], and the sum of the integers is multiplied by the scale once.
 * Where the CPU multiplies bytes (AVX512-VNNI, with AVX512-BF16), x is bf16 or f16 and K < 2^17, a row of x
 * is first rounded to multiples of a power of two that is at most 2^-11 (f16: 2^-14) of its root mean square,
 * without a few outliers if it has any; sums are exact then. Numbers of 2^22 multiples and more, infinities
 * and NaNs are multiplied in float and added. */
FLASHU_API int32_t flashu_linear(const flashu_linear_args* args);
/** Bytes of workspace that these arguments need with the present number of threads. */
FLASHU_API int32_t flashu_linear_workspace(const flashu_linear_args* args, uint64_t* bytes);

/** The most weights that flashu_linears() takes. */
#define FLASHU_LINEAR_WEIGHTS 4

/** Arguments of flashu_linears(). */
typedef struct flashu_linears_args {
  uint32_t struct_size; /**< sizeof this struct */
  int32_t epilogue;     /**< flashu_epilogue, of all weights */
  int32_t count;        /**< of weights, 1 to FLASHU_LINEAR_WEIGHTS */
  int32_t reserved;     /**< zero */
  flashu_tensor x;      /**< [..., K], last stride 1; leading dimensions as rows of one stride */
  flashu_tensor weights[FLASHU_LINEAR_WEIGHTS]; /**< `count` of [N_i, K], last stride 1 */
  flashu_tensor biases[FLASHU_LINEAR_WEIGHTS];  /**< of each weight: [N_i], stride 1, or absent */
  flashu_tensor residual;                       /**< [..., sum of N_i] as rows like x, or absent */
  flashu_tensor out;        /**< [..., sum of N_i] as rows like x; shares no memory with the others */
  void* workspace;          /**< of at least workspace_bytes, a multiple of 64 */
  uint64_t workspace_bytes; /**< see flashu_linears_workspace() */
  void* stream;             /**< CUDA stream; ignored on the CPU */
} flashu_linears_args;
/** Several linear layers of one input, such as queries, keys and values: each weight gives the next N_i
 * columns of out, the bits that flashu_linear() writes there. On the CPU x is packed once. On CUDA weights
 * that lie one behind the other in memory, with biases that do so too or none, are one launch; others follow
 * each other. */
FLASHU_API int32_t flashu_linears(const flashu_linears_args* args);
/** Bytes of workspace that these arguments need with the present number of threads. */
FLASHU_API int32_t flashu_linears_workspace(const flashu_linears_args* args, uint64_t* bytes);

#ifdef __cplusplus
} /* extern "C" */
#endif
#endif /* FLASHU_LINEAR_H */
