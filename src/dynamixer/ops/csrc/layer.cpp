// A mixer layer around its mixing, tile by tile: what lies between two products stays in the cache. Forward, and backward with the gradients of
// all weights. How the parts follow each other stands in ../layer.py.
//
// Letters: B images, T tokens of an image, C channels, F hidden channels of the MLP, R reduced numbers of a token (RP: padded).
// A tile is at most TILE tokens of one image, a piece at most PIECE: so many whose gradients are added up at once.

#include "product.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>

namespace dynamixer {
namespace {

using at::Tensor;
using at::TensorList;
using std::optional;
constexpr int64_t TILE = 64, PIECE = 256;

#define DISPATCH_LAYER(TYPE, ...)                                        \
  if ((TYPE) == at::kFloat) {                                            \
    using T = float;                                                     \
    __VA_ARGS__();                                                       \
  } else {                                                               \
    TORCH_CHECK((TYPE) == at::kBFloat16, "fp32 or bf16");                \
    using T = at::BFloat16;                                              \
    __VA_ARGS__();                                                       \
  }

template <typename T>
T* data(const Tensor& t) { return t.defined() ? t.mutable_data_ptr<T>() : nullptr; }
const float* floats(const Tensor& t) { return t.const_data_ptr<float>(); }
const float* floats(const optional<Tensor>& t) { return t ? t->const_data_ptr<float>() : nullptr; }

Panels panels(const Tensor& packed, int64_t words, int64_t columns) { return {(const Word*)packed.const_data_ptr<int32_t>(), words, columns}; }

// Numbers of several buffers of one thread.
template <typename T>
T* room(std::vector<T>& buffer, int64_t n) {
  if (int64_t(buffer.size()) < n) buffer.resize(n);
  return buffer.data();
}

// So many pieces of `length` of each image: (image, first token, tokens).
struct Pieces {
  int64_t tokens, length, each, all;
  Pieces(int64_t images, int64_t tokens_, int64_t length_)
      : tokens(tokens_), length(length_), each((tokens_ + length_ - 1) / length_), all(images * each) {}
  template <typename Use>
  void run(Use use) const {
    at::parallel_for(0, all, 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) use(n, n / each, n % each * length, std::min(length, tokens - n % each * length));
    });
  }
};

// Each thread's sum of one gradient.
struct Sum {
  std::vector<std::vector<float>> of = std::vector<std::vector<float>>(at::get_num_threads());
  int64_t size;
  explicit Sum(int64_t size_) : size(size_) {}
  float* mine() {
    auto& v = of[at::get_thread_num()];
    if (v.empty()) v.assign(size, 0.f);
    return v.data();
  }
  Tensor total(at::IntArrayRef shape) const {
    Tensor sum = at::empty(shape, at::kFloat);
    float* to = sum.mutable_data_ptr<float>();
    at::parallel_for(0, size, 1 << 14, [&](int64_t begin, int64_t end) {
      std::fill(to + begin, to + end, 0.f);
      for (const auto& v : of)
        if (!v.empty())
          for (int64_t i = begin; i < end; ++i) to[i] += v[i];
    });
    return sum;
  }
};

void add(float* to, Vec v) { *(Vec*)to += v; }

template <typename T>
void add_rows(int64_t rows, int64_t c, const T* from, float* sum) {
  int64_t i = 0;
  const auto columns = [&](auto count) {  // several vectors at a time: each waits for its own sum only
    constexpr int N = decltype(count)::value;
    for (; i + N * LANES <= c; i += N * LANES) {
      Vec v[N];
      for (int j = 0; j < N; ++j) v[j] = get(sum + i + j * LANES);
      for (int64_t r = 0; r < rows; ++r)
        for (int j = 0; j < N; ++j) v[j] += get(from + r * c + i + j * LANES);
      for (int j = 0; j < N; ++j) put(sum + i + j * LANES, v[j]);
    }
  };
  columns(std::integral_constant<int, 4>()), columns(std::integral_constant<int, 1>());
}

template <typename T>
void scale_row(int64_t c, const T* from, const float* by, T* to) {
  for (int64_t i = 0; i < c; i += LANES) put(to + i, get(from + i) * get(by + i));
}

template <typename T>
void scale_rows(int64_t rows, int64_t c, const T* from, float by, T* to) {
  for (int64_t i = 0; i < rows * c; i += LANES) put(to + i, get(from + i) * by);
}

struct Stats {
  float mean, scale;
};

template <typename T>
Stats stats(int64_t c, const T* x, float eps) {
  Vec sum{}, square{};
  for (int64_t i = 0; i < c; i += LANES) sum += get(x + i);
  const float mean = total(sum) / c;
  for (int64_t i = 0; i < c; i += LANES) {
    const Vec d = get(x + i) - mean;
    square += d * d;
  }
  return {mean, 1 / std::sqrt(total(square) / c + eps)};
}

struct Norm {
  const float *weight, *bias;
  float eps;
};

template <typename T>
void normalise(int64_t rows, int64_t c, const Norm& norm, const T* x, T* to) {
  for (int64_t r = 0; r < rows; ++r, x += c, to += c) {
    const Stats s = stats(c, x, norm.eps);
    for (int64_t i = 0; i < c; i += LANES)
      put(to + i, (get(x + i) - s.mean) * s.scale * get(norm.weight + i) + get(norm.bias + i));
  }
}

// From the gradient of normalised rows in fp32: to = beside + the gradient of x; the normalised rows again where `again` is; sums of both weights'.
template <typename T>
void normalise_backward(int64_t rows, int64_t c, const Norm& norm, const float* grad, const T* x, const T* beside, T* to, T* again,
                        float* weight_sum, float* bias_sum) {
  for (int64_t r = 0; r < rows; ++r, grad += c, x += c, beside += c, to += c) {
    const Stats s = stats(c, x, norm.eps);
    Vec plain{}, turned{};
    for (int64_t i = 0; i < c; i += LANES) {
      const Vec g = get(grad + i), hat = (get(x + i) - s.mean) * s.scale, inner = g * get(norm.weight + i);
      plain += inner, turned += inner * hat;
      add(weight_sum + i, g * hat), add(bias_sum + i, g);
      if (again) put(again + r * c + i, hat * get(norm.weight + i) + get(norm.bias + i));
    }
    const float a = total(plain) / c, b = total(turned) / c;
    for (int64_t i = 0; i < c; i += LANES) {
      const Vec hat = (get(x + i) - s.mean) * s.scale;
      put(to + i, get(beside + i) + s.scale * (get(grad + i) * get(norm.weight + i) - a - hat * b));
    }
  }
}

// A linear layer's weight [out, in] as panels: for x W^T, or flipped for dy W.
Tensor pack(const Tensor& weight_, bool flipped, at::ScalarType type) {
  const Tensor weight = weight_.to(type).contiguous();
  const int64_t out = weight.size(0), in = weight.size(1), k = flipped ? out : in, n = flipped ? in : out;
  Tensor packed;
  DISPATCH_LAYER(type, [&] {
    const int64_t words = words_of<T>(k), width = panel_of(n) * LANES, count = up(n, width) / width;
    packed = at::empty({words * width * count}, at::kInt);
    Word* to = (Word*)packed.mutable_data_ptr<int32_t>();
    const T* from = weight.const_data_ptr<T>();
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        Word* panel = to + block * words * width;
        const int64_t first = block * width, some = std::min(width, n - first);
        if (flipped) {
          turn<T>(k, some, from + first, in, width, panel);
          continue;
        }
        for (int64_t i = 0; i < width; ++i)
          for (int64_t p = 0; p < words; ++p) {
            Held<T> pair[PER_WORD<T>];
            for (int64_t q = 0; q < PER_WORD<T>; ++q)
              pair[q] = i < some && p * PER_WORD<T> + q < k ? Held<T>(from[(first + i) * in + p * PER_WORD<T> + q]) : Held<T>(0);
            std::memcpy(panel + p * width + i, pair, 4);
          }
      }
    });
  });
  return packed;
}

// The same in eight bits, for inference: each output's weights by a step of their own (see multiply_rounded).
Tensor pack_bytes(const Tensor& weight) {
  const int64_t out = weight.size(0), in = weight.size(1), words = in / 4, width = panel_of(out) * LANES, columns = up(out, LANES);
  TORCH_CHECK(BYTES && in % LANES == 0, "eight bits need a processor that multiplies them.");
  Tensor packed = at::zeros({words * columns + 2 * columns}, at::kInt);
  const float* from = floats(weight);
  int8_t* to = (int8_t*)packed.mutable_data_ptr<int32_t>();
  float *by = (float*)(packed.mutable_data_ptr<int32_t>() + words * columns), *all = by + columns;
  for (int64_t n = 0; n < out; ++n) {
    const float* row = from + n * in;
    float most = 0;
    for (int64_t k = 0; k < in; ++k) most = std::max(most, std::abs(row[k]));
    by[n] = most / 127;
    int64_t sum = 0;
    for (int64_t k = 0; k < in; ++k) {
      const int64_t q = most > 0 ? std::lround(row[k] / most * 127) : 0;
      to[((n / width * words + k / 4) * width + n % width) * 4 + k % 4] = int8_t(q), sum += q;
    }
    all[n] = by[n] * sum;
  }
  return packed;
}

// The normalised tokens, and their reduced numbers [B, H, W, RP].
std::tuple<Tensor, Tensor> normed(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps, const optional<Tensor>& reduce,
                                  const optional<Tensor>& reduce_bias) {
  const int64_t c = x.size(3), tokens = x.size(1) * x.size(2), rp = reduce_bias ? reduce_bias->numel() : 0;
  Tensor to = at::empty_like(x), reduced = at::empty({x.size(0), x.size(1), x.size(2), rp}, x.options());
  const Norm norm{floats(weight), floats(bias), float(eps)};
  const float* shift = floats(reduce_bias);
  DISPATCH_LAYER(x.scalar_type(), [&] {
    Pieces(x.size(0), tokens, TILE).run([&](int64_t, int64_t image, int64_t first, int64_t rows) {
      const int64_t at = image * tokens + first;
      T* normal = data<T>(to) + at * c;
      normalise<T>(rows, c, norm, data<T>(x) + at * c, normal);
      if (!reduce) return;
      T* out = data<T>(reduced) + at * rp;
      multiply_rows<T>(rows, normal, c, panels(*reduce, words_of<T>(c), rp), [=](int64_t r, int64_t n, Vec v) {
        if (n < rp) put(out + r * rp + n, v + get(shift + n));
      });
    });
  });
  return {to, reduced};
}

// The mean of the tokens of each image, for each of several grids: [B, grids, C].
Tensor means(TensorList grids) {
  const Tensor& x = grids[0];
  const int64_t images = x.size(0), tokens = x.size(1) * x.size(2), c = x.size(3), count = grids.size();
  Tensor to = at::zeros({images, count, c}, at::kFloat);
  DISPATCH_LAYER(x.scalar_type(), [&] {
    at::parallel_for(0, images * count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        float* sum = data<float>(to) + n * c;
        add_rows<T>(tokens, c, data<T>(grids[n % count]) + n / count * tokens * c, sum);
        for (int64_t i = 0; i < c; ++i) sum[i] /= tokens;
      }
    });
  });
  return to;
}

// What follows the mixing: branches projected and added by their shares, projected, added to x; then the MLP, added too.
// -> the layer's output; and, if they are kept for the backward pass: the branches' sum, x after the block, the MLP before its GELU.
std::tuple<Tensor, Tensor, Tensor, Tensor> tail(const Tensor& x, TensorList mixed, const Tensor& shares, TensorList packs, TensorList biases,
                                                const Tensor& project, const Tensor& project_bias, const Tensor& norm_weight,
                                                const Tensor& norm_bias, double eps, const Tensor& fc1, const Tensor& fc1_bias,
                                                const Tensor& fc2, const Tensor& fc2_bias, const optional<Tensor>& drop, bool keep, bool bytes) {
  const int64_t c = x.size(3), f = fc1_bias.numel(), tokens = x.size(1) * x.size(2), count = mixed.size();
  const Norm norm{floats(norm_weight), floats(norm_bias), float(eps)};
  const float *shift = floats(project_bias), *shift1 = floats(fc1_bias), *shift2 = floats(fc2_bias);
  Tensor out = at::empty_like(x), sums, after, hidden;
  if (keep) {
    sums = at::empty_like(x), after = at::empty_like(x);
    hidden = at::empty({x.size(0), x.size(1), x.size(2), f}, x.options());
  }
  DISPATCH_LAYER(x.scalar_type(), [&] {
    struct Space {
      std::vector<float> added;
      std::vector<T> sum, after, normal, active;
      Rounded rounded;
    };
    std::vector<Space> spaces(at::get_num_threads());
    Pieces(x.size(0), tokens, TILE).run([&](int64_t, int64_t image, int64_t first, int64_t rows) {
      const int64_t at = image * tokens + first;
      Space& space = spaces[at::get_thread_num()];
      float* added = room(space.added, TILE * c);
      T* sum = keep ? data<T>(sums) + at * c : room(space.sum, TILE * c);
      T* middle = keep ? data<T>(after) + at * c : room(space.after, TILE * c);
      T *normal = room(space.normal, TILE * c), *active = room(space.active, TILE * f);
      const auto product = [&]<Told TOLD = Told::at_once>(const T* from, int64_t k, const Tensor& packed, int64_t n, auto use) {
        if (!bytes) return multiply_rows<T, TOLD>(rows, from, k, panels(packed, words_of<T>(k), n), use);
        space.rounded.set(rows, k, from);
        multiply_rounded<TOLD>(rows, k, space.rounded, panels(packed, k / 4, n), use);
      };
      const float one = drop ? floats(drop)[image * 2] : 1, two = drop ? floats(drop)[image * 2 + 1] : 1;
      for (int64_t b = 0; b < count; ++b) {
        const float *share = floats(shares) + (image * count + b) * c, *bias = floats(biases[b]);
        product(data<T>(mixed[b]) + at * c, c, packs[b], c, [=](int64_t r, int64_t n, Vec v) {
          v = (v + get(bias + n)) * get(share + n);
          float* to = added + r * c + n;
          if (b) v += get(to);
          b + 1 < count ? put(to, v) : put(sum + r * c + n, v);
        });
      }
      const T* from = data<T>(x) + at * c;
      product(sum, c, project, c, [=](int64_t r, int64_t n, Vec v) {
        put(middle + r * c + n, get(from + r * c + n) + one * (v + get(shift + n)));
      });
      normalise<T>(rows, c, norm, middle, normal);
      T* before = keep ? data<T>(hidden) + at * f : nullptr;
      product.template operator()<Told::in_loop>(normal, c, fc1, f, [=](int64_t r, int64_t n, Vec v) {
        v += get(shift1 + n);
        if (before) put(before + r * f + n, v);
        put(active + r * f + n, gelu<T>(v).value);
      });
      T* to = data<T>(out) + at * c;
      product(active, f, fc2, c, [=](int64_t r, int64_t n, Vec v) {
        put(to + r * c + n, get(middle + r * c + n) + two * (v + get(shift2 + n)));
      });
    });
  });
  return {out, sums, after, hidden};
}

// The gradients of `tail`, up to the branches' weighted sum. Weights of branches are given as they are, others flipped.
// -> of x beside the mixing; of the weighted sum; of the shares; then of fc2, its bias, fc1, its bias, the norm's two, project, its bias, and of
// each branch's weight and bias.
std::vector<Tensor> tail_grads(const Tensor& grad, TensorList mixed, const Tensor& shares, TensorList weights, TensorList biases, const Tensor& sums,
                               const Tensor& after, const Tensor& hidden, const Tensor& project, const Tensor& norm_weight,
                               const Tensor& norm_bias, double eps, const Tensor& fc1, const Tensor& fc2, const optional<Tensor>& drop) {
  const int64_t c = grad.size(3), f = hidden.size(3), images = grad.size(0), tokens = grad.size(1) * grad.size(2), count = mixed.size();
  const Norm norm{floats(norm_weight), floats(norm_bias), float(eps)};
  const Pieces pieces(images, tokens, PIECE);
  Tensor x_grad = at::empty_like(grad), sums_grad = at::empty_like(grad), shares_grad = at::zeros({pieces.all, count, c}, at::kFloat);
  Sum fc2_sum(c * f), fc2_bias(c), fc1_sum(f * c), fc1_bias(f), norm_weights(c), norm_biases(c), project_sum(c * c), project_bias(c);
  std::vector<Sum> weight_sums(count, Sum(c * c)), bias_sums(count, Sum(c));
  DISPATCH_LAYER(grad.scalar_type(), [&] {
    struct Space {
      std::vector<float> normal_grad, shared, column;
      std::vector<T> scaled, active, hidden_grad, normal, projected;
      Outer<T> outer;
    };
    std::vector<Space> spaces(at::get_num_threads());
    const Panels by_fc2 = panels(fc2, words_of<T>(c), f), by_fc1 = panels(fc1, words_of<T>(f), c), by_project = panels(project, words_of<T>(c), c);
    pieces.run([&](int64_t piece, int64_t image, int64_t first, int64_t all) {
      const int64_t start = image * tokens + first;
      Space& space = spaces[at::get_thread_num()];
      const float one = drop ? floats(drop)[image * 2] : 1, two = drop ? floats(drop)[image * 2 + 1] : 1;
      const T *g = data<T>(grad) + start * c, *middle = data<T>(after) + start * c, *before = data<T>(hidden) + start * f;
      T *to = data<T>(x_grad) + start * c, *inner = data<T>(sums_grad) + start * c;
      T *active = room(space.active, PIECE * f), *hidden_grad = room(space.hidden_grad, PIECE * f), *normal = room(space.normal, PIECE * c);
      const T* outer = g;
      if (two != 1) scale_rows<T>(all, c, g, two, room(space.scaled, PIECE * c)), outer = space.scaled.data();
      float* normal_grad = room(space.normal_grad, TILE * c);
      const T* projected = one == 1 ? to : room(space.projected, PIECE * c);
      for (int64_t at = 0; at < all; at += TILE) {
        const int64_t rows = std::min(TILE, all - at);
        multiply_rows<T, Told::in_loop>(rows, outer + at * c, c, by_fc2, [=](int64_t r, int64_t n, Vec v) {
          const int64_t i = (at + r) * f + n;
          const Gelu both = gelu<T>(get(before + i));
          put(active + i, both.value), put(hidden_grad + i, v * both.slope);
        });
        multiply_rows<T>(rows, hidden_grad + at * f, f, by_fc1, [=](int64_t r, int64_t n, Vec v) { put(normal_grad + r * c + n, v); });
        normalise_backward<T>(rows, c, norm, normal_grad, middle + at * c, g + at * c, to + at * c, normal + at * c, norm_weights.mine(),
                              norm_biases.mine());
        if (one != 1) scale_rows<T>(rows, c, to + at * c, one, space.projected.data() + at * c);
        multiply_rows<T>(rows, projected + at * c, c, by_project, [=](int64_t r, int64_t n, Vec v) { put(inner + (at + r) * c + n, v); });
      }
      const auto layer = [&](int64_t n, const T* left, int64_t k, const T* right, Sum& sum, Sum& bias) {
        space.outer.set_left(all, n, left), space.outer.set_right(all, k, right);
        float* mine = sum.mine();
        space.outer(all, n, k, {mine}, [=](int64_t row, int64_t column, Vec v) { add(mine + row * k + column, v); });
        add_rows<T>(all, n, left, bias.mine());
      };
      layer(c, outer, f, active, fc2_sum, fc2_bias);
      layer(f, hidden_grad, c, normal, fc1_sum, fc1_bias);
      layer(c, projected, c, data<T>(sums) + start * c, project_sum, project_bias);
      // The branches: with G the sum over tokens of inner and mixed, G times its share is the weight's gradient, G times the weight the share's.
      space.outer.set_left(all, c, inner);
      float *column = room(space.column, c), *shared = room(space.shared, c * LANES);
      std::fill_n(column, c, 0.f);
      add_rows<T>(all, c, inner, column);
      for (int64_t b = 0; b < count; ++b) {
        const float *share = floats(shares) + (image * count + b) * c, *weight = floats(weights[b]), *bias = floats(biases[b]);
        float *mine = weight_sums[b].mine(), *mine_bias = bias_sums[b].mine(), *of_share = data<float>(shares_grad) + (piece * count + b) * c;
        std::fill_n(shared, c * LANES, 0.f);
        space.outer.set_right(all, c, data<T>(mixed[b]) + start * c);
        space.outer(all, c, c, {mine, weight}, [=](int64_t row, int64_t k, Vec v) {
          add(mine + row * c + k, v * share[row]);
          add(shared + row * LANES, v * get(weight + row * c + k));
        });
        for (int64_t i = 0; i < c; ++i) {
          of_share[i] = total(get(shared + i * LANES)) + bias[i] * column[i];
          mine_bias[i] += share[i] * column[i];
        }
      }
    });
  });
  std::vector<Tensor> made{x_grad, sums_grad, shares_grad.view({images, pieces.each, count, c}).sum(1)};
  for (Tensor t : {fc2_sum.total({c, f}), fc2_bias.total({c}), fc1_sum.total({f, c}), fc1_bias.total({f}), norm_weights.total({c}),
                   norm_biases.total({c}), project_sum.total({c, c}), project_bias.total({c})})
    made.push_back(t);
  for (int64_t b = 0; b < count; ++b) made.push_back(weight_sums[b].total({c, c})), made.push_back(bias_sums[b].total({c}));
  return made;
}

// The gradients of what each branch projects, from those of the weighted sum and of the branches' means [B, branches, C]; weights flipped.
std::vector<Tensor> branch_grads(const Tensor& sums_grad, const Tensor& shares, const optional<Tensor>& means_grad, TensorList packs) {
  const int64_t c = sums_grad.size(3), tokens = sums_grad.size(1) * sums_grad.size(2), count = packs.size();
  std::vector<Tensor> made;
  for (int64_t b = 0; b < count; ++b) made.push_back(at::empty_like(sums_grad));
  DISPATCH_LAYER(sums_grad.scalar_type(), [&] {
    std::vector<std::vector<T>> spaces(at::get_num_threads());
    Pieces(sums_grad.size(0), tokens, TILE).run([&](int64_t, int64_t image, int64_t first, int64_t rows) {
      const int64_t at = image * tokens + first;
      const T* inner = data<T>(sums_grad) + at * c;
      T* scaled = room(spaces[at::get_thread_num()], TILE * c);
      for (int64_t b = 0; b < count; ++b) {
        const float* share = floats(shares) + (image * count + b) * c;
        const float* mean = means_grad ? floats(means_grad) + (image * count + b) * c : nullptr;
        for (int64_t r = 0; r < rows; ++r) scale_row<T>(c, inner + r * c, share, scaled + r * c);
        T* to = data<T>(made[b]) + at * c;
        multiply_rows<T>(rows, scaled, c, panels(packs[b], words_of<T>(c), c), [=](int64_t r, int64_t n, Vec v) {
          put(to + r * c + n, mean ? v + get(mean + n) * (1.f / tokens) : v);
        });
      }
    });
  });
  return made;
}

// The gradients of `normed`: of x (with what comes to it `beside`), of the norm's two, and of the reduction's two (if there is one, flipped), from
// several gradients of the normalised tokens and, side by side, of the reduced numbers.
std::vector<Tensor> normed_grads(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps, const Tensor& beside, TensorList grads,
                                 TensorList reduced_grads, const optional<Tensor>& reduce) {
  const int64_t c = x.size(3), tokens = x.size(1) * x.size(2);
  int64_t r_all = 0;
  for (const Tensor& t : reduced_grads) r_all += t.size(3);
  const int64_t rp = up(r_all, LANES);
  const Norm norm{floats(weight), floats(bias), float(eps)};
  Tensor x_grad = at::empty_like(x);
  Sum weights(c), biases(c), reduces(rp * c), reduce_biases(rp);
  DISPATCH_LAYER(x.scalar_type(), [&] {
    struct Space {
      std::vector<float> grad;
      std::vector<T> reduced, normal;
      Outer<T> outer;
    };
    std::vector<Space> spaces(at::get_num_threads());
    std::vector<const T*> others;
    for (const Tensor& t : grads) others.push_back(data<T>(t));
    Pieces(x.size(0), tokens, PIECE).run([&](int64_t, int64_t image, int64_t first, int64_t all) {
      Space& space = spaces[at::get_thread_num()];
      const int64_t start = image * tokens + first;
      float* grad = room(space.grad, TILE * c);
      T *reduced = room(space.reduced, PIECE * rp), *normal = room(space.normal, PIECE * c);
      std::fill_n(reduced, all * rp, T(0));
      int64_t place = 0;
      for (const Tensor& t : reduced_grads) {
        const int64_t n = t.size(3);
        for (int64_t r = 0; r < all; ++r) std::memcpy(reduced + r * rp + place, data<T>(t) + (start + r) * n, n * sizeof(T));
        place += n;
      }
      for (int64_t at = 0; at < all; at += TILE) {
        const int64_t rows = std::min(TILE, all - at), begin = (start + at) * c;
        if (reduce)
          multiply_rows<T>(rows, reduced + at * rp, rp, panels(*reduce, words_of<T>(r_all), c),
                           [=](int64_t r, int64_t n, Vec v) { put(grad + r * c + n, v); });
        else
          std::fill_n(grad, rows * c, 0.f);
        for (const T* other : others)
          for (int64_t i = 0; i < rows * c; i += LANES) put(grad + i, get(grad + i) + get(other + begin + i));
        normalise_backward<T>(rows, c, norm, grad, data<T>(x) + begin, data<T>(beside) + begin, data<T>(x_grad) + begin, normal + at * c,
                              weights.mine(), biases.mine());
      }
      if (!reduce) return;
      space.outer.set_left(all, rp, reduced), space.outer.set_right(all, c, normal);
      float* mine = reduces.mine();
      space.outer(all, rp, c, {mine}, [=](int64_t n, int64_t k, Vec v) { add(mine + n * c + k, v); });
      add_rows<T>(all, rp, reduced, reduce_biases.mine());
    });
  });
  return {x_grad, weights.total({c}), biases.total({c}), reduces.total({rp, c}), reduce_biases.total({rp})};
}

bool multiplies_bytes() { return BYTES; }
int64_t lanes() { return LANES; }

}  // namespace
}  // namespace dynamixer

TORCH_LIBRARY_FRAGMENT(dynamixer, library) {
  library.def("pack(Tensor weight, bool flipped, ScalarType type) -> Tensor");
  library.def("pack_bytes(Tensor weight) -> Tensor");
  library.def("normed(Tensor x, Tensor weight, Tensor bias, float eps, Tensor? reduce, Tensor? reduce_bias) -> (Tensor, Tensor)");
  library.def("means(Tensor[] grids) -> Tensor");
  library.def(
      "tail(Tensor x, Tensor[] mixed, Tensor shares, Tensor[] packs, Tensor[] biases, Tensor project, Tensor project_bias, Tensor norm_weight, "
      "Tensor norm_bias, float eps, Tensor fc1, Tensor fc1_bias, Tensor fc2, Tensor fc2_bias, Tensor? drop, bool keep, bool bytes) -> (Tensor, Tensor, "
      "Tensor, Tensor)");
  library.def(
      "tail_grads(Tensor grad, Tensor[] mixed, Tensor shares, Tensor[] weights, Tensor[] biases, Tensor sums, Tensor after, Tensor hidden, "
      "Tensor project, Tensor norm_weight, Tensor norm_bias, float eps, Tensor fc1, Tensor fc2, Tensor? drop) -> Tensor[]");
  library.def("branch_grads(Tensor sums_grad, Tensor shares, Tensor? means_grad, Tensor[] packs) -> Tensor[]");
  library.def(
      "normed_grads(Tensor x, Tensor weight, Tensor bias, float eps, Tensor beside, Tensor[] grads, Tensor[] reduced_grads, Tensor? reduce) -> "
      "Tensor[]");
  library.def("multiplies_bytes() -> bool", &dynamixer::multiplies_bytes);
  library.def("lanes() -> int", &dynamixer::lanes);
}

TORCH_LIBRARY_IMPL(dynamixer, CPU, library) {
  library.impl("pack", &dynamixer::pack);
  library.impl("pack_bytes", &dynamixer::pack_bytes);
  library.impl("normed", &dynamixer::normed);
  library.impl("means", &dynamixer::means);
  library.impl("tail", &dynamixer::tail);
  library.impl("tail_grads", &dynamixer::tail_grads);
  library.impl("branch_grads", &dynamixer::branch_grads);
  library.impl("normed_grads", &dynamixer::normed_grads);
}
