// Generate, normalise and mix in one pass over the tokens, forward and backward, for processors.
//
// A chunk of lines is worked on at a time, so that its mixing matrices live in the cache and never in memory; the backward pass
// makes them again. Softmax and sums are in fp32; what is multiplied is in bf16 for tokens in bf16 where the processor multiplies it, else in fp32.
//
// Letters: L tokens in a line, C channels, S segments, c = C/S, d reduced width; a unit is one segment of one line.
// P after a letter: rounded up to whole vectors. A matrix is [output token, input token], its rows of LP numbers; what is
// padded has weight 0: its logits start at LOWEST with the softmax, at 0 without.

#include "product.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>

namespace {

using dynamixer::Kind;
using dynamixer::words_of;

using at::Tensor;
using std::optional;
typedef float Vec __attribute__((vector_size(32), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(32), aligned(4)));
#define DISPATCH(TYPE, NAME, ...) \
  AT_DISPATCH_SWITCH(TYPE, NAME, AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__) AT_DISPATCH_CASE_REDUCED_FLOATING_TYPES(__VA_ARGS__))
constexpr int64_t LANES = 8, WIDE = dynamixer::LANES;
constexpr float LOWEST = -1e30f;
constexpr int64_t CHUNK_BYTES = 192 * 1024;  // of matrices: what stays in a core's second cache beside the weights

int64_t up(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

Vec broadcast(float x) { return Vec{x, x, x, x, x, x, x, x}; }

// A matrix of numbers: where it begins and how far apart its rows (and columns) are.
struct In {
  const float* at;
  int64_t row, column = 1;
};
struct Out {
  float* at;
  int64_t row;
};

template <int MR, int NV>
inline void tile(int64_t k, In a, In b, Out out) {
  Vec sum[MR][NV];
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j) sum[i][j] = broadcast(0);
  for (int64_t p = 0; p < k; ++p) {
    Vec right[NV];
    for (int j = 0; j < NV; ++j) right[j] = dynamixer::kept(*(const Vec*)(b.at + p * b.row + j * LANES));
    for (int i = 0; i < MR; ++i) {
      const Vec left = broadcast(a.at[i * a.row + p * a.column]);
      for (int j = 0; j < NV; ++j) sum[i][j] += left * right[j];
    }
  }
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j) *(Vec*)(out.at + i * out.row + j * LANES) = sum[i][j];
}

// NV vectors of columns, MR rows at a time, the rest at once.
template <int MR, int NV>
void strip(int64_t m, int64_t k, In a, In b, Out out) {
  int64_t i = 0;
  for (; i + MR <= m; i += MR, a.at += MR * a.row, out.at += MR * out.row) tile<MR, NV>(k, a, b, out);
  switch (m - i) {
    case 7: if constexpr (MR > 7) return tile<7, NV>(k, a, b, out);
    case 6: if constexpr (MR > 6) return tile<6, NV>(k, a, b, out);
    case 5: if constexpr (MR > 5) return tile<5, NV>(k, a, b, out);
    case 4: if constexpr (MR > 4) return tile<4, NV>(k, a, b, out);
    case 3: if constexpr (MR > 3) return tile<3, NV>(k, a, b, out);
    case 2: if constexpr (MR > 2) return tile<2, NV>(k, a, b, out);
    case 1: return tile<1, NV>(k, a, b, out);
  }
}

// out[m, n] = A[m, k] B[k, n] for one segment of a line, n whole vectors.
void product(int64_t m, int64_t n, int64_t k, In a, In b, Out out) {
  if (n == 3 * LANES) return strip<4, 3>(m, k, a, b, out);
  int64_t j = 0;
  for (; j + 2 * LANES <= n; j += 2 * LANES, b.at += 2 * LANES, out.at += 2 * LANES)
    m % 6 && m % 4 == 0 && m < 24 ? strip<4, 2>(m, k, a, b, out) : strip<6, 2>(m, k, a, b, out);
  if (j < n) strip<8, 1>(m, k, a, b, out);
}

struct Shape {
  int64_t images, height, width, length, channels, segments, reduced, axis;
  int64_t c, lp, cp, inputs, inputs_p, matrix, lines, chunk;

  Shape(const Tensor& x, const optional<Tensor>& features, int64_t axis_, int64_t segments_)
      : images(x.size(0)), height(x.size(1)), width(x.size(2)), length(x.size(axis_)), channels(x.size(3)), segments(segments_),
        axis(axis_) {
    reduced = features ? features->size(3) / segments : 0;
    c = channels / segments, cp = up(c), lp = up(length);
    inputs = length * reduced, inputs_p = dynamixer::up(inputs, WIDE), matrix = length * lp;
    lines = images * (axis == 1 ? width : height);
    chunk = std::max<int64_t>(1, CHUNK_BYTES / int64_t(sizeof(float)) / (segments * matrix));
  }
  // The number of a line's first token, and how far apart its tokens are, among the B*H*W.
  int64_t first(int64_t line) const { return axis == 1 ? line / width * height * width + line % width : line * width; }
  int64_t step() const { return axis == 1 ? width : 1; }
};

// What generates, in numbers of type G: weights padded and packed, for both directions; and the static matrices with what is padded, or none.
template <typename G>
struct Generator {
  std::vector<uint32_t> forward, backward;
  std::vector<float> bias, added;

  Generator(const Shape& s, const optional<Tensor>& weight, const optional<Tensor>& bias_, const optional<Tensor>& added_, bool softmax,
            bool both) {
    const float padding = softmax ? LOWEST : 0;
    bias.assign(dynamixer::up(s.matrix, WIDE), 0);
    for (int64_t i = 0; i < s.length; ++i)
      for (int64_t j = 0; j < s.lp; ++j)
        bias[i * s.lp + j] = j >= s.length ? padding : bias_ ? bias_->const_data_ptr<float>()[i * s.length + j] : 0;
    if (weight) {
      const float* w = weight->const_data_ptr<float>();
      std::vector<G> columns(s.inputs_p * s.matrix, G(0)), rows(both ? s.inputs_p * s.matrix : 0, G(0));
      for (int64_t i = 0; i < s.length; ++i)
        for (int64_t j = 0; j < s.length; ++j)
          for (int64_t k = 0; k < s.inputs; ++k) {
            const G value(w[(i * s.length + j) * s.inputs + k]);
            columns[k * s.matrix + i * s.lp + j] = value;
            if (both) rows[(i * s.lp + j) * s.inputs_p + k] = value;
          }
      packed(s.inputs_p, s.matrix, columns, forward);
      if (both) packed(s.matrix, s.inputs_p, rows, backward);
    }
    if (added_) {
      added.assign(s.segments * s.matrix, 0);
      for (int64_t row = 0; row < s.segments * s.length; ++row)
        std::memcpy(added.data() + row * s.lp, added_->const_data_ptr<float>() + row * s.length, s.length * sizeof(float));
    }
  }
  dynamixer::Panels generates(const Shape& s) const { return {forward.data(), words_of<G>(s.inputs_p), s.matrix}; }
  dynamixer::Panels returns(const Shape& s) const { return {backward.data(), words_of<G>(s.matrix), s.inputs_p}; }

 private:
  static void packed(int64_t k, int64_t n, const std::vector<G>& rows, std::vector<uint32_t>& to) {
    const int64_t width = dynamixer::panel_of(n) * WIDE;
    to.resize(words_of<G>(k) * dynamixer::up(n, width));
    dynamixer::turn<G>(k, n, rows.data(), n, width, to.data());
  }
};

// Eight vectors, one for each row, brought together into one vector with a number for each row.
template <typename Both>
Vec across(const Vec (&v)[8], Both both) {
  Vec two[4], four[2];
  for (int i = 0; i < 4; ++i)
    two[i] = both(__builtin_shuffle(v[2 * i], v[2 * i + 1], Ints{0, 8, 2, 10, 4, 12, 6, 14}),
                  __builtin_shuffle(v[2 * i], v[2 * i + 1], Ints{1, 9, 3, 11, 5, 13, 7, 15}));
  for (int i = 0; i < 2; ++i)
    four[i] = both(__builtin_shuffle(two[2 * i], two[2 * i + 1], Ints{0, 1, 8, 9, 4, 5, 12, 13}),
                   __builtin_shuffle(two[2 * i], two[2 * i + 1], Ints{2, 3, 10, 11, 6, 7, 14, 15}));
  return both(__builtin_shuffle(four[0], four[1], Ints{0, 1, 2, 3, 8, 9, 10, 11}),
              __builtin_shuffle(four[0], four[1], Ints{4, 5, 6, 7, 12, 13, 14, 15}));
}

Vec larger(Vec a, Vec b) { return a > b ? a : b; }
Vec sum_of(Vec a, Vec b) { return a + b; }

// For each of `rows` rows of lp numbers, eight rows at a time: `each` row's vectors are made and brought together by `both`, then
// `use` is told each row's result.
template <typename Each, typename Both, typename Use>
void by_rows(int64_t rows, int64_t lp, Each each, Both both, Use use) {
  for (int64_t first = 0; first < rows; first += 8) {
    const int64_t some = std::min<int64_t>(8, rows - first);
    Vec v[8];
    for (int64_t i = 0; i < 8; ++i) {
      const int64_t row = (first + std::min(i, some - 1)) * lp;
      v[i] = each(row);
      for (int64_t j = LANES; j < lp; j += LANES) v[i] = both(v[i], each(row + j));
    }
    const Vec result = across(v, both);
    for (int64_t i = 0; i < some; ++i)
      for (int64_t j = 0; j < lp; j += LANES) use((first + i) * lp + j, result[i]);
  }
}

// One vector of LANES numbers of one of the processor's own, which may be wider.
template <typename Both>
Vec narrow(dynamixer::Vec v, Both both) {
  Vec part[WIDE / LANES];
  std::memcpy(part, &v, sizeof v);
  return WIDE == LANES ? part[0] : both(part[0], part[WIDE / LANES - 1]);
}

template <bool ROUGH>
void softmax_rows(float* matrix, int64_t rows, int64_t lp) {
  if (lp % WIDE) {
    const auto at = [=](int64_t i) -> Vec& { return *(Vec*)(matrix + i); };
    by_rows(rows, lp, at, larger, [=](int64_t i, float top) { at(i) = dynamixer::exponential<ROUGH>(at(i) - top); });
    return by_rows(rows, lp, at, sum_of, [=](int64_t i, float total) { at(i) *= 1 / total; });
  }
  for (int64_t first = 0; first < rows; first += 8) {
    const int64_t some = std::min<int64_t>(8, rows - first);
    const auto each = [&](auto make, auto both) {
      Vec v[8];
      for (int64_t i = 0; i < 8; ++i) v[i] = i < some ? narrow(make(matrix + (first + i) * lp, i), both) : v[0];
      return across(v, both);
    };
    const Vec top = each(
        [=](float* row, int64_t) {
          dynamixer::Vec most = dynamixer::get(row);
          for (int64_t j = WIDE; j < lp; j += WIDE) most = dynamixer::get(row + j) > most ? dynamixer::get(row + j) : most;
          return most;
        },
        larger);
    const Vec total = each(
        [=](float* row, int64_t i) {
          dynamixer::Vec sum{};
          for (int64_t j = 0; j < lp; j += WIDE) {
            const dynamixer::Vec e = dynamixer::exponential<ROUGH>(dynamixer::get(row + j) - top[i]);
            dynamixer::put(row + j, e), sum += e;
          }
          return sum;
        },
        sum_of);
    const Vec share = 1.f / total;
    for (int64_t i = 0; i < some; ++i)
      for (int64_t j = 0; j < lp; j += WIDE) {
        float* at = matrix + (first + i) * lp + j;
        dynamixer::put(at, dynamixer::get(at) * share[i]);
      }
  }
}

// dG = P * (dP - the row's sum of P * dP), in place of dP.
void softmax_rows_backward(float* grad, const float* matrix, int64_t rows, int64_t lp) {
  const auto at = [=](int64_t i) -> Vec& { return *(Vec*)(grad + i); };
  const auto p = [=](int64_t i) { return *(const Vec*)(matrix + i); };
  by_rows(rows, lp, [=](int64_t i) { return at(i) * p(i); }, sum_of, [=](int64_t i, float sum) { at(i) = (at(i) - sum) * p(i); });
}

// The reduced tokens of lines [from, to) as the generator reads them, [units, L*d] with rows inputs_p apart; or, the other way,
// their gradients back to where the tokens lie.
template <bool BACK, typename T, typename G>
void gather(const Shape& s, T* features, int64_t stride, int64_t from, int64_t to, G* flat) {
  const auto copy = [&](auto d) {
    for (int64_t line = from; line < to; ++line)
      for (int64_t t = 0; t < s.length; ++t) {
        T* token = features + (s.first(line) + t * s.step()) * stride;
        G* row = flat + (line - from) * s.segments * s.inputs_p + t * d;
        for (int64_t g = 0; g < s.segments; ++g, token += d, row += s.inputs_p)
          for (int64_t k = 0; k < d; ++k)
            if constexpr (BACK) token[k] = T(float(row[k]));
            else row[k] = G(token[k]);
      }
  };
  switch (s.reduced) {
    case 1: return copy(std::integral_constant<int64_t, 1>());
    case 2: return copy(std::integral_constant<int64_t, 2>());
    case 4: return copy(std::integral_constant<int64_t, 4>());
    case 8: return copy(std::integral_constant<int64_t, 8>());
    default: return copy(s.reduced);
  }
}

// The matrices of so many units, normalised: [units, L, LP]. Without generation one unit for each segment.
template <typename G>
void generate(const Shape& s, const Generator<G>& by, const G* flat, int64_t units, bool softmax, float* matrices) {
  const float* bias = by.bias.data();
  const int64_t matrix = s.matrix;
  if (!by.added.empty())
    for (int64_t unit = 0; unit < units; ++unit)
      for (int64_t i = 0; i < matrix; ++i) matrices[unit * matrix + i] = by.bias[i] + by.added[unit % s.segments * matrix + i];
  if (flat) {
    const bool there = !by.added.empty();
    dynamixer::multiply_rows<G>(units, flat, s.inputs_p, by.generates(s), [=](int64_t unit, int64_t n, dynamixer::Vec v) {
      float* to = matrices + unit * matrix + n;
      v += dynamixer::get(there ? to : bias + n);
      if (n + WIDE <= matrix) dynamixer::put(to, v);
      else std::memcpy(to, &v, std::max<int64_t>(0, matrix - n) * sizeof(float));
    });
  }
  if (softmax)  // one unit at a time, which the first cache holds
    for (int64_t unit = 0; unit < units; ++unit)
      softmax_rows<!std::is_same_v<G, float>>(matrices + unit * matrix, s.length, s.lp);
}

// One segment of a line's tokens as rows of cp numbers in fp32: where they lie already, or copied to `space`.
template <typename T>
In tokens(const Shape& s, const T* from, float* space) {
  if constexpr (std::is_same_v<T, float>)
    if (s.c == s.cp) return {from, s.step() * s.channels};
  float* to = space;
  for (int64_t t = 0; t < s.length; ++t, from += s.step() * s.channels, to += s.cp)
    for (int64_t i = 0; i < s.c; ++i) to[i] = float(from[i]);
  return {space, s.cp};
}

// The same for results: where to write them, and what is then left to be copied.
template <typename T>
Out room(const Shape& s, T* to, float* space) {
  if constexpr (std::is_same_v<T, float>)
    if (s.c == s.cp) return {to, s.step() * s.channels};
  return {space, s.cp};
}

template <typename T>
void store(const Shape& s, Out made, T* to) {
  if constexpr (std::is_same_v<T, float>)
    if (made.at == to) return;
  for (int64_t t = 0; t < s.length; ++t, to += s.step() * s.channels, made.at += made.row)
    for (int64_t i = 0; i < s.c; ++i) to[i] = T(made.at[i]);
}

// [L, c] -> [c, LP], in blocks of eight by eight where these fit.
void turn(const Shape& s, In from, float* to) {
  int64_t t = 0;
  for (; s.c % LANES == 0 && t + LANES <= s.length; t += LANES)
    for (int64_t i = 0; i < s.c; i += LANES) {
      Vec a[8], b[8];
      for (int k = 0; k < 8; ++k) a[k] = *(const Vec*)(from.at + (t + k) * from.row + i);
      for (int k = 0; k < 4; ++k) {
        b[2 * k] = __builtin_shuffle(a[2 * k], a[2 * k + 1], Ints{0, 8, 2, 10, 4, 12, 6, 14});
        b[2 * k + 1] = __builtin_shuffle(a[2 * k], a[2 * k + 1], Ints{1, 9, 3, 11, 5, 13, 7, 15});
      }
      for (int k : {0, 1, 4, 5}) {
        a[k] = __builtin_shuffle(b[k], b[k + 2], Ints{0, 1, 8, 9, 4, 5, 12, 13});
        a[k + 2] = __builtin_shuffle(b[k], b[k + 2], Ints{2, 3, 10, 11, 6, 7, 14, 15});
      }
      for (int k = 0; k < 4; ++k) {
        *(Vec*)(to + (i + k) * s.lp + t) = __builtin_shuffle(a[k], a[k + 4], Ints{0, 1, 2, 3, 8, 9, 10, 11});
        *(Vec*)(to + (i + k + 4) * s.lp + t) = __builtin_shuffle(a[k], a[k + 4], Ints{4, 5, 6, 7, 12, 13, 14, 15});
      }
    }
  for (; t < s.length; ++t)
    for (int64_t i = 0; i < s.c; ++i) to[i * s.lp + t] = from.at[t * from.row + i];
}

// Whether a segment of a line is mixed in words of bf16: the processor multiplies them, and segments are whole eights.
constexpr int64_t EIGHT = 8;
template <typename T>
bool in_words(const Shape& s) { return std::is_same_v<Kind<T>, at::BFloat16> && s.c % EIGHT == 0; }

// [L, c] -> [words of L, width], zeros where there is nothing; width is whole vectors.
template <typename G>
dynamixer::Word* by_pairs(const Shape& s, const G* x, int64_t width, std::vector<uint32_t>& space) {
  space.resize(s.lp / 2 * width);
  dynamixer::turn<G>(s.length, s.c, x, s.step() * s.channels, width, space.data());
  return space.data();
}

// `use` is told the sums over words p of a[i * row + p * step] b[p * width + ...], for all L rows i.
template <typename G, int NV, typename Use>
void multiply_line(const Shape& s, int64_t words, const dynamixer::Word* a, int64_t row, int64_t step, const dynamixer::Word* b, int64_t width,
                   int64_t first, Use use) {
  int64_t i = 0;
  const auto tell = [&](int64_t r, int64_t n, dynamixer::Vec v) { use(i + r, first + n, v); };
  for (; i + 8 <= s.length; i += 8) dynamixer::tile<G, 8, NV>(words, a + i * row, row, step, b + first, width, tell);
  for (; i < s.length; ++i) dynamixer::tile<G, 1, NV>(words, a + i * row, row, step, b + first, width, tell);
}

template <typename G, typename Use>
void multiply_line(const Shape& s, int64_t words, const dynamixer::Word* a, int64_t row, int64_t step, const dynamixer::Word* b, int64_t width,
                   Use use) {
  int64_t first = 0;
  for (; first + 2 * WIDE <= width; first += 2 * WIDE) multiply_line<G, 2>(s, words, a, row, step, b, width, first, use);
  if (first < width) multiply_line<G, 1>(s, words, a, row, step, b, width, first, use);
}

// The first `some` numbers of a vector, eight or all.
template <typename T>
void put_some(T* to, dynamixer::Vec v, int64_t some) {
  if (some >= WIDE) return dynamixer::put(to, v);
  T all[WIDE];
  dynamixer::put(all, v);
  std::memcpy(to, all, EIGHT * sizeof(T));
}

// Numbers rounded, whole eights; `from` may be read a vector beyond them.
template <typename G>
void rounded(int64_t n, const float* from, G* to) {
  for (int64_t i = 0; i < n; i += WIDE) put_some(to + i, dynamixer::get(from + i), n - i);
}

template <typename T>
void mix_forward(const Shape& s, const T* x, const T* features, int64_t stride, const Generator<Kind<T>>& by, bool softmax, T* out) {
  using G = Kind<T>;
  at::parallel_for(0, (s.lines + s.chunk - 1) / s.chunk, 1, [&](int64_t begin, int64_t end) {
    const bool made = features != nullptr;
    std::vector<G> flat(made ? s.chunk * s.segments * s.inputs_p : 0, G(0));
    std::vector<float> values(s.length * s.cp, 0.f), space(s.length * s.cp);
    std::vector<float> matrices((made ? s.chunk : 1) * s.segments * s.matrix + WIDE);
    std::vector<G> shares(in_words<T>(s) ? matrices.size() - WIDE : 0);
    std::vector<uint32_t> pairs;
    const auto finish = [&](const G* read, int64_t units) {
      generate<G>(s, by, read, units, softmax, matrices.data());
      if constexpr (std::is_same_v<G, T>)
        rounded(std::min<int64_t>(shares.size(), units * s.matrix), matrices.data(), shares.data());
    };
    if (!made) finish(nullptr, s.segments);
    for (int64_t from = begin * s.chunk; from < std::min(s.lines, end * s.chunk); from += s.chunk) {
      const int64_t to = std::min(s.lines, from + s.chunk);
      if (made) {
        gather<false>(s, features, stride, from, to, flat.data());
        finish(flat.data(), (to - from) * s.segments);
      }
      for (int64_t line = from; line < to; ++line)
        for (int64_t g = 0; g < s.segments; ++g) {
          const int64_t at = s.first(line) * s.channels + g * s.c;
          const int64_t unit = (made ? line - from : 0) * s.segments + g;
          if constexpr (std::is_same_v<G, T>)
            if (!shares.empty()) {
              const int64_t width = dynamixer::up(s.c, WIDE), apart = s.step() * s.channels, c = s.c;
              T* mixed = out + at;
              multiply_line<G>(s, s.lp / 2, (const dynamixer::Word*)(shares.data() + unit * s.matrix), s.lp / 2, 1, by_pairs(s, x + at, width, pairs),
                               width, [=](int64_t t, int64_t n, dynamixer::Vec v) { put_some(mixed + t * apart + n, v, c - n); });
              continue;
            }
          const float* matrix = matrices.data() + unit * s.matrix;
          const Out mixed = room(s, out + at, space.data());
          product(s.length, s.cp, s.length, {matrix, s.lp}, tokens(s, x + at, values.data()), mixed);
          store(s, mixed, out + at);
        }
    }
  });
}

// What one thread adds up over its lines.
struct Sums {
  std::vector<float> weight, bias, added;
};

template <typename T>
void mix_backward(const Shape& s, const T* grad, const T* x, const T* features, int64_t stride, const Generator<Kind<T>>& by, bool softmax,
                  T* x_grad, T* features_grad, std::vector<Sums>& sums) {
  using G = Kind<T>;
  const bool made = features != nullptr, has_added = !by.added.empty();
  at::parallel_for(0, (s.lines + s.chunk - 1) / s.chunk, 1, [&](int64_t begin, int64_t end) {
    Sums& mine = sums[at::get_thread_num()];
    if (made) mine.weight.resize(s.matrix * s.inputs_p), mine.bias.resize(s.matrix);
    if (has_added) mine.added.resize(s.segments * s.matrix);
    const int64_t most = s.chunk * s.segments;
    std::vector<G> flat(made ? most * s.inputs_p : 0, G(0)), given(made ? most * s.matrix : 0);
    std::vector<float> flat_grad(made ? most * s.inputs_p : 0), matrices((made ? most : s.segments) * s.matrix + WIDE);
    std::vector<G> share(s.matrix);
    std::vector<uint32_t> pairs, turned_share, columns;
    dynamixer::Outer<G> outer_sum;
    std::vector<float> grads(most * s.matrix + WIDE), values(s.length * s.cp, 0.f), turned(s.c * s.lp, 0.f), outer(s.length * s.cp, 0.f);
    std::vector<float> inner(s.length * s.cp);
    if (!made) generate<G>(s, by, nullptr, s.segments, softmax, matrices.data());
    for (int64_t from = begin * s.chunk; from < std::min(s.lines, end * s.chunk); from += s.chunk) {
      const int64_t to = std::min(s.lines, from + s.chunk), units = (to - from) * s.segments;
      if (made) {
        gather<false>(s, features, stride, from, to, flat.data());
        generate<G>(s, by, flat.data(), units, softmax, matrices.data());
      }
      for (int64_t line = from; line < to; ++line)
        for (int64_t g = 0; g < s.segments; ++g) {
          const int64_t at = s.first(line) * s.channels + g * s.c, unit = (line - from) * s.segments + g;
          const float* matrix = matrices.data() + (made ? unit : g) * s.matrix;
          float* matrix_grad = grads.data() + unit * s.matrix;
          if constexpr (std::is_same_v<G, T>)
            if (in_words<T>(s)) {
              using dynamixer::Word;
              const int64_t width = dynamixer::up(s.c, WIDE), apart = s.step() * s.channels, c = s.c, lp = s.lp, wide = dynamixer::up(lp, WIDE);
              rounded(s.matrix, matrix, share.data());
              turned_share.resize(lp / 2 * lp), columns.resize(c / 2 * wide);
              dynamixer::turn<G>(s.length, lp, share.data(), lp, lp, turned_share.data());
              T* below = x_grad + at;
              multiply_line<G>(s, lp / 2, turned_share.data(), 1, lp, by_pairs(s, grad + at, width, pairs), width,
                               [=](int64_t t, int64_t n, dynamixer::Vec v) { put_some(below + t * apart + n, v, c - n); });
              for (int64_t t = 0; t < s.length; ++t)
                for (int64_t p = 0; p < c / 2; ++p) columns[p * wide + t] = ((const Word*)(x + at + t * apart))[p];
              multiply_line<G>(s, c / 2, (const Word*)(grad + at), apart / 2, 1, columns.data(), wide, [=](int64_t t, int64_t n, dynamixer::Vec v) {
                put_some(matrix_grad + t * lp + n, v, lp - n);
              });
              if (softmax) softmax_rows_backward(matrix_grad, matrix, s.length, s.lp);
              continue;
            }
          const In above = tokens(s, grad + at, outer.data());
          const Out below = room(s, x_grad + at, inner.data());
          product(s.length, s.cp, s.length, {matrix, 1, s.lp}, above, below);
          store(s, below, x_grad + at);
          turn(s, tokens(s, x + at, values.data()), turned.data());
          product(s.length, s.lp, s.c, above, {turned.data(), s.lp}, {matrix_grad, s.lp});
          if (softmax) softmax_rows_backward(matrix_grad, matrix, s.length, s.lp);
        }
      if (has_added)
        for (int64_t unit = 0; unit < units; ++unit) {
          float* sum = mine.added.data() + unit % s.segments * s.matrix;
          for (int64_t i = 0; i < s.matrix; ++i) sum[i] += grads[unit * s.matrix + i];
        }
      if (!made) continue;
      for (int64_t unit = 0; unit < units; ++unit)
        for (int64_t i = 0; i < s.matrix; ++i) mine.bias[i] += grads[unit * s.matrix + i];
      rounded(units * s.matrix, grads.data(), given.data());
      outer_sum.set_left(units, s.matrix, given.data()), outer_sum.set_right(units, s.inputs_p, flat.data());
      float *sum = mine.weight.data(), *back = flat_grad.data();
      const int64_t inputs_p = s.inputs_p;
      outer_sum(units, s.matrix, inputs_p, {sum}, [=](int64_t n, int64_t k, dynamixer::Vec v) {
        dynamixer::put(sum + n * inputs_p + k, v + dynamixer::get(sum + n * inputs_p + k));
      });
      dynamixer::multiply_rows<G>(units, given.data(), s.matrix, by.returns(s), [=](int64_t unit, int64_t n, dynamixer::Vec v) {
        dynamixer::put(back + unit * inputs_p + n, v);
      });
      gather<true>(s, features_grad, s.segments * s.reduced, from, to, flat_grad.data());
    }
  });
}

optional<Tensor> fp32(const optional<Tensor>& t) { return t ? optional<Tensor>(t->to(at::kFloat).contiguous()) : t; }

// Token features may be a slice of a wider projection: only their last axis has to be dense and their grid plain.
optional<Tensor> readable(const optional<Tensor>& f) {
  if (!f) return f;
  const int64_t stride = f->stride(2);
  const bool plain = f->stride(3) == 1 && f->stride(1) == stride * f->size(2) && f->stride(0) == stride * f->size(2) * f->size(1);
  return plain ? f : optional<Tensor>(f->contiguous());
}

void check(const Tensor& x, const optional<Tensor>& features, const optional<Tensor>& weight, const optional<Tensor>& bias,
           const optional<Tensor>& added, int64_t axis, int64_t segments) {
  TORCH_CHECK(x.dim() == 4 && (axis == 1 || axis == 2) && segments > 0 && x.size(3) % segments == 0, "x has to be [B, H, W, C].");
  const int64_t length = x.size(axis);
  TORCH_CHECK(features.has_value() == weight.has_value() && weight.has_value() == bias.has_value(), "generated or not.");
  TORCH_CHECK(weight || added, "nothing to mix with.");
  if (features) {
    TORCH_CHECK(features->dim() == 4 && features->size(0) == x.size(0) && features->size(1) == x.size(1) &&
                    features->size(2) == x.size(2) && features->size(3) % segments == 0 && features->scalar_type() == x.scalar_type(),
                "features have to be [B, H, W, S*d], of the dtype of x.");
    TORCH_CHECK(weight->dim() == 2 && weight->size(0) == length * length && weight->size(1) == length * features->size(3) / segments &&
                    bias->numel() == length * length,
                "the generator's weight has to be [L*L, L*d].");
  }
  TORCH_CHECK(!added || (added->dim() == 3 && added->size(0) == segments && added->size(1) == length && added->size(2) == length),
              "static matrices have to be [S, L, L].");
}

Tensor mix(const Tensor& x_, const optional<Tensor>& features_, const optional<Tensor>& weight, const optional<Tensor>& bias,
           const optional<Tensor>& added, int64_t axis, int64_t segments, bool softmax) {
  check(x_, features_, weight, bias, added, axis, segments);
  const Tensor x = x_.contiguous();
  const optional<Tensor> features = readable(features_);
  Tensor out = at::empty_like(x);
  if (!x.numel()) return out;
  const Shape s(x, features, axis, segments);
  DISPATCH(x.scalar_type(), "dynamixer::mix", [&] {
    const Generator<Kind<scalar_t>> by(s, fp32(weight), fp32(bias), fp32(added), softmax, false);
    mix_forward<scalar_t>(s, x.const_data_ptr<scalar_t>(), features ? features->const_data_ptr<scalar_t>() : nullptr,
                          features ? features->stride(2) : 0, by, softmax, out.mutable_data_ptr<scalar_t>());
  });
  return out;
}

// A padded sum over threads as the parameter's own shape: rows [n, width] of rows [n_p, width_p].
Tensor unpadded(const std::vector<Sums>& sums, std::vector<float> Sums::*which, const Shape& s, int64_t blocks, int64_t width, int64_t width_p) {
  // [blocks, L, LP, width_p] -> [blocks, L, L, width]
  Tensor total = at::zeros({blocks, s.length, s.lp, width_p}, at::kFloat);
  for (const Sums& one : sums)
    if (const auto& v = one.*which; !v.empty()) total.add_(at::from_blob(const_cast<float*>(v.data()), total.sizes(), at::kFloat));
  return total.narrow(2, 0, s.length).narrow(3, 0, width);
}

std::vector<Tensor> mix_grads(const Tensor& grad_, const Tensor& x_, const optional<Tensor>& features_, const optional<Tensor>& weight,
                              const optional<Tensor>& bias, const optional<Tensor>& added, int64_t axis, int64_t segments, bool softmax) {
  check(x_, features_, weight, bias, added, axis, segments);
  const Tensor x = x_.contiguous(), grad = grad_.to(x.scalar_type()).contiguous();
  const optional<Tensor> features = readable(features_);
  const Shape s(x, features, axis, segments);
  Tensor x_grad = at::empty_like(x), features_grad;
  if (features) features_grad = at::empty(features->sizes(), features->options());
  std::vector<Sums> sums(at::get_num_threads());
  DISPATCH(x.scalar_type(), "dynamixer::mix_grads", [&] {
    const Generator<Kind<scalar_t>> by(s, fp32(weight), fp32(bias), fp32(added), softmax, true);
    mix_backward<scalar_t>(s, grad.const_data_ptr<scalar_t>(), x.const_data_ptr<scalar_t>(),
                           features ? features->const_data_ptr<scalar_t>() : nullptr, features ? features->stride(2) : 0, by, softmax,
                           x_grad.mutable_data_ptr<scalar_t>(), features ? features_grad.mutable_data_ptr<scalar_t>() : nullptr, sums);
  });
  std::vector<Tensor> grads{x_grad};
  if (features) {
    grads.push_back(features_grad);
    grads.push_back(unpadded(sums, &Sums::weight, s, 1, s.inputs, s.inputs_p).reshape(weight->sizes()).to(weight->scalar_type()));
    grads.push_back(unpadded(sums, &Sums::bias, s, 1, 1, 1).reshape(bias->sizes()).to(bias->scalar_type()));
  }
  if (added) {
    grads.push_back(unpadded(sums, &Sums::added, s, s.segments, 1, 1).reshape(added->sizes()).to(added->scalar_type()));
  }
  return grads;
}

}  // namespace

// Their schemas, gradients and shapes without data are in ../fused.py.
TORCH_LIBRARY_IMPL(dynamixer, CPU, library) {
  library.impl("mix", &mix);
  library.impl("mix_grads", &mix_grads);
}
