// The norm family on the CPU: rows split over threads.
#include "cpu/norm.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/parallel.hpp"
#include "core/rows.hpp"
#include "core/spans.hpp"
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

}  // namespace

void rms_norm(const flashu_rms_norm_args& args) {
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

void span_modulate(const flashu_span_modulate_args& args) {
  const int64_t tokens = args.x.sizes[1];
  const int64_t width = args.x.sizes[2];
  const std::vector<int32_t> span = core::span_map(args.spans, args.x.sizes[0], tokens);
  with_type(args.x.dtype, [&](auto tag) {
    using T = decltype(tag);
    const NormKernels<T>& k = kernels<T>();
    core::parallel_for(
        0, static_cast<int64_t>(span.size()), row_grain(width), [&](int64_t first, int64_t last) {
          for (int64_t i = first; i < last; ++i) {
            const int64_t row = i / tokens;
            const int64_t token = i % tokens;
            const T* x = pointer<T>(args.x) + row * args.x.strides[0] + token * args.x.strides[1];
            T* out = pointer<T>(args.out) + row * args.out.strides[0] + token * args.out.strides[1];
            const double inverse = inverse_rms(k.sum_squares(x, width), width, args.eps);
            const int64_t s = span[static_cast<size_t>(i)];
            if (s < 0) {
              k.scale(out, x, pointer<T>(args.weight), inverse, width);
            } else {
              k.modulate(out, x, pointer<T>(args.weight), pointer<T>(args.shift) + s * args.shift.strides[0],
                         pointer<T>(args.scale) + s * args.scale.strides[0], inverse, width);
            }
          }
        });
  });
}

void span_gate_add(const flashu_span_gate_add_args& args) {
  const int64_t tokens = args.residual.sizes[1];
  const int64_t width = args.residual.sizes[2];
  const std::vector<int32_t> span = core::span_map(args.spans, args.residual.sizes[0], tokens);
  with_type(args.residual.dtype, [&](auto tag) {
    using T = decltype(tag);
    const NormKernels<T>& k = kernels<T>();
    core::parallel_for(
        0, static_cast<int64_t>(span.size()), row_grain(width), [&](int64_t first, int64_t last) {
          for (int64_t i = first; i < last; ++i) {
            const int64_t row = i / tokens;
            const int64_t token = i % tokens;
            T* residual =
                pointer<T>(args.residual) + row * args.residual.strides[0] + token * args.residual.strides[1];
            const T* y = pointer<T>(args.y) + row * args.y.strides[0] + token * args.y.strides[1];
            const int64_t s = span[static_cast<size_t>(i)];
            if (s < 0) {
              k.add(residual, y, width);
            } else {
              k.gate_add(residual, y, pointer<T>(args.gate) + s * args.gate.strides[0], width);
            }
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
