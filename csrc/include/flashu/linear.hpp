/// @file
/// C++ API of linear layers: a typed wrapper over flashu/linear.h that throws flashu::Error.
#pragma once

#include "flashu/flashu.hpp"
#include "flashu/linear.h"

namespace flashu {

/// Arguments of linear(), which fills in struct_size and the workspace.
using LinearArgs = flashu_linear_args;

/// out = epilogue(x weight^T + bias) + residual
inline void linear(const LinearArgs& args) {
  detail::run_with_workspace(args, args.x.device, flashu_linear_workspace, flashu_linear);
}

/// Arguments of linears(), which fills in struct_size and the workspace.
using LinearsArgs = flashu_linears_args;

/// Several linear layers of one x: each weight gives the next columns of out.
inline void linears(const LinearsArgs& args) {
  detail::run_with_workspace(args, args.x.device, flashu_linears_workspace, flashu_linears);
}

}  // namespace flashu
