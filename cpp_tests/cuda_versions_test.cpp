// Which drivers a CUDA runtime works with, and how that is said.
#include "core/cuda_versions.hpp"

#include <gtest/gtest.h>

#include "flashu/flashu.h"

namespace flashu::core {
namespace {

TEST(CudaVersions, ADriverOfTheMajorVersionIsEnough) {
  EXPECT_EQ(driver_problem({13000, 13000}), "");
  EXPECT_EQ(driver_problem({13000, 13050}), "");
  EXPECT_EQ(driver_problem({14000, 13000}), "");
  EXPECT_EQ(driver_problem({12000, 12090}), "");
  EXPECT_EQ(driver_problem({12090, 13050}),
            "CUDA driver: expected one for CUDA 13.0 or newer (version 580), since this build's runtime is "
            "CUDA 13.5, "
            "got one for CUDA 12.9, which is too old");
  EXPECT_EQ(driver_problem({0, 12050}),
            "CUDA driver: expected one for CUDA 12.0 or newer (version 525), since this build's runtime is "
            "CUDA 12.5, "
            "got none");
  EXPECT_NE(driver_problem({13000, 0}), "");
}

TEST(CudaVersions, TheApiAgreesWithTheTable) {
  EXPECT_EQ(flashu_cuda_problem(), driver_problem({flashu_cuda_driver(), flashu_cuda_runtime()}));
}

}  // namespace
}  // namespace flashu::core
