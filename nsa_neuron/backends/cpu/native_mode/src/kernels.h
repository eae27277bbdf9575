// The kernels; api.cpp exports them to Python.
#pragma once
#include <memory>

#include "call.h"

namespace nsa {

void interval_forward(const Call& call);
// dq, dk and dv, from grad_o, lse and shift.
void interval_backward(const Call& call);
// Compressed attention (o, lse; where o is given) and selection (ids; where they are given) from
// one q @ k. Without o, probabilities come from the lse given.
void compressed_forward(const Call& call);
void selected_forward(const Call& call);
// Like interval_backward; dk and dv of blocks that nobody reads are not written.
void selected_backward(const Call& call);
// Calls of a few queries per sequence (a decode step): the branches of one nsa_attention, or one op.
// Keys are read as they lie, paged or not, and shared out to threads however few queries there are.
void few_queries(const Call* calls, int64_t count);
// o of branches that lie in q, k and v, all like o.
void gated_sum(const Call& call);
// Gradients of the gates in lse [B, S, Hq, 3], and of the branches, where wanted, in dq, dk and dv.
void gated_sum_backward(const Call& call);

}  // namespace nsa
