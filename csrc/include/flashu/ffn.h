/* C API of the FFN family: gathered SwiGLU feed-forward over a subset of the neurons, and neuron statistics.
 * Every function checks its arguments before touching memory and returns a flashu_status. */
#ifndef FLASHU_FFN_H
#define FLASHU_FFN_H

#include "flashu/flashu.h"

#ifdef __cplusplus
extern "C" {
#endif

/* acc[j] += sum over rows r of h[r, j]^2, summed in double in row order. */
typedef struct flashu_neuron_norms_args {
  uint32_t struct_size; /* sizeof(flashu_neuron_norms_args) */
  flashu_tensor acc;    /* [n], f32 or f64, stride 1, updated in place */
  flashu_tensor h;      /* [..., n], f32, bf16 or f16; last stride 1; leading dimensions as rows of one stride */
  void* stream;         /* CUDA stream; ignored on the CPU */
} flashu_neuron_norms_args;
FLASHU_API int32_t flashu_neuron_norms(const flashu_neuron_norms_args* args);

#ifdef __cplusplus
} /* extern "C" */
#endif
#endif /* FLASHU_FFN_H */
