// Text, directives and scopes of PTX.
#include "ptx/parser.hpp"

#include <cctype>
#include <cstdlib>
#include <cstring>

#include "ptx/opcodes.hpp"

namespace ptx {

namespace {

bool in_name(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_' || c == '$' || c == '%';
}

std::size_t aligned(std::size_t at, std::size_t to) { return (at + to - 1) / to * to; }

}  // namespace

std::unique_ptr<Module> parse(std::string_view text) { return Parser(text).run(); }

std::unique_ptr<Module> Parser::run() {
  while (skip(), at_ < end_ && *at_ != 0) module_directive();
  return std::move(module_);
}

void Parser::fail(const std::string& what) const {
  throw Error("PTX line " + std::to_string(line_) + ": " + what);
}

// ---- text

void Parser::advance() {
  if (*at_ == '\n') ++line_;
  ++at_;
}

void Parser::skip() {
  while (at_ < end_) {
    const bool two = at_ + 1 < end_;
    if (std::isspace(static_cast<unsigned char>(*at_)) != 0) {
      advance();
    } else if (two && at_[0] == '/' && at_[1] == '/') {
      while (at_ < end_ && *at_ != '\n') ++at_;
    } else if (two && at_[0] == '/' && at_[1] == '*') {
      while (at_ + 1 < end_ && (at_[0] != '*' || at_[1] != '/')) advance();
      at_ += 2;
    } else {
      break;
    }
  }
}

std::string Parser::excerpt(std::size_t length) const {
  return {at_, std::min(length, static_cast<std::size_t>(end_ - at_))};
}

std::string Parser::word() {
  skip();
  const char* const from = at_;
  const auto colons = [&] { return *at_ == ':' && (at_[1] == ':' || (at_[-1] == ':' && in_name(at_[1]))); };
  while (at_ < end_ && (in_name(*at_) || *at_ == '.' || colons())) ++at_;
  if (from == at_) fail("expected a word at '" + excerpt(20) + "'");
  return {from, at_};
}

std::string Parser::name() {
  skip();
  const char* const from = at_;
  while (at_ < end_ && in_name(*at_)) ++at_;
  if (from == at_) fail("expected a name at '" + excerpt(20) + "'");
  return {from, at_};
}

bool Parser::take(char c) {
  skip();
  if (at_ >= end_ || *at_ != c) return false;
  advance();
  return true;
}

void Parser::need(char c) {
  if (!take(c)) fail(std::string("expected '") + c + "' at '" + excerpt(30) + "'");
}

std::string Parser::rest_of_line() {
  const char* const from = at_;
  while (at_ < end_ && *at_ != '\n') ++at_;
  return {from, at_};
}

void Parser::skip_to(char c) {
  while (at_ < end_ && *at_ != c) advance();
  if (at_ < end_) advance();
}

void Parser::skip_braces() {
  need('{');
  for (int depth = 1; depth > 0 && at_ < end_;) {
    if (*at_ == '{') ++depth;
    if (*at_ == '}') --depth;
    advance();
  }
}

u64 Parser::number() {
  skip();
  const bool minus = *at_ == '-';
  if (minus) ++at_;
  const char kind = at_[0] == '0' ? static_cast<char>(std::tolower(static_cast<unsigned char>(at_[1]))) : ' ';
  if (kind == 'f' || kind == 'd') {  // the bits of a float or double
    const int digits = kind == 'f' ? 8 : 16;
    const u64 bits = std::strtoull(std::string(at_ + 2, at_ + 2 + digits).c_str(), nullptr, 16);
    at_ += 2 + digits;
    return minus ? bits ^ u64{1} << (4 * digits - 1) : bits;
  }
  char* stop = nullptr;
  const u64 value = std::strtoull(at_, &stop, 0);
  if (stop == at_) fail("expected a number at '" + excerpt(20) + "'");
  at_ = stop;
  if (*at_ == 'U') ++at_;
  return minus ? 0 - value : value;
}

// ---- directives

Parser::Variable Parser::variable() {
  Variable v;
  std::size_t elements = 1;
  while (skip(), *at_ == '.') {
    ++at_;
    const std::string w = name();
    if (w == "align") {
      v.align = number();
    } else if (w == "v2") {
      elements = 2;
    } else if (w == "v4") {
      elements = 4;
    } else if (const auto type = type_named(w)) {
      v.type = *type;
    } else if (w != "ptr" && w != "global" && w != "shared" && w != "const" && w != "local") {
      fail("variable: ." + w);
    }
  }
  v.name = name();
  v.size = static_cast<std::size_t>(size_of(v.type)) * elements;
  if (v.align == 0) v.align = v.size;
  while (take('[')) {
    if (take(']')) {
      v.size = 0;
      break;
    }
    v.size *= number();
    need(']');
  }
  return v;
}

void Parser::initialise(const Variable& v, u8* memory) {
  const auto each = static_cast<std::size_t>(size_of(v.type));
  std::size_t at = 0;
  const auto one = [&] {
    skip();
    u64 value = 0;
    if (std::isdigit(static_cast<unsigned char>(*at_)) != 0 || *at_ == '-') {
      value = number();
    } else {
      std::string w = name();
      const bool generic = w == "generic" && take('(');
      if (generic) w = name();
      if (generic) need(')');
      if (const auto g = module_->globals.find(w); g != module_->globals.end())
        value = reinterpret_cast<u64>(g->second.data);
    }
    std::memcpy(memory + at, &value, each);
    at += each;
  };
  if (!take('{')) return one();
  for (int depth = 1; depth > 0;) {
    if (take('{')) {
      ++depth;
    } else if (take('}')) {
      --depth;
    } else if (!take(',')) {
      one();
    }
  }
}

void Parser::module_directive() {
  skip();
  if (*at_ != '.') fail("module: expected a directive at '" + excerpt(20) + "'");
  ++at_;
  const std::string w = name();
  if (w == "target") {
    const std::string line = rest_of_line();
    module_->target = std::atoi(line.c_str() + line.find("sm_") + 3);
  } else if (w == "file") {
    const int n = integer();
    const std::string line = rest_of_line();
    const auto quote = line.find('"');
    module_->files[n] = line.substr(quote + 1, line.find('"', quote + 1) - quote - 1);
  } else if (w == "version" || w == "address_size" || w == "loc" || w == "pragma") {
    rest_of_line();
  } else if (w == "section") {
    while (*at_ != '{') advance();
    skip_braces();
  } else if (w == "global" || w == "const") {
    const Variable v = variable();
    auto& g = module_->globals[v.name];
    g.memory = std::make_unique<u8[]>(v.size + 512);
    g.data = reinterpret_cast<u8*>(aligned(reinterpret_cast<u64>(g.memory.get()), 256));
    g.size = v.size;
    if (take('=')) initialise(v, g.data);
    need(';');
  } else if (w == "shared") {
    const Variable v = variable();
    module_->shared[v.name] = {v.size, v.align};
    need(';');
  } else if (w == "func") {
    // Never called by what is run here; a call is an error.
    while (*at_ != '{' && *at_ != ';') advance();
    if (*at_ == '{') skip_braces();
  } else if (w == "entry") {
    entry();
  } else if (w == "alias") {
    skip_to(';');
  } else if (w != "visible" && w != "extern" && w != "weak" && w != "common") {
    fail("module: ." + w);
  }
  take(';');
}

void Parser::entry() {
  auto kernel = std::make_unique<Kernel>();
  kernel_ = kernel.get();
  kernel_->module = module_.get();
  kernel_->name = name();
  if (take('(')) {
    while (!take(')')) {
      if (take(',')) continue;
      need('.');
      if (name() != "param") fail("expected .param");
      const Variable v = variable();
      kernel_->param_bytes = aligned(kernel_->param_bytes, v.align);
      kernel_->params.push_back({v.name, kernel_->param_bytes, v.size});
      kernel_->param_bytes += v.size;
    }
  }
  kernel_->param_memory.resize(kernel_->param_bytes + 256);
  entry_directives();
  skip();
  if (*at_ != '{') return;  // declared only
  scopes_.clear();
  branches_.clear();
  static_shared_.clear();
  scope_ = nullptr;
  body();
  for (const Branch& b : branches_) {
    int& target = kernel_->code[b.index].target;
    for (const Scope* s = b.scope; s != nullptr && target < 0; s = s->parent) {
      if (const auto f = s->labels.find(b.label); f != s->labels.end()) target = f->second;
    }
    if (target < 0) fail("no label " + b.label);
  }
  Instruction last;
  last.op = Op::kExit;
  last.text = "(end)";
  kernel_->code.push_back(last);
  module_->kernels[kernel_->name] = std::move(kernel);
}

void Parser::entry_directives() {
  const auto numbers = [&] {
    std::vector<int> values = {integer()};
    while (take(',')) values.push_back(integer());
    return values;
  };
  while (take('.')) {
    const std::string w = name();
    if (w == "maxntid" || w == "reqntid") {
      kernel_->max_threads = 1;
      for (const int n : numbers()) kernel_->max_threads *= n;
    } else if (w == "reqnctapercluster") {
      kernel_->cluster[0] = kernel_->cluster[1] = kernel_->cluster[2] = 1;
      int axis = 0;
      for (const int n : numbers()) kernel_->cluster[axis++] = static_cast<u32>(n);
    } else if (w == "minnctapersm") {
      kernel_->min_blocks = numbers()[0];
    } else if (w == "maxnreg" || w == "maxclusterrank" || w == "maxnctapersm") {
      numbers();
    } else if (w == "pragma") {
      skip_to(';');
    } else if (w != "explicitcluster") {
      fail("entry: ." + w);
    }
  }
}

void Parser::body() {
  need('{');
  scopes_.push_back(std::make_unique<Scope>());
  scopes_.back()->parent = scope_;
  scope_ = scopes_.back().get();
  while (!take('}')) {
    if (at_ >= end_) fail("unexpected end");
    if (*at_ == '{') {
      body();
    } else if (*at_ == ';') {
      advance();
    } else if (*at_ == '.') {
      ++at_;
      body_directive();
    } else if (!label()) {
      instruction();
    }
  }
  scope_ = scope_->parent;
}

void Parser::body_directive() {
  const std::string w = name();
  if (w == "reg") {
    registers();
  } else if (w == "shared") {
    const Variable v = variable();
    static_shared_[v.name] = place_static(v.size, v.align);
  } else if (w == "local") {
    const Variable v = variable();
    const std::size_t at = aligned(kernel_->local_bytes, v.align);
    kernel_->locals[v.name] = at;
    kernel_->local_bytes = at + v.size;
  } else if (w == "loc") {
    loc_file_ = integer();
    loc_line_ = integer();
    rest_of_line();
  } else if (w == "pragma" || w == "param") {
    skip_to(';');
  } else {
    fail("body: ." + w);
  }
}

void Parser::registers() {
  need('.');
  const std::string type = name();
  if (!type_named(type)) fail("registers of ." + type);
  do {
    const std::string base = name();
    if (take('<')) {
      const int n = integer();
      need('>');
      for (int i = 0; i < n; ++i) scope_->registers[base + std::to_string(i)] = new_register();
    } else {
      scope_->registers[base] = new_register();
    }
  } while (take(','));
}

std::size_t Parser::place_static(std::size_t size, std::size_t align) {
  const std::size_t at = aligned(std::max<std::size_t>(kernel_->static_shared, kSharedBase), align);
  kernel_->static_shared = at + size;
  return at;
}

int Parser::find_register(const std::string& name) const {
  for (const Scope* s = scope_; s != nullptr; s = s->parent) {
    if (const auto f = s->registers.find(name); f != s->registers.end()) return f->second;
  }
  return -1;
}

}  // namespace ptx
