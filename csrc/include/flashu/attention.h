/** @file
 * C API of attention. Every function checks its arguments before touching memory and returns a
 * flashu_status. */
#ifndef FLASHU_ATTENTION_H
#define FLASHU_ATTENTION_H

#include "flashu/flashu.h"

#ifdef __cplusplus
extern "C" {
#endif

/** Arguments of flashu_attention(). */
typedef struct flashu_attention_args {
  uint32_t struct_size;  /**< sizeof this struct */
  uint32_t reserved;     /**< zero */
  flashu_tensor query;   /**< [rows, heads, n, d], last stride 1 */
  flashu_tensor key;     /**< [rows, kv_heads, tokens, d], last stride 1; heads is a multiple of kv_heads */
  flashu_tensor value;   /**< like key */
  flashu_tensor lengths; /**< int64 [rows]: how many first keys a row has, 0 to tokens; or absent: all */
  flashu_tensor mask;    /**< [rows or 1, 1, n or 1, tokens], last stride 1, added to scores; or absent */
  flashu_tensor out;     /**< [rows, n, heads, d], last stride 1; shares no memory with the others */
  void* workspace;       /**< of at least workspace_bytes, a multiple of 64 */
  uint64_t workspace_bytes; /**< see flashu_attention_workspace() */
  void* stream;             /**< ignored: there are kernels for the CPU only */
} flashu_attention_args;
/** out = softmax(query key^T / sqrt(d) + mask) value, head h with the keys of head h / (heads / kv_heads)
 *
 * Storage types are f32, bf16 or f16, the same for all tensors but lengths. Arithmetic is in float, rounded
 * once at the end. Minus infinity in the mask hides a key, and so does the type's lowest number where the
 * query sees another key; a query whose keys all have that number gets their average, one that sees no keys
 * zeros. Hidden keys and values must be finite, keys behind a row's length may be anything.
 *
 * A query's result has bits that its own numbers and the keys up to the last one that it sees decide, in
 * their order from the first slot on: not the number of rows, of queries, of heads, of threads or of tokens.
 */
FLASHU_API int32_t flashu_attention(const flashu_attention_args* args);
/** Bytes of workspace that these arguments need with the present number of threads. */
FLASHU_API int32_t flashu_attention_workspace(const flashu_attention_args* args, uint64_t* bytes);

#ifdef __cplusplus
} /* extern "C" */
#endif
#endif /* FLASHU_ATTENTION_H */
