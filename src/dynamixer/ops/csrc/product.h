// Vectors, and matrix products of a few tokens with weights that were packed for them, in fp32 or bf16 with sums in fp32.
//
// A word is 32 bits of what is summed over: one fp32 number, two neighbours in bf16, or four of eight bits, which one instruction multiplies. Where
// the processor does not multiply bf16, words of it are numbers widened to fp32: the same but for the order of sums.
// Letters: K what is summed over, N columns of the result. A panel is WIDTH columns side by side: [words of K, WIDTH].
#pragma once

#include <torch/types.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace dynamixer {

#ifdef __AVX512F__
constexpr int64_t LANES = 16, ROWS = 8;
#else
constexpr int64_t LANES = 8, ROWS = 4;
#endif
#ifdef __AVX512BF16__
constexpr bool HALF = true;  // whether bf16 is multiplied by the processor itself
#else
constexpr bool HALF = false;
#endif
#ifdef __AVX512VNNI__
constexpr bool BYTES = true;  // the same for eight bits, without which there are none
#else
constexpr bool BYTES = false;
#endif
typedef float Vec __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4), aligned(4)));
typedef uint32_t Bits __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
typedef uint32_t Word __attribute__((may_alias, aligned(2)));
// What to compute with where tokens are of type T: bf16 only where the processor multiplies it.
template <typename T>
using Kind = std::conditional_t<std::is_same_v<T, at::BFloat16> && HALF, at::BFloat16, float>;
// What is in words for a T.
template <typename T>
using Held = std::conditional_t<sizeof(T) == 1, T, Kind<T>>;

template <typename T>
constexpr int64_t PER_WORD = 4 / sizeof(Held<T>);

inline int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
template <typename T>
int64_t words_of(int64_t k) { return (k + PER_WORD<T> - 1) / PER_WORD<T>; }

inline Vec broadcast(float x) { return x - Vec{}; }

template <typename T>
Vec get(const T* from) {
  if constexpr (std::is_same_v<T, float>) return *(const Vec*)from;
  else return (Vec)(__builtin_convertvector(*(const Halves*)from, Bits) << 16);
}

template <typename T>
void put(T* to, Vec v) {
  if constexpr (std::is_same_v<T, float>) *(Vec*)to = v;
#ifdef __AVX512BF16__
  else _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  else {  // to the nearest, of two as near the even one; what is not a number stays none
    const Bits bits = (Bits)v, nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    *(Halves*)to = __builtin_convertvector(v == v ? nearest : Bits{} + 0x7fc0, Halves);
  }
#endif
}

inline float total(Vec v) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps((__m512)v);
#else
  const Vec two = v + __builtin_shuffle(v, Ints{4, 5, 6, 7, 0, 1, 2, 3}), four = two + __builtin_shuffle(two, Ints{2, 3, 0, 1, 6, 7, 4, 5});
  return four[0] + four[1];
#endif
}

// e to the x, within two units of the last place, or ROUGH within 5e-5 of itself; 0 below -87, where fp32 ends.
template <bool ROUGH, typename V>
V exponential(V x) {
  using Ints = decltype(x > x);
  const float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to a whole number
  const V shifted = x * 1.44269504f + magic, whole = shifted - magic;
  const V r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;  // ln 2 in two parts
  V sum = (ROUGH ? 1.f / 24 : 1.f / 5040) - V{};
  if constexpr (!ROUGH)
    for (float one : {1.f / 720, 1.f / 120, 1.f / 24}) sum = sum * r + one;
  for (float one : {1.f / 6, 1.f / 2, 1.f, 1.f}) sum = sum * r + one;
  const Ints power = ((Ints)shifted << 23) + (127 << 23);  // the low bits of `shifted` are the whole number
  return (V)((Ints)(sum * (V)power) & ~(x <= -87.f));  // a NaN stays one
}

// GELU and its derivative. The error function is Abramowitz and Stegun's: for fp32 their 7.1.26, within 1.5e-7, for bf16 their
// 7.1.25, within 2.5e-5, which rounding to bf16 hides.
struct Gelu {
  Vec value, slope;
};
template <typename T>
Gelu gelu(Vec x) {
  constexpr bool ROUGH = !std::is_same_v<T, float>;
  const Vec size = (Vec)((Ints)x & 0x7fffffff), density = exponential<ROUGH>(x * x * -0.5f);
  const Vec steps = 1.f + size * ((ROUGH ? 0.47047f : 0.3275911f) * 0.70710678f);
  Vec t, sum;
  if constexpr (ROUGH) {
#ifdef __AVX512F__
    t = (Vec)_mm512_rcp14_ps((__m512)steps);
#else
    t = 1.f / steps;
#endif
    sum = (0.7478556f * t - 0.0958798f) * t + 0.3480242f;
  } else {
    t = 1.f / steps, sum = broadcast(1.061405429f);
    for (float one : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) sum = sum * t + one;
  }
  const Vec tail = 0.5f * sum * t * density;  // of the normal distribution beyond |x|
  const Vec below = x < 0.f ? tail : 1.f - tail;
  return {x * below, below + x * density * 0.39894228f};
}

// What sums of products are kept as: those of eight bits as whole numbers, since GCC spills vectors that change between the two.
template <typename T>
using Sum = std::conditional_t<sizeof(T) == 1, Ints, Vec>;

inline Vec numbers(Vec v) { return v; }
inline Vec numbers(Ints v) { return __builtin_convertvector(v, Vec); }

// Keep a vector that several rows are multiplied with: where registers are few, GCC would read it from memory anew for each.
template <typename V>
inline V kept(V v) {
#if defined(__x86_64__) && !defined(__AVX512F__)
  asm("" : "+x"(v));
#endif
  return v;
}

template <typename T>
inline Sum<T> add_product(Sum<T> sum, Word left, Bits right) {
  if constexpr (std::is_same_v<T, float>) {
    float value;
    std::memcpy(&value, &left, 4);
    return sum + value * (Vec)right;
  }
#ifdef __AVX512VNNI__
  else if constexpr (sizeof(T) == 1)  // unsigned on the left, signed on the right
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(left), (__m512i)right);
#endif
#ifdef __AVX512BF16__
  else return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(left), (__m512bh)right);
#else
  else return sum;
#endif
}

// The sums over words p of a[i * row + p * step] b[p * apart + ...] for MR rows i and NV vectors; `use` is told each.
template <typename T, int MR, int NV, typename Use>
void tile(int64_t words, const Word* a, int64_t row, int64_t step, const Word* b, int64_t apart, Use use) {
  Sum<T> sum[MR][NV];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < NV; ++j) sum[i][j] = Sum<T>{};
  for (int64_t p = 0; p < words; ++p, a += step, b += apart) {
    Bits right[NV];
#pragma GCC unroll 3
    for (int j = 0; j < NV; ++j) right[j] = kept(*(const Bits*)(b + j * LANES));
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 3
      for (int j = 0; j < NV; ++j) sum[i][j] = add_product<T>(sum[i][j], a[i * row], right[j]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < NV; ++j) use(i, j * LANES, numbers(sum[i][j]));
}

// How many vectors of columns a panel has: panels hold nothing but columns, filled up to one vector.
inline int64_t panel_of(int64_t columns) {
  const int64_t vectors = up(columns, LANES) / LANES;
  return vectors % 3 == 0 ? 3 : vectors % 2 == 0 ? 2 : 1;
}

struct Panels {
  const Word* at;
  int64_t words, columns, vectors;  // columns are whole vectors
  Panels(const Word* at_, int64_t words_, int64_t columns_)
      : at(at_), words(words_), columns(up(columns_, LANES)), vectors(panel_of(columns_)) {}
};

// How `use` is told of a vector: at once, or, if it is long, from a loop over what was put aside.
enum class Told { at_once, in_loop };

// The products of `rows` rows with panels; `use` is told each vector of the result, its row and its first column; before, `ahead` which tile comes.
// Word p of row i is a[i * row + p], or with BLOCKED a[(i / ROWS * words + p) * ROWS + i % ROWS].
template <typename T, bool BLOCKED, int NV, Told TOLD, typename Use, typename Ahead>
void multiply_by(int64_t rows, const Word* a, int64_t row, const Panels& b, Use use, Ahead ahead) {
  for (int64_t first = 0; first < b.columns; first += NV * LANES) {
    const Word* panel = b.at + first * b.words;
    const auto some = [&](auto count, int64_t i) {
      constexpr int MR = decltype(count)::value;
      const Word* from = a + (BLOCKED ? i * b.words : i * row);
      const int64_t to_row = BLOCKED ? 1 : row, step = BLOCKED ? ROWS : 1;
      if constexpr (TOLD == Told::at_once) {
        tile<Held<T>, MR, NV>(b.words, from, to_row, step, panel, NV * LANES, [&](int64_t r, int64_t n, Vec v) { use(i + r, first + n, v); });
      } else {
        float made[MR * NV * LANES];
        tile<Held<T>, MR, NV>(b.words, from, to_row, step, panel, NV * LANES, [&](int64_t r, int64_t n, Vec v) { put(made + r * NV * LANES + n, v); });
        for (int64_t r = 0; r < MR; ++r)
          for (int64_t n = 0; n < NV * LANES; n += LANES) use(i + r, first + n, get(made + r * NV * LANES + n));
      }
    };
    int64_t i = 0;
    for (; i + ROWS <= rows; i += ROWS) ahead(i, first), some(std::integral_constant<int, ROWS>(), i);
    if constexpr (!BLOCKED)
      for (; i < rows; ++i) some(std::integral_constant<int, 1>(), i);
  }
}

template <typename T, bool BLOCKED, Told TOLD, typename Use, typename Ahead>
void multiply(int64_t rows, const Word* a, int64_t row, const Panels& b, Use use, Ahead ahead) {
  if (b.vectors == 3) return multiply_by<T, BLOCKED, 3, TOLD>(rows, a, row, b, use, ahead);
  if (b.vectors == 2) return multiply_by<T, BLOCKED, 2, TOLD>(rows, a, row, b, use, ahead);
  multiply_by<T, BLOCKED, 1, TOLD>(rows, a, row, b, use, ahead);
}

// The same for rows of tokens in memory, `apart` numbers from one to the next.
template <typename T, Told TOLD = Told::at_once, typename Use>
void multiply_rows(int64_t rows, const T* a, int64_t apart, const Panels& b, Use use) {
  const auto nothing = [](int64_t, int64_t) {};
  if constexpr (std::is_same_v<T, Held<T>>) {
    multiply<T, false, TOLD>(rows, (const Word*)a, apart / PER_WORD<T>, b, use, nothing);
  } else {
    static thread_local std::vector<float> wide;
    if (int64_t(wide.size()) < rows * b.words) wide.resize(rows * b.words);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < b.words; ++i) wide[r * b.words + i] = float(a[r * apart + i]);
    multiply<float, false, TOLD>(rows, (const Word*)wide.data(), b.words, b, use, nothing);
  }
}

// Rows in eight bits, each by its own least number and step: x is about low + step * q.
struct Rounded {
  std::vector<uint8_t> q;
  std::vector<float> low, step;

  template <typename T>
  void set(int64_t rows, int64_t k, const T* x) {
    if (int64_t(q.size()) < rows * k) q.resize(rows * k);
    if (int64_t(low.size()) < rows) low.resize(rows), step.resize(rows);
    for (int64_t r = 0; r < rows; ++r, x += k) {
      Vec least = get(x), most = least;
      for (int64_t i = LANES; i < k; i += LANES) {
        const Vec v = get(x + i);
        least = v < least ? v : least, most = v > most ? v : most;
      }
      float a = least[0], b = most[0];
      for (int i = 1; i < LANES; ++i) a = std::min(a, float(least[i])), b = std::max(b, float(most[i]));
      low[r] = a, step[r] = (b - a) / 255;
      const float by = b > a ? 255 / (b - a) : 0;
      uint8_t* to = q.data() + r * k;
      for (int64_t i = 0; i < k; i += LANES) {
        const Vec v = (get(x + i) - a) * by + 0.5f;
#ifdef __AVX512F__
        _mm_storeu_si128((__m128i*)(to + i), _mm512_cvtusepi32_epi8(_mm512_cvttps_epu32((__m512)v)));
#else
        for (int j = 0; j < LANES; ++j) to[i + j] = uint8_t(v[j]);
#endif
      }
    }
  }
};

// A layer's panels in eight bits, followed by each column's step and by the sum of its rounded weights times the step.
template <Told TOLD = Told::at_once, typename Use>
void multiply_rounded(int64_t rows, int64_t k, const Rounded& a, const Panels& b, Use use) {
  const float *by = (const float*)(b.at + b.words * b.columns), *all = by + b.columns, *step = a.step.data(), *low = a.low.data();
  multiply_rows<uint8_t, TOLD>(rows, a.q.data(), k, b, [=](int64_t r, int64_t n, Vec v) {
    use(r, n, v * get(by + n) * step[r] + low[r] * get(all + n));
  });
}

// Rows of numbers [rows, columns] for a sum over rows: blocks of `width` columns, each [words of rows, width]; what is missing is zero. Words of several
// rows are written one after another: blocks lie a power of two apart, for which a cache has few places.
template <typename T>
void turn(int64_t rows, int64_t columns, const T* from, int64_t apart, int64_t width, Word* to) {
  constexpr int64_t GROUP = 8;
  const int64_t words = words_of<T>(rows), padded = up(columns, width);
  for (int64_t p = 0; p < words; p += GROUP)
    for (int64_t first = 0, some = std::min(GROUP, words - p); first < padded; first += width) {
      Word* out = to + first * words + p * width;
      if (PER_WORD<T> == 1 && some == GROUP && first + width <= columns) {
        const T* in = from + p * apart + first;
        for (int64_t i = 0; i < width; i += 4)
#pragma GCC unroll 8
          for (int64_t q = 0; q < GROUP; ++q)
            for (int64_t j = i; j < i + 4; ++j) ((float*)out)[q * width + j] = float(in[q * apart + j]);
        continue;
      }
      for (int64_t n = 0; n < some * width; ++n) {
        const int64_t row = (p + n / width) * PER_WORD<T>, column = first + n % width;
        Held<T> word[PER_WORD<T>];
        for (int64_t q = 0; q < PER_WORD<T>; ++q)
          word[q] = row + q < rows && column < columns ? Held<T>(from[(row + q) * apart + column]) : Held<T>(0);
        std::memcpy(out + n, word, 4);
      }
    }
}

#ifdef __AVX512BF16__
// Eight columns of two rows at a time.
template <>
inline void turn<at::BFloat16>(int64_t rows, int64_t columns, const at::BFloat16* from, int64_t apart, int64_t width, Word* to) {
  constexpr int64_t GROUP = 4;
  const int64_t words = words_of<at::BFloat16>(rows), padded = up(columns, width);
  for (int64_t first = 0; first < words; first += GROUP)
    for (int64_t i = 0; i < padded; i += 8) {
      Word* out = to + i / width * width * words + i % width;
      for (int64_t p = first; p < std::min(words, first + GROUP); ++p) {
        const at::BFloat16 *one = from + 2 * p * apart, *two = 2 * p + 1 < rows ? one + apart : nullptr;
        const auto eight = [&](const at::BFloat16* row) {
          return row && i < columns ? _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(row + i))) : _mm256_setzero_si256();
        };
        _mm256_storeu_si256((__m256i*)(out + p * width), _mm256_or_si256(eight(one), _mm256_slli_epi32(eight(two), 16)));
      }
    }
}
#endif

// The sum over `rows` rows of left[., n] right[., k] for all n and k, told to `use` by n and the first of a vector of k. The columns of both are
// multiples of LANES.
template <typename T>
struct Outer {
  std::vector<uint32_t> left, right;

  // `sums` [n, k] are what `use` will read or write: memory is told in time.
  template <typename Use>
  void operator()(int64_t rows, int64_t n, int64_t k, std::initializer_list<const float*> sums, Use use) {
    const Panels panels(right.data(), words_of<T>(rows), k);
    multiply<T, true, Told::at_once>(n, left.data(), 0, panels, use, [=](int64_t i, int64_t first) {
      for (const float* sum : sums)
        for (int64_t r = 0; r < ROWS; ++r)
          for (int64_t v = 0; v < panels.vectors; ++v) __builtin_prefetch(sum + (i + r) * k + first + v * LANES, 1);
    });
  }
  void set_left(int64_t rows, int64_t n, const T* from) {
    left.resize(words_of<T>(rows) * n);
    turn<T>(rows, n, from, n, ROWS, left.data());
  }
  void set_right(int64_t rows, int64_t k, const T* from) {
    const int64_t width = panel_of(k) * LANES;
    right.resize(words_of<T>(rows) * up(k, width));
    turn<T>(rows, k, from, k, width, right.data());
  }
};

}  // namespace dynamixer
