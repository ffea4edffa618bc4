// What the tests of the emulator share: a body as a grid, under every schedule.
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <set>
#include <string>

#include "simt/engine.hpp"

namespace flashu::test {

inline constexpr int kSeeds = 24;

// What goes wrong when `body` runs as a grid, "" if nothing does.
inline std::string error_of_grid(unsigned blocks, unsigned threads, std::size_t shared,
                                 const std::function<void()>& body, unsigned cluster = 1) {
  try {
    EXPECT_TRUE(simt::launch({blocks, 1, 1}, {threads, 1, 1}, shared, body, cluster));
    return "";
  } catch (const simt::Error& error) {
    return error.what();
  }
}

// The errors of all schedules; a good kernel gives {""}.
inline std::set<std::string> errors(unsigned blocks, unsigned threads, std::size_t shared,
                                    const std::function<void()>& body, unsigned cluster = 1) {
  std::set<std::string> all;
  simt::settings().launches = 0;
  for (int seed = 0; seed < kSeeds; ++seed) {
    simt::settings().seed = static_cast<std::uint64_t>(seed);
    simt::settings().random = seed != 0;
    all.insert(error_of_grid(blocks, threads, shared, body, cluster));
  }
  return all;
}

inline bool contains(const std::set<std::string>& all, const std::string& text) {
  for (const std::string& error : all) {
    if (error.find(text) != std::string::npos) return true;
  }
  return false;
}

inline const std::set<std::string> kFine = {""};

}  // namespace flashu::test
