// Reads PTX text. Inline assembly opens scopes, in which names of registers and labels are their own.
#pragma once

#include <string>
#include <unordered_map>

#include "ptx/program.hpp"

namespace ptx {

class Parser {
 public:
  explicit Parser(std::string_view text)
      : at_(text.data()), end_(text.data() + text.size()), module_(std::make_unique<Module>()) {}
  std::unique_ptr<Module> run();

 private:
  struct Scope {
    Scope* parent;
    std::unordered_map<std::string, int> registers;
    std::unordered_map<std::string, int> labels;
  };
  struct Variable {
    std::string name;
    Type type = Type::kB8;
    std::size_t align = 0, size = 0;  // size 0: as large as a launch asks for
  };
  struct Branch {
    std::size_t index;
    std::string label;
    const Scope* scope;
  };

  [[noreturn]] void fail(const std::string& what) const;

  // ---- text (parser.cpp)
  void advance();
  void skip();
  std::string word();  // with dots
  std::string name();  // without
  std::string excerpt(std::size_t length) const;
  bool take(char c);
  void need(char c);
  std::string rest_of_line();
  void skip_to(char c);
  void skip_braces();
  u64 number();
  int integer() { return static_cast<int>(number()); }

  // ---- directives (parser.cpp)
  void module_directive();
  Variable variable();  // behind the state space: .align n .type name[n][m]
  void initialise(const Variable& v, u8* memory);
  void entry();
  void entry_directives();
  void body();
  void body_directive();
  void registers();
  std::size_t place_static(std::size_t size, std::size_t align);  // in shared memory
  int new_register() { return kernel_->registers++; }
  int find_register(const std::string& name) const;

  // ---- instructions (operands.cpp)
  const u64* pool(u64 value);
  u64* new_pool(u64 value);
  Operand constant(u64 value);
  Operand simple();  // a name or a number
  Operand symbol(const std::string& name);
  Operand address();
  Operand operand();
  bool label();
  void instruction();

  const char* at_;
  const char* end_;
  int line_ = 1;
  std::unique_ptr<Module> module_;
  Kernel* kernel_ = nullptr;
  std::unordered_map<u64, u64*> constants_;
  std::vector<std::unique_ptr<Scope>> scopes_;
  Scope* scope_ = nullptr;
  std::vector<Branch> branches_;
  std::map<std::string, u64> static_shared_;
  std::string last_name_;
  int loc_file_ = 0, loc_line_ = 0;
};

}  // namespace ptx
