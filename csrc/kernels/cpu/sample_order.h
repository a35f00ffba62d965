// An order of samples in which those that lie close together are neighbours: their activation patterns resemble one
// another, so that chain_patterns-inl.h finds more terms for them to share. A heuristic: every order is right.
#pragma once

#include "../params.h"

namespace lipfast {

// Samples that are ordered among themselves.
constexpr int64_t kOrderBlock = 1024;

// order[begin .. end): a permutation of the samples begin .. end - 1 of x (rows of `length` values), cut in half along
// the direction in which they spread most, again and again, down to groups of `group` samples, which stay in their own
// order. The same on every machine but for ties and rounding; NaN and overflow make it a poor order, nothing else.
void order_samples(const void* x, Dtype dtype, int64_t length, int64_t begin, int64_t end, int64_t group,
                   int64_t* order);

}  // namespace lipfast
