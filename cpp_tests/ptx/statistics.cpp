// What was executed, for FLASHU_PTX_STATS: lines "instruction <opcode> <times>" and "kernel <name> <part
// executed>".
#include <cstdio>
#include <cstdlib>

#include "ptx/runtime.hpp"

namespace ptx {

namespace {

std::string opcode(const Instruction& i) {
  const std::size_t from = i.text[0] == '@' ? i.text.find_first_of(" \t") + 1 : 0;
  return i.text.substr(from, i.text.find_first_of(" \t;", from) - from);
}

}  // namespace

void write_statistics() {
  const char* file = std::getenv("FLASHU_PTX_STATS");
  if (file == nullptr) return;
  std::map<std::string, u64> counts;
  std::map<std::string, double> kernels;
  for (const auto& b : runtime().binaries) {
    for (const auto& m : b->modules) {
      for (const auto& [name, k] : m->kernels) {
        std::size_t run = 0;
        for (const Instruction& i : k->code) {
          if (i.executed == 0) continue;
          ++run;
          counts[opcode(i)] += i.executed;
        }
        kernels[name] = static_cast<double>(run) / static_cast<double>(k->code.size());
      }
    }
  }
  std::FILE* f = std::fopen(file, "a");
  if (f == nullptr) return;
  for (const auto& [name, n] : counts)
    std::fprintf(f, "instruction %s %llu\n", name.c_str(), static_cast<unsigned long long>(n));
  for (const auto& [name, part] : kernels) std::fprintf(f, "kernel %s %.3f\n", name.c_str(), part);
  std::fclose(f);
}

}  // namespace ptx
