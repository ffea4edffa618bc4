/// @file
/// C++ API of the norm family: typed wrappers over flashu/norm.h that throw flashu::Error.
#pragma once

#include "flashu/flashu.hpp"
#include "flashu/norm.h"

namespace flashu {

/// out = weight * x / sqrt(mean(x^2) + eps), times (1 + scale) plus shift where those are given
inline void rms_norm(const flashu_tensor& x, const flashu_tensor& weight, double eps,
                     const flashu_tensor& out, const flashu_tensor& shift = {},
                     const flashu_tensor& scale = {}, void* stream = nullptr) {
  auto args = make_args<flashu_rms_norm_args>();
  args.x = x;
  args.weight = weight;
  args.shift = shift;
  args.scale = scale;
  args.eps = eps;
  args.out = out;
  args.stream = stream;
  check(flashu_rms_norm(&args));
}

/// residual += x, then x = rms_norm(residual)
inline void add_rms_norm(const flashu_tensor& x, const flashu_tensor& residual, const flashu_tensor& weight,
                         double eps, void* stream = nullptr) {
  auto args = make_args<flashu_add_rms_norm_args>();
  args.x = x;
  args.residual = residual;
  args.weight = weight;
  args.eps = eps;
  args.stream = stream;
  check(flashu_add_rms_norm(&args));
}

/// residual += gate * y, or y without a gate
inline void gate_add(const flashu_tensor& residual, const flashu_tensor& y, const flashu_tensor& gate = {},
                     void* stream = nullptr) {
  auto args = make_args<flashu_gate_add_args>();
  args.residual = residual;
  args.y = y;
  args.gate = gate;
  args.stream = stream;
  check(flashu_gate_add(&args));
}

/// Positions, head norms and cache slots: all but struct_size is the caller's to fill (flashu/norm.h).
using RotaryCacheArgs = flashu_rotary_cache_args;

/// out = rotated queries; keys and values receive the rotated keys and the values
inline void rotary_cache(RotaryCacheArgs args) {
  args.struct_size = sizeof args;
  check(flashu_rotary_cache(&args));
}

}  // namespace flashu
