// Instructions, their operands and labels.
#include <cctype>

#include "ptx/opcodes.hpp"
#include "ptx/parser.hpp"

namespace ptx {

namespace {

bool digit(char c) { return std::isdigit(static_cast<unsigned char>(c)) != 0; }

bool in_name(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_' || c == '$' || c == '%';
}

// One line of at most 160 characters, for reports.
std::string shortened(std::string text) {
  for (char& c : text) {
    if (c == '\n' || c == '\t') c = ' ';
  }
  return text.size() <= 160 ? text : text.substr(0, 120) + " ... " + text.substr(text.size() - 30);
}

}  // namespace

const u64* Parser::pool(u64 value) {
  auto& found = constants_[value];
  if (found == nullptr) found = new_pool(value);
  return found;
}

u64* Parser::new_pool(u64 value) {
  module_->pools.push_back(std::make_unique<u64[]>(32));
  u64* p = module_->pools.back().get();
  for (int i = 0; i < 32; ++i) p[i] = value;
  return p;
}

Operand Parser::constant(u64 value) {
  Operand r;
  r.kind = Operand::kConstant;
  r.pool = pool(value);
  return r;
}

Operand Parser::simple() {
  skip();
  const bool not_ = take('!');
  if (!not_ && (digit(*at_) || (*at_ == '-' && digit(at_[1])))) return constant(number());
  if (not_ || *at_ == '-') {
    if (!not_) advance();
    Operand r = simple();
    r.negated = true;
    return r;
  }
  const char* from = at_;
  while (at_ < end_ && (in_name(*at_) || (*at_ == '.' && *from == '%'))) ++at_;
  if (from == at_) fail("operand at '" + excerpt(20) + "'");
  return symbol({from, at_});
}

Operand Parser::symbol(const std::string& name) {
  Operand r;
  if (name == "_") {
    r.kind = Operand::kSink;
    return r;
  }
  r.kind = Operand::kRegister;
  r.index = find_register(name);
  if (r.index >= 0) return r;
  if (name[0] == '%' || kernel_->locals.contains(name)) {
    const auto [special, fresh] = kernel_->specials.try_emplace(name, 0);
    if (fresh) special->second = new_register();
    r.index = special->second;
    return r;
  }
  if (name == "WARP_SZ") return constant(32);
  for (const Param& p : kernel_->params) {
    if (p.name == name) return constant(kernel_->param_base() + p.offset);
  }
  if (const auto s = static_shared_.find(name); s != static_shared_.end()) return constant(s->second);
  if (const auto g = module_->globals.find(name); g != module_->globals.end())
    return constant(reinterpret_cast<u64>(g->second.data));
  if (const auto m = module_->shared.find(name); m != module_->shared.end()) {
    if (m->second.size > 0) {
      static_shared_[name] = place_static(m->second.size, m->second.align);
      return constant(static_shared_[name]);
    }
    kernel_->dynamic_align = std::max(kernel_->dynamic_align, m->second.align);
    kernel_->dynamic_pools.push_back(new_pool(0));
    r = Operand{};
    r.kind = Operand::kConstant;
    r.pool = kernel_->dynamic_pools.back();
    return r;
  }
  // A label or a function; whoever wants it looks at the name.
  last_name_ = name;
  return Operand{};
}

Operand Parser::address() {
  Operand r = simple();
  if (r.kind == Operand::kNone) fail("address of " + last_name_);
  r.kind = Operand::kMemory;
  for (;;) {
    if (take('+') || (skip(), *at_ == '-')) {
      r.offset += static_cast<s64>(number());
    } else {
      break;
    }
  }
  if (take(',')) {
    need('{');
    do {
      r.sub.push_back(simple());
    } while (take(','));
    need('}');
  }
  need(']');
  return r;
}

Operand Parser::operand() {
  if (take('[')) return address();
  if (take('{')) {
    Operand r;
    r.kind = Operand::kVector;
    if (take('}')) return r;
    do {
      r.sub.push_back(simple());
    } while (take(','));
    need('}');
    return r;
  }
  if (take('(')) {  // of a call
    Operand r;
    r.kind = Operand::kVector;
    skip_to(')');
    return r;
  }
  Operand r = simple();
  if (take('+')) {  // symbol + constant
    if (r.kind != Operand::kConstant) fail("sum of what is no symbol");
    r.pool = pool(r.value() + number());
  }
  if (take('|')) r.second = simple().index;
  return r;
}

bool Parser::label() {
  const char* behind = at_;
  while (behind < end_ && in_name(*behind)) ++behind;
  const std::string name(at_, behind);
  while (behind < end_ && (*behind == ' ' || *behind == '\t')) ++behind;
  if (name.empty() || *behind != ':' || behind[1] == ':') return false;
  at_ = behind + 1;
  scope_->labels[name] = static_cast<int>(kernel_->code.size());
  return true;
}

void Parser::instruction() {
  const char* const start = at_;
  Instruction i;
  i.line = line_;
  i.loc_file = loc_file_;
  i.loc_line = loc_line_;
  if (take('@')) {
    i.guard_negated = take('!');
    const std::string p = name();
    i.guard = find_register(p);
    if (i.guard < 0) fail("guard " + p);
  }
  decode(i, word());
  skip();
  if (*at_ != ';') {
    do {
      i.operands.push_back(operand());
    } while (take(','));
  }
  if (i.op == Op::kBra) branches_.push_back({kernel_->code.size(), last_name_, scope_});
  i.text = shortened({start, at_});
  need(';');
  if (i.op == Op::kWgmma || i.op == Op::kCpAsyncBulk) kernel_->uses_async_proxy = true;
  kernel_->code.push_back(std::move(i));
}

}  // namespace ptx
