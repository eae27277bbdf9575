// Vectors by the compiler's own vector types, so one source serves AVX2, AVX-512 and others.
#pragma once
#include <cstdint>
#include <cstring>
#include <limits>

namespace nsa {

#if defined(__AVX512F__)
constexpr int64_t WIDTH = 16;
#elif defined(__AVX2__)
constexpr int64_t WIDTH = 8;
#else
constexpr int64_t WIDTH = 4;
#endif
constexpr float MINUS_INFINITY = -std::numeric_limits<float>::infinity();

typedef float Vec __attribute__((vector_size(WIDTH * 4)));
typedef int32_t Ints __attribute__((vector_size(WIDTH * 4)));

inline Vec load(const float* p) {
  Vec x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline void store(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }
inline Vec splat(float x) { return x - Vec{}; }
// A NaN in x is passed over, so it cannot hide behind a maximum: it shows in the sum of exps.
inline Vec larger(Vec x, Vec than) { return x > than ? x : than; }

inline float sum_of(Vec x) {
  float total = 0;
  for (int64_t i = 0; i < WIDTH; i++) total += x[i];
  return total;
}
inline float largest_of(Vec x) {
  float top = x[0];
  for (int64_t i = 1; i < WIDTH; i++) top = x[i] > top ? x[i] : top;
  return top;
}

// exp, good to 2 units in the last place for x <= 88; exactly 0 below -87.3 (for -inf too), NaN for
// NaN. Cephes' polynomial; 2^n is put together in the exponent's bits.
inline Vec exponential(Vec x) {
  const Vec log2e = splat(1.44269504088896341f), magic = splat(12582912.f);  // 1.5 * 2^23
  const auto dead = x < splat(-87.3f);
  x = x > splat(88.f) ? splat(88.f) : x;
  Vec shifted = x * log2e + magic;  // its low bits are round(x * log2e)
  Vec n = shifted - magic;
  Vec f = x - n * splat(0.693359375f);
  f = f - n * splat(-2.12194440e-4f);
  Vec p = splat(1.9875691500e-4f);
  p = p * f + splat(1.3981999507e-3f);
  p = p * f + splat(8.3334519073e-3f);
  p = p * f + splat(4.1665795894e-2f);
  p = p * f + splat(1.6666665459e-1f);
  p = p * f + splat(5.0000001201e-1f);
  p = p * (f * f) + (f + splat(1.f));
  Ints bits, base;
  std::memcpy(&bits, &shifted, sizeof bits);
  std::memcpy(&base, &magic, sizeof base);
  bits = ((bits - base) + 127) << 23;
  Vec power;
  std::memcpy(&power, &bits, sizeof power);
  return dead ? Vec{} : p * power;
}

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

}  // namespace nsa
