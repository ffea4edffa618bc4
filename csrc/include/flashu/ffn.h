/** @file
 * C API of the FFN family: gathered SwiGLU feed-forward over a subset of the neurons, and neuron statistics.
 *
 * Every sum is taken in float, in one fixed order: a row's result has the same bits whatever the number of
 * rows and of threads. Storage types are f32, bf16 or f16, the same for all floating tensors of a call; last
 * strides are 1. S is the selection: w[S] are the rows of the selected neurons, n of them.
 *
 * Device memory is not read by the host: on CUDA an index that is out of range is clamped, and 1 is or-ed
 * into `status` (i32, one element, optional); an index that is repeated is computed twice. The CPU refuses
 * both. */
#ifndef FLASHU_FFN_H
#define FLASHU_FFN_H

#include "flashu/flashu.h"

#ifdef __cplusplus
extern "C" {
#endif

/** Which neurons take part, of `intermediate` in the weights. The order of the selected neurons is the order
 * of the columns of h: runs are ascending, an index list is in any order and names each neuron at most once.
 */
typedef enum flashu_selection_kind {
  FLASHU_SELECT_ALL = 0,   /**< all of them */
  FLASHU_SELECT_RUNS = 1,  /**< `runs`: num_runs pairs (start, length), ascending, disjoint, lengths >= 1 */
  FLASHU_SELECT_INDEX = 2, /**< `index`: [n], i32 or i64; checked and copied by every call */
  FLASHU_SELECT_LIST = 3 /**< `index`: [n], i32, contiguous, as flashu_list_neurons wrote it: read in place */
} flashu_selection_kind;
/** A selection of neurons. A zeroed one is all of them. */
typedef struct flashu_selection {
  int32_t kind;        /**< flashu_selection_kind */
  int32_t block;       /**< of a list: it names 64, 8 or 1 neighbours at a time, from multiples of eight on */
  int64_t num_runs;    /**< pairs in `runs` */
  const int64_t* runs; /**< host memory, 2 * num_runs numbers */
  flashu_tensor index; /**< of FLASHU_SELECT_INDEX and FLASHU_SELECT_LIST */
} flashu_selection;

/** Arguments of flashu_list_neurons(). */
typedef struct flashu_list_args {
  uint32_t struct_size;       /**< sizeof this struct */
  uint32_t reserved;          /**< zero */
  int64_t intermediate;       /**< neurons of the weights */
  flashu_selection selection; /**< runs, or an index on the CPU */
  flashu_tensor list;         /**< [n] i32, contiguous, on the CPU; written */
  int32_t* block;             /**< written: what flashu_selection.block is for that list */
} flashu_list_args;
/** Resolves a selection once, for many calls: checks it, and lists its neurons in the order of h's columns.
 * Everything is in host memory; a caller on a GPU copies the list there. Calls that are given the list
 * trust it to name no neuron twice; a number outside the weights is an error on the CPU and clamped on
 * CUDA. */
FLASHU_API int32_t flashu_list_neurons(const flashu_list_args* args);

/** Arguments of flashu_gathered_swiglu(). */
typedef struct flashu_swiglu_args {
  uint32_t struct_size;       /**< sizeof this struct */
  uint32_t reserved;          /**< zero */
  flashu_tensor x;            /**< [..., hidden] */
  flashu_tensor w_gate;       /**< [intermediate, hidden] */
  flashu_tensor w_up;         /**< [intermediate, hidden] */
  flashu_tensor gate_add;     /**< [..., n] or absent, on the CPU only: added to x w_gate[S]^T */
  flashu_tensor up_add;       /**< [..., n] or absent, on the CPU only: added to x w_up[S]^T */
  flashu_selection selection; /**< S */
  flashu_tensor out;          /**< [..., n] */
  flashu_tensor status;       /**< i32, one element, or absent: 1 where an index was out of range */
  void* workspace;            /**< see flashu.h */
  uint64_t workspace_bytes;   /**< its size */
  void* stream;               /**< CUDA stream; ignored on the CPU */
} flashu_swiglu_args;
/** out = silu(x w_gate[S]^T + gate_add) * (x w_up[S]^T + up_add), rounded once at the end */
FLASHU_API int32_t flashu_gathered_swiglu(const flashu_swiglu_args* args);
/** Bytes of workspace that flashu_gathered_swiglu() needs with these arguments. */
FLASHU_API int32_t flashu_gathered_swiglu_workspace(const flashu_swiglu_args* args, uint64_t* bytes);

/** Arguments of flashu_gathered_down(). */
typedef struct flashu_down_args {
  uint32_t struct_size;       /**< sizeof this struct */
  uint32_t reserved;          /**< zero */
  flashu_tensor h;            /**< [..., n] */
  flashu_tensor w_down;       /**< [hidden, intermediate] */
  flashu_selection selection; /**< S */
  flashu_tensor residual;     /**< [..., hidden] or absent */
  flashu_tensor out;          /**< [..., hidden] */
  flashu_tensor status;       /**< i32, one element, or absent: 1 where an index was out of range */
  void* workspace;            /**< see flashu.h */
  uint64_t workspace_bytes;   /**< its size */
  void* stream;               /**< CUDA stream; ignored on the CPU */
} flashu_down_args;
/** out = h w_down[:, S]^T (+ residual) */
FLASHU_API int32_t flashu_gathered_down(const flashu_down_args* args);
/** Bytes of workspace that flashu_gathered_down() needs with these arguments. */
FLASHU_API int32_t flashu_gathered_down_workspace(const flashu_down_args* args, uint64_t* bytes);

/** Arguments of flashu_gathered_ffn(). */
typedef struct flashu_ffn_args {
  uint32_t struct_size;       /**< sizeof this struct */
  uint32_t reserved;          /**< zero */
  flashu_tensor x;            /**< [..., hidden] */
  flashu_tensor w_gate;       /**< [intermediate, hidden] */
  flashu_tensor w_up;         /**< [intermediate, hidden] */
  flashu_tensor w_down;       /**< [hidden_out, intermediate] */
  flashu_tensor gate_scale;   /**< [intermediate] f32 where weights are i8, else absent */
  flashu_tensor up_scale;     /**< [intermediate] f32, as gate_scale */
  flashu_tensor down_scale;   /**< [hidden_out] f32, as gate_scale */
  flashu_selection selection; /**< S */
  flashu_tensor residual;     /**< [..., hidden_out] or absent */
  flashu_tensor norms;  /**< [n] f32 or f64, or absent: += each neuron's squared product, summed over rows */
  flashu_tensor out;    /**< [..., hidden_out] */
  flashu_tensor status; /**< i32, one element, or absent: 1 where an index was out of range */
  void* workspace;      /**< see flashu.h */
  uint64_t workspace_bytes; /**< its size */
  void* stream;             /**< CUDA stream; ignored on the CPU */
} flashu_ffn_args;
/** out = (silu(x w_gate[S]^T) * (x w_up[S]^T)) w_down[:, S]^T (+ residual)
 *
 * The product in between never reaches memory of the caller: it stays in float, or is rounded once to bf16
 * where bf16 storage meets a CPU that multiplies bf16 pairs.
 *
 * Weights may be i8, all three of them, on the CPU: row r of w_gate stands for w_gate[r] * gate_scale[r], and
 * so on for the other two. A sum is taken of the integers, and multiplied by its scale once. Where the CPU
 * multiplies bytes and x is bf16 or f16, x and the product in between are first rounded to fixed point, see
 * flashu_linear(). */
FLASHU_API int32_t flashu_gathered_ffn(const flashu_ffn_args* args);
/** Bytes of workspace that flashu_gathered_ffn() needs with these arguments. */
FLASHU_API int32_t flashu_gathered_ffn_workspace(const flashu_ffn_args* args, uint64_t* bytes);

/** Arguments of flashu_neuron_norms(). */
typedef struct flashu_neuron_norms_args {
  uint32_t struct_size; /**< sizeof this struct */
  flashu_tensor acc;    /**< [n], f32 or f64, stride 1, updated in place */
  flashu_tensor h; /**< [..., n], f32, bf16 or f16; last stride 1; leading dimensions as rows of one stride */
  void* stream;    /**< CUDA stream; ignored on the CPU */
} flashu_neuron_norms_args;
/** acc[j] += sum over rows r of h[r, j]^2, in one fixed order
 *
 * On the CPU in fp64, row after row; on CUDA devices in fp32 over 16 rows at a time, and these sums in
 * fp64. */
FLASHU_API int32_t flashu_neuron_norms(const flashu_neuron_norms_args* args);

#ifdef __cplusplus
} /* extern "C" */
#endif
#endif /* FLASHU_FFN_H */
