// cuTensorMapEncodeTiled: checks its arguments as the driver's documentation says, and packs them.
#include <cstdio>
#include <cstring>

#include "ptx/machine.hpp"
#include "ptx/runtime.hpp"

namespace ptx {

namespace {

CUresult refuse(const char* why) {
  std::fprintf(stderr, "ptx: cuTensorMapEncodeTiled: %s\n", why);
  return CUDA_ERROR_INVALID_VALUE;
}

int width_of(CUtensorMapSwizzle swizzle) {
  switch (swizzle) {
    case CU_TENSOR_MAP_SWIZZLE_NONE:
      return 0;
    case CU_TENSOR_MAP_SWIZZLE_32B:
      return 32;
    case CU_TENSOR_MAP_SWIZZLE_64B:
      return 64;
    case CU_TENSOR_MAP_SWIZZLE_128B:
      return 128;
    default:
      return -1;
  }
}

}  // namespace

CUresult encode_tensor_map(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank, void* address,
                           const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                           const cuuint32_t* steps, CUtensorMapInterleave interleave,
                           CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  static constexpr u8 kBytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  if (static_cast<unsigned>(type) >= std::size(kBytes)) return refuse("type");
  if (rank < 1 || rank > 5) return refuse("rank");
  if (reinterpret_cast<u64>(out) % 64 != 0) return refuse("the map is not aligned to 64 bytes");
  if (reinterpret_cast<u64>(address) % 16 != 0) return refuse("address not aligned to 16 bytes");
  if (width_of(swizzle) < 0) return refuse("a swizzle that is not modelled");
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE) return refuse("interleave is not modelled");
  TensorMap m{};
  m.magic = kTensorMapMagic;
  m.element_bytes = kBytes[type];
  m.type = static_cast<u8>(type);
  m.rank = static_cast<u8>(rank);
  m.base = reinterpret_cast<u64>(address);
  m.swizzle = static_cast<u8>(width_of(swizzle));
  m.fill = static_cast<u8>(fill);
  for (u32 r = 0; r < rank; ++r) {
    if (sizes[r] == 0 || sizes[r] > (u64{1} << 32)) return refuse("size");
    if (box[r] == 0 || box[r] > 256) return refuse("box");
    if (steps[r] == 0 || steps[r] > 8) return refuse("element stride");
    m.sizes[r] = sizes[r];
    m.box[r] = static_cast<u16>(box[r]);
    m.steps[r] = static_cast<u8>(steps[r]);
    if (r == 0) continue;
    if (strides[r - 1] % 16 != 0 || strides[r - 1] >= (u64{1} << 40)) return refuse("stride");
    m.strides[r - 1] = strides[r - 1];
  }
  const u32 inner = box[0] * m.element_bytes;
  if (inner % 16 != 0) return refuse("the box's rows are no multiple of 16 bytes");
  if (m.swizzle != 0 && inner > m.swizzle) return refuse("the box's rows are wider than the swizzle");
  std::memcpy(out, &m, sizeof m);
  return CUDA_SUCCESS;
}

}  // namespace ptx

// For programs that link with the driver.
extern "C" CUresult cuTensorMapEncodeTiled(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank,
                                           void* address, const cuuint64_t* sizes, const cuuint64_t* strides,
                                           const cuuint32_t* box, const cuuint32_t* steps,
                                           CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                           CUtensorMapL2promotion l2, CUtensorMapFloatOOBfill fill) {
  return ptx::encode_tensor_map(out, type, rank, address, sizes, strides, box, steps, interleave, swizzle, l2,
                                fill);
}
