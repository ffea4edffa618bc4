/* Compiles the public C headers as C: no C++ may slip into them. */
#include "flashu/attention.h"
#include "flashu/ffn.h"
#include "flashu/flashu.h"
#include "flashu/linear.h"
#include "flashu/norm.h"
#include "flashu/routing.h"
#include "flashu/step.h"

int32_t flashu_header_version(void);
int32_t flashu_header_version(void) { return flashu_abi_version() == FLASHU_ABI_VERSION; }
