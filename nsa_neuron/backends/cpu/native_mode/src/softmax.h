// Softmax over rows of logits whose length is a multiple of WIDTH.
#pragma once
#include <algorithm>
#include <cmath>

#include "simd.h"

namespace nsa {

// -inf outside [low, high) of a row.
inline void hide(float* row, int64_t length, int64_t low, int64_t high) {
  low = std::min(std::max<int64_t>(low, 0), length);
  high = std::min(std::max(high, low), length);
  std::fill(row, row + low, MINUS_INFINITY);
  std::fill(row + high, row + length, MINUS_INFINITY);
}

inline float largest(const float* row, int64_t length) {
  Vec top = splat(MINUS_INFINITY);
  for (int64_t i = 0; i < length; i += WIDTH) top = larger(load(row + i), top);
  return largest_of(top);
}

// row = exp(row - top); returns the sum. `top` is finite.
inline float exponentials(float* row, int64_t length, float top) {
  Vec total = Vec{}, shift = splat(top);
  for (int64_t i = 0; i < length; i += WIDTH) {
    const Vec p = exponential(load(row + i) - shift);
    store(row + i, p);
    total += p;
  }
  return sum_of(total);
}

// Running maximum and sum of a row that comes in parts.
struct Running {
  float top = MINUS_INFINITY, total = 0;

  // Takes in a part, which becomes exp(part - top); returns what earlier results must be multiplied
  // by.
  float take(float* part, int64_t length) {
    const float above = std::max(top, largest(part, length));
    if (above == MINUS_INFINITY) {
      // Nothing is seen yet, unless it is NaN: exp keeps that.
      total += exponentials(part, length, 0.f);
      return 1.f;
    }
    const float fade = top == MINUS_INFINITY ? 0.f : std::exp(top - above);
    total = total * fade + exponentials(part, length, above);
    top = above;
    return fade;
  }
  float lse() const { return total == 0 ? MINUS_INFINITY : (top == MINUS_INFINITY ? 0.f : top) + std::log(total); }
  float inverse() const { return total == 0 ? 0.f : 1.f / total; }
};

}  // namespace nsa
