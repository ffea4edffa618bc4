// The words of PTX: types, opcodes and modifiers.
#pragma once

#include <optional>

#include "ptx/program.hpp"

namespace ptx {

std::optional<Type> type_named(const std::string& name);

// What an opcode with its modifiers says: everything in an Instruction but its operands.
void decode(Instruction& instruction, const std::string& opcode);

}  // namespace ptx
