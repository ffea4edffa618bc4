// What the library of torch ops takes from libflashu.so beside the C API. The two are built together; nothing
// else may use it.
#pragma once

#define FLASHU_FOR_OPS __attribute__((visibility("default")))
