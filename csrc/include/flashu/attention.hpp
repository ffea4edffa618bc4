/// @file
/// C++ API of attention: a typed wrapper over flashu/attention.h that throws flashu::Error.
#pragma once

#include "flashu/attention.h"
#include "flashu/flashu.hpp"

namespace flashu {

/// Arguments of attention(), which fills in struct_size and the workspace.
using AttentionArgs = flashu_attention_args;

/// out = softmax(query key^T / sqrt(d) + mask) value
inline void attention(const AttentionArgs& args) {
  detail::run_with_workspace(args, args.query.device, flashu_attention_workspace, flashu_attention);
}

}  // namespace flashu
