// The routing family on the CPU, after all checks that do not read data (csrc/api/routing.cpp); outputs are
// not empty.
#pragma once

#include "flashu/routing.h"

namespace flashu::cpu {

void cosine_importance(const flashu_cosine_importance_args& args);
void value_norms(const flashu_value_norms_args& args);
void select_topk(const flashu_select_topk_args& args);
void select_threshold(const flashu_select_threshold_args& args);
void gather_rows(const flashu_move_rows_args& args);
void scatter_rows(const flashu_move_rows_args& args);
void scatter_add_rows(const flashu_move_rows_args& args);

}  // namespace flashu::cpu
