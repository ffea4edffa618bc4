// The two C functions of an op whose plan is worked out once: Plan(args) checks them, workspace_bytes() says
// what it needs, run() runs.
#pragma once

#include "core/checks.hpp"

namespace flashu::api {

template <class Plan, class Args>
int32_t run(const char* op, const Args* args) {
  return core::guarded(op, [&] {
    const Args& a = core::read_args(args);
    Plan(a).run(a.workspace, a.workspace_bytes);
  });
}

template <class Plan, class Args>
int32_t workspace(const char* op, const Args* args, uint64_t* bytes) {
  return core::guarded(op, [&] {
    const Args& a = core::read_args(args);
    FLASHU_CHECK(bytes != nullptr, FLASHU_INVALID_VALUE, "bytes: expected a pointer, got NULL");
    *bytes = Plan(a).workspace_bytes();
  });
}

}  // namespace flashu::api
