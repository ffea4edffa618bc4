// The norm family on the CPU: rows split over threads.
#include "cpu/norm.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/parallel.hpp"
#include "core/rows.hpp"
#include "cpu/norm_kernels.hpp"
#include "cpu/op_support.hpp"

namespace flashu::cpu {
namespace {

template <class T>
const NormKernels<T>& kernels();
template <>
const NormKernels<float>& kernels<float>() {
  return FLASHU_PICK_ISA(norm_f32);
}
template <>
const NormKernels<bfloat16>& kernels<bfloat16>() {
  return FLASHU_PICK_ISA(norm_bf16);
}
template <>
const NormKernels<float16>& kernels<float16>() {
  return FLASHU_PICK_ISA(norm_f16);
}

double inverse_rms(double squares, int64_t width, double eps) {
  return 1.0 / std::sqrt(squares / static_cast<double>(width) + eps);
}

// A head of a tensor of four dimensions.
template <class T>
T* head(const flashu_tensor& tensor, int64_t i, int64_t j, int64_t k) {
  return pointer<T>(tensor) + i * tensor.strides[0] + j * tensor.strides[1] + k * tensor.strides[2];
}

// The angles of a token; a table of one row serves all.
template <class T>
const T* table_row(const flashu_tensor& table, int64_t row, int64_t token) {
  return pointer<T>(table) + (table.sizes[0] > 1 ? row * table.strides[0] : 0) + token * table.strides[1];
}

// A row of [batches, tokens, width].
template <class T>
T* row_of(const flashu_tensor& tensor, int64_t batch, int64_t token) {
  return pointer<T>(tensor) + batch * tensor.strides[0] + token * tensor.strides[1];
}

// Calls body(batch, token) for every row of [batches, tokens, width], split over threads.
template <class Body>
void for_rows(const flashu_tensor& tensor, const Body& body) {
  const int64_t tokens = tensor.sizes[1];
  core::parallel_for(0, tensor.sizes[0] * tokens, row_grain(tensor.sizes[2]),
                     [&](int64_t first, int64_t last) {
                       for (int64_t i = first; i < last; ++i) body(i / tokens, i % tokens);
                     });
}

void modulated_norm(const flashu_rms_norm_args& args) {
  const int64_t width = args.x.sizes[2];
  with_type(args.x.dtype, [&](auto tag) {
    using T = decltype(tag);
    const NormKernels<T>& k = kernels<T>();
    for_rows(args.x, [&](int64_t batch, int64_t token) {
      const T* x = row_of<T>(args.x, batch, token);
      const double inverse = inverse_rms(k.sum_squares(x, width), width, args.eps);
      k.modulate(row_of<T>(args.out, batch, token), x, pointer<T>(args.weight),
                 pointer<T>(args.shift) + batch * args.shift.strides[0],
                 pointer<T>(args.scale) + batch * args.scale.strides[0], inverse, width);
    });
  });
}

}  // namespace

void rms_norm(const flashu_rms_norm_args& args) {
  if (core::present(args.shift)) return modulated_norm(args);
  const core::Rows x = core::as_rows("x", args.x);
  const core::Rows out = core::as_rows("out", args.out);
  with_type(args.x.dtype, [&](auto tag) {
    using T = decltype(tag);
    const NormKernels<T>& k = kernels<T>();
    core::parallel_for(0, x.count, row_grain(x.width), [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        const T* row = pointer<T>(args.x) + r * x.stride;
        const double inverse = inverse_rms(k.sum_squares(row, x.width), x.width, args.eps);
        k.scale(pointer<T>(args.out) + r * out.stride, row, pointer<T>(args.weight), inverse, x.width);
      }
    });
  });
}

void add_rms_norm(const flashu_add_rms_norm_args& args) {
  const core::Rows x = core::as_rows("x", args.x);
  const core::Rows residual = core::as_rows("residual", args.residual);
  with_type(args.x.dtype, [&](auto tag) {
    using T = decltype(tag);
    const NormKernels<T>& k = kernels<T>();
    core::parallel_for(0, x.count, row_grain(x.width), [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        T* sum = pointer<T>(args.residual) + r * residual.stride;
        T* row = pointer<T>(args.x) + r * x.stride;
        const double inverse = inverse_rms(k.add_sum_squares(sum, row, x.width), x.width, args.eps);
        k.scale(row, sum, pointer<T>(args.weight), inverse, x.width);
      }
    });
  });
}

void gate_add(const flashu_gate_add_args& args) {
  const int64_t width = args.residual.sizes[2];
  const bool gated = core::present(args.gate);
  with_type(args.residual.dtype, [&](auto tag) {
    using T = decltype(tag);
    const NormKernels<T>& k = kernels<T>();
    for_rows(args.residual, [&](int64_t batch, int64_t token) {
      T* residual = row_of<T>(args.residual, batch, token);
      const T* y = row_of<T>(args.y, batch, token);
      if (gated) {
        k.gate_add(residual, y, pointer<T>(args.gate) + batch * args.gate.strides[0], width);
      } else {
        k.add(residual, y, width);
      }
    });
  });
}

void rotary_cache(const flashu_rotary_cache_args& args) {
  const int64_t tokens = args.query.sizes[1];
  const int64_t d = args.query.sizes[3];
  const bool normed = core::present(args.query_norm);
  // A start for every row, one for all, or none.
  const bool starts = core::present(args.start);
  const int64_t start_stride = core::numel(args.start) > 1 ? args.start.strides[0] : 0;
  const int64_t width = (args.query.sizes[2] + 2 * args.key.sizes[2]) * d;
  with_type(args.query.dtype, [&](auto tag) {
    using T = decltype(tag);
    const NormKernels<T>& k = kernels<T>();
    core::parallel_for(0, args.query.sizes[0] * tokens, row_grain(width), [&](int64_t first, int64_t last) {
      std::vector<T> scaled(static_cast<size_t>(normed ? d : 0));
      for (int64_t i = first; i < last; ++i) {
        const int64_t row = i / tokens;
        const int64_t token = i % tokens;
        const T* const cos = table_row<T>(args.cos, row, token);
        const T* const sin = table_row<T>(args.sin, row, token);
        const auto turn = [&](T* to, const T* from, const flashu_tensor& norm) {
          if (normed) {
            const double inverse = inverse_rms(k.sum_squares(from, d), d, args.eps);
            k.scale(scaled.data(), from, pointer<T>(norm), inverse, d);
            from = scaled.data();
          }
          k.rotate(to, from, cos, sin, d / 2);
        };
        for (int64_t h = 0; h < args.query.sizes[2]; ++h)
          turn(head<T>(args.out, row, h, token), head<T>(args.query, row, token, h), args.query_norm);
        const int64_t start = starts ? pointer<int64_t>(args.start)[row * start_stride] : 0;
        // start + token may not fit; a slot outside the cache is not written.
        if (start < -token || start >= args.keys.sizes[1] - token) continue;
        for (int64_t h = 0; h < args.key.sizes[2]; ++h) {
          turn(head<T>(args.keys, row, start + token, h), head<T>(args.key, row, token, h), args.key_norm);
          std::copy_n(head<T>(args.value, row, token, h), d, head<T>(args.values, row, start + token, h));
        }
      }
    });
  });
}

}  // namespace flashu::cpu
