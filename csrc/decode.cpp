// Copyright 2026 The peft-elastic authors.
//
// Licensed under the Apache License, Version 2.0 (the "License");
// you may not use this file except in compliance with the License.
// You may obtain a copy of the License at
//
//     http://www.apache.org/licenses/LICENSE-2.0
//
// Unless required by applicable law or agreed to in writing, software
// distributed under the License is distributed on an "AS IS" BASIS,
// WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
// See the License for the specific language governing permissions and
// limitations under the License.

#include "decode.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "floats.h"
#include "threads.h"

namespace peft_elastic {
namespace {

// Sums are kept in so many lanes, which the compiler puts into vectors; it may not reorder the terms of a single sum.
constexpr int kLanes = 16;

PE_INLINE float widen(float value) { return value; }
PE_INLINE float widen(std::uint16_t bf16) { return widen_bf16(bf16); }

PE_INLINE void store(float* target, float value) { *target = value; }
PE_INLINE void store(std::uint16_t* target, float value) { *target = round_to_bf16(value); }

PE_INLINE float sum_of(const float* lanes) {
  float eight[8], four[4];
  for (int i = 0; i < 8; ++i) eight[i] = lanes[i] + lanes[i + 8];
  for (int i = 0; i < 4; ++i) four[i] = eight[i] + eight[i + 4];
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// e^x to about 1e-7, between 1e-38 and 1e38: x = n ln 2 + r, the series of e^r, and n added to the exponent. Loops over it
// become vectors, which those over std::exp do not.
PE_INLINE float fast_exp(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the low bits are now those of n
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float sum = 1.0f / 5040;
  sum = sum * r + 1.0f / 720;
  sum = sum * r + 1.0f / 120;
  sum = sum * r + 1.0f / 24;
  sum = sum * r + 1.0f / 6;
  sum = sum * r + 1.0f / 2;
  sum = sum * r + 1.0f;
  sum = sum * r + 1.0f;
  return bits_to_float(float_to_bits(sum) + (float_to_bits(shifted) << 23));
}

template <typename T>
PE_INLINE float dot(const float* a, const T* b, std::int64_t count) {
  float sums[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] += a[i + lane] * widen(b[i + lane]);
  }
  for (int lane = 0; i < count; ++i, ++lane) sums[lane] += a[i] * widen(b[i]);
  return sum_of(sums);
}

PE_INLINE float largest_of(const float* values, std::int64_t count) {
  float lanes[kLanes];
  for (float& lane : lanes) lane = -std::numeric_limits<float>::infinity();
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = values[i + lane] > lanes[lane] ? values[i + lane] : lanes[lane];
  }
  float largest = lanes[0];
  for (int lane = 1; lane < kLanes; ++lane) largest = std::max(largest, lanes[lane]);
  for (; i < count; ++i) largest = std::max(largest, values[i]);
  return largest;
}

// Scores to weights, in place; returns the inverse of their sum, or 0 where no position is seen.
PE_INLINE float softmax(float* scores, std::int64_t count) {
  const float largest = largest_of(scores, count);
  if (largest == -std::numeric_limits<float>::infinity()) {
    bool hidden = true;  // and not NaN, which goes into the result
    for (std::int64_t i = 0; i < count; ++i) hidden = hidden && scores[i] == largest;
    std::fill(scores, scores + count, 0.0f);
    return hidden ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  }
  float sums[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const float score = scores[i + lane];
      const float weight = fast_exp(score - largest);
      scores[i + lane] = score == -std::numeric_limits<float>::infinity() ? 0.0f : weight;
      sums[lane] += scores[i + lane];
    }
  }
  for (int lane = 0; i < count; ++i, ++lane) {
    scores[i] = scores[i] == -std::numeric_limits<float>::infinity() ? 0.0f : fast_exp(scores[i] - largest);
    sums[lane] += scores[i];
  }
  return 1.0f / sum_of(sums);
}

// One query of one head over `count` positions: sum over t of softmax(scaling q K[t]) V[t], to `output` in the type T.
template <typename T>
PE_INLINE void attend(const float* query, const T* keys, const T* values, const std::uint8_t* mask, std::int64_t count,
                      std::int64_t dim, float scaling, float* scores, float* sums, T* output) {
  for (std::int64_t t = 0; t < count; ++t) scores[t] = scaling * dot(query, keys + t * dim, dim);
  if (mask) {
    for (std::int64_t t = 0; t < count; ++t) {
      if (!mask[t]) scores[t] = -std::numeric_limits<float>::infinity();
    }
  }
  const float scale = softmax(scores, count);
  for (std::int64_t d = 0; d < dim; ++d) sums[d] = 0;
  std::int64_t t = 0;
  for (; t + 4 <= count; t += 4) {
    const T* v = values + t * dim;
    const float w0 = scores[t], w1 = scores[t + 1], w2 = scores[t + 2], w3 = scores[t + 3];
    for (std::int64_t d = 0; d < dim; ++d) {
      sums[d] += (w0 * widen(v[d]) + w1 * widen(v[dim + d])) + (w2 * widen(v[2 * dim + d]) + w3 * widen(v[3 * dim + d]));
    }
  }
  for (; t < count; ++t) {
    for (std::int64_t d = 0; d < dim; ++d) sums[d] += scores[t] * widen(values[t * dim + d]);
  }
  for (std::int64_t d = 0; d < dim; ++d) store(output + d, sums[d] * scale);
}

struct Attention {
  const float* queries;  // [batch, heads, head_dim]
  const void *keys, *values;
  const std::uint8_t* mask;
  std::int64_t batch, heads, kv_heads, head_dim, count, capacity, scores_stride;
  float scaling;
  float* scores;  // [batch * heads][scores_stride]: `count` scores, then `head_dim` sums
  void* output;   // [batch, heads, head_dim]
  FloatType type;
  bool avx2;
  int parts;
};

template <typename T>
PE_INLINE void attend_heads(const Attention& job, std::int64_t first, std::int64_t last) {
  for (std::int64_t unit = first; unit < last; ++unit) {
    const std::int64_t row = unit / job.heads, head = unit % job.heads;
    const std::int64_t at = (row * job.kv_heads + head / (job.heads / job.kv_heads)) * job.capacity * job.head_dim;
    float* scores = job.scores + unit * job.scores_stride;
    attend(job.queries + unit * job.head_dim, static_cast<const T*>(job.keys) + at, static_cast<const T*>(job.values) + at,
           job.mask ? job.mask + row * job.count : nullptr, job.count, job.head_dim, job.scaling, scores,
           scores + job.count, static_cast<T*>(job.output) + unit * job.head_dim);
  }
}

void attend_any(const Attention& job, std::int64_t first, std::int64_t last) {
  if (job.type == FloatType::kFloat32) {
    attend_heads<float>(job, first, last);
  } else {
    attend_heads<std::uint16_t>(job, first, last);
  }
}

// The same code, for wider vectors.
#if defined(__GNUC__) && defined(__x86_64__)
__attribute__((target("avx2,fma"))) void attend_avx2(const Attention& job, std::int64_t first, std::int64_t last) {
  if (job.type == FloatType::kFloat32) {
    attend_heads<float>(job, first, last);
  } else {
    attend_heads<std::uint16_t>(job, first, last);
  }
}
#else
void attend_avx2(const Attention& job, std::int64_t first, std::int64_t last) { attend_any(job, first, last); }
#endif

void attend_part(void* data, int part) {
  const Attention& job = *static_cast<const Attention*>(data);
  const std::int64_t units = job.batch * job.heads;
  (job.avx2 ? attend_avx2 : attend_any)(job, units * part / job.parts, units * (part + 1) / job.parts);
}

// Fewer multiplications take less time than handing them to another thread.
constexpr std::int64_t kMultiplicationsPerThread = 100'000;

int parts_for(std::int64_t multiplications, std::int64_t units, int threads) {
  const std::int64_t most = std::min<std::int64_t>(threads, units);
  return static_cast<int>(std::max<std::int64_t>(1, std::min(most, multiplications / kMultiplicationsPerThread)));
}

// y = x W^T + b with a dense W, for few rows of x: as fast as W comes from memory.
struct DenseProduct {
  const float* x;  // [rows, in_features]
  std::int64_t rows, out_features, in_features;
  const void* weight;
  const void* bias;
  float* y;  // [rows, out_features]
  FloatType type, bias_type;
  bool avx2;
  int parts;
};

// Fetches what lies 8 KiB behind a row, which is faster than the processor's own prefetching (measured on AMD Zen 5).
PE_INLINE void prefetch_row(const void* row, std::int64_t bytes) {
#if defined(__GNUC__)
  const auto ahead = reinterpret_cast<std::uintptr_t>(row) + 8192;
  for (std::int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(reinterpret_cast<const void*>(ahead + static_cast<std::uintptr_t>(i)));
#endif
}

template <typename T>
PE_INLINE void multiply_dense(const DenseProduct& job, std::int64_t first, std::int64_t last) {
  for (std::int64_t n = first; n < last; ++n) {
    const T* weight = static_cast<const T*>(job.weight) + n * job.in_features;
    prefetch_row(weight, job.in_features * static_cast<std::int64_t>(sizeof(T)));
    float bias = 0;
    if (job.bias) {
      bias = job.bias_type == FloatType::kFloat32 ? static_cast<const float*>(job.bias)[n]
                                                  : widen(static_cast<const std::uint16_t*>(job.bias)[n]);
    }
    for (std::int64_t m = 0; m < job.rows; ++m) {
      job.y[m * job.out_features + n] = dot(job.x + m * job.in_features, weight, job.in_features) + bias;
    }
  }
}

PE_INLINE void multiply_dense_inline(const DenseProduct& job, std::int64_t first, std::int64_t last) {
  if (job.type == FloatType::kFloat32) {
    multiply_dense<float>(job, first, last);
  } else {
    multiply_dense<std::uint16_t>(job, first, last);
  }
}

void multiply_dense_any(const DenseProduct& job, std::int64_t first, std::int64_t last) {
  multiply_dense_inline(job, first, last);
}

#if defined(__GNUC__) && defined(__x86_64__)
__attribute__((target("avx2,fma")))
#endif
void multiply_dense_avx2(const DenseProduct& job, std::int64_t first, std::int64_t last) {
  multiply_dense_inline(job, first, last);
}

void multiply_dense_part(void* data, int part) {
  const DenseProduct& job = *static_cast<const DenseProduct*>(data);
  (job.avx2 ? multiply_dense_avx2 : multiply_dense_any)(job, job.out_features * part / job.parts,
                                                        job.out_features * (part + 1) / job.parts);
}

void run_dense(DenseProduct& job, int threads) {
  job.parts = parts_for(job.rows * job.in_features * job.out_features, job.out_features, threads);
  run_parallel(job.parts, &multiply_dense_part, &job);
}

template <typename T>
void normalize(const float* x, const DecodeNorm& norm, std::int64_t count, T* target) {
  const float scale = 1.0f / std::sqrt(dot(x, x, count) / static_cast<float>(count) + norm.epsilon);
  const T* weight = static_cast<const T*>(norm.weight);
  for (std::int64_t i = 0; i < count; ++i) store(target + i, x[i] * scale * widen(weight[i]));
}

// x cos + rotate_half(x) sin, where rotate_half(x) is the second half, negated, before the first.
template <typename T>
void rotate(float* x, const T* cos, const T* sin, std::int64_t dim) {
  const std::int64_t half = dim / 2;
  for (std::int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[half + i];
    x[i] = a * widen(cos[i]) - b * widen(sin[i]);
    x[half + i] = b * widen(cos[half + i]) + a * widen(sin[half + i]);
  }
}

// Memory of the calling thread, aligned to 64 bytes, kept between calls.
class Workspace {
 public:
  float* reserve(std::int64_t floats) {
    const std::size_t count = static_cast<std::size_t>(floats);
    if (count > size_) {
      memory_.reset();
      size_ = 0;
      memory_.reset(static_cast<float*>(::operator new(count * sizeof(float), std::align_val_t{kAlignment})));
      size_ = count;
    }
    return memory_.get();
  }

 private:
  struct Delete {
    void operator()(float* p) const { ::operator delete(p, std::align_val_t{kAlignment}); }
  };
  std::unique_ptr<float, Delete> memory_;
  std::size_t size_ = 0;
};

thread_local Workspace t_workspace;

std::int64_t round_up(std::int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

template <typename T>
class Step {
 public:
  Step(const DecodeModel& model, const DecodeCall& call, const Kernels& kernels)
      : model_(model), call_(call), kernels_(kernels) {
    std::int64_t query = 0, key = 0, inner = 0;
    for (const DecodeLayer& layer : model.layers) {
      query = std::max(query, layer.q.out_features);
      key = std::max(key, layer.k.out_features);
      inner = std::max(inner, layer.gate.out_features);
    }
    scores_stride_ = round_up(call.length + 1 + model.head_dim);
    const std::int64_t input = std::max({model.hidden_size, query, inner});
    const std::int64_t sizes[] = {call.batch * model.hidden_size, call.batch * model.hidden_size, call.batch * input,
                                  call.batch * input, call.batch * query, call.batch * key, call.batch * key, call.batch * inner,
                                  call.batch * inner, call.batch * (query / model.head_dim) * scores_stride_};
    float** const buffers[] = {&hidden_, &output_, &input_, &wide_input_, &q_, &k_, &v_, &gate_, &up_, &scores_};
    std::int64_t total = 0;
    for (std::int64_t size : sizes) total += round_up(size);
    float* memory = t_workspace.reserve(total);
    for (std::size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); ++i) {
      *buffers[i] = memory;
      memory += round_up(sizes[i]);
    }
  }

  void run() {
    const std::int64_t count = call_.batch * model_.hidden_size;
    const T* source = static_cast<const T*>(call_.hidden);
    for (std::int64_t i = 0; i < count; ++i) hidden_[i] = widen(source[i]);
    for (std::size_t index = 0; index < model_.layers.size(); ++index) {
      const DecodeLayer& layer = model_.layers[index];
      normalize_hidden(layer.input_norm);
      multiply(layer.q, q_);
      multiply(layer.k, k_);
      multiply(layer.v, v_);
      append(layer, static_cast<T*>(call_.keys[index]), static_cast<T*>(call_.values[index]));
      attention(layer, call_.keys[index], call_.values[index]);
      multiply(layer.o, output_);
      for (std::int64_t i = 0; i < count; ++i) hidden_[i] += output_[i];
      normalize_hidden(layer.mlp_norm);
      multiply(layer.gate, gate_);
      multiply(layer.up, up_);
      activate(layer.gate.out_features);
      multiply(layer.down, output_);
      for (std::int64_t i = 0; i < count; ++i) hidden_[i] += output_[i];
    }
    T* target = static_cast<T*>(call_.output);
    for (std::int64_t i = 0; i < count; ++i) store(target + i, hidden_[i]);
  }

 private:
  T* input() { return reinterpret_cast<T*>(input_); }  // of the linear layers, [batch, in_features]

  void multiply(const DecodeLinear& linear, float* y) {
    if (linear.dense) {
      multiply_dense(linear, y);
      return;
    }
    LinearCall call{};
    call.weight = linear.weight;
    call.x = input_;
    call.x_type = model_.type;
    call.rows = call_.batch;
    call.x_stride = linear.in_features;
    call.scales = linear.scales;
    call.bias = linear.bias;
    call.bias_type = linear.bias_type;
    call.y = y;
    call.y_type = FloatType::kFloat32;
    call.threads = call_.threads;
    call.int8_activations = false;
    peft_elastic::linear(call, kernels_);
  }

  void multiply_dense(const DecodeLinear& linear, float* y) {
    const std::int64_t count = call_.batch * linear.in_features;
    DenseProduct job{};
    job.x = input_;
    if (sizeof(T) != sizeof(float)) {
      for (std::int64_t i = 0; i < count; ++i) wide_input_[i] = widen(input()[i]);
      job.x = wide_input_;
    }
    job.rows = call_.batch;
    job.out_features = linear.out_features;
    job.in_features = linear.in_features;
    job.weight = linear.dense;
    job.bias = linear.bias;
    job.bias_type = linear.bias_type;
    job.y = y;
    job.type = model_.type;
    job.avx2 = call_.avx2;
    run_dense(job, call_.threads);
  }

  void normalize_hidden(const DecodeNorm& norm) {
    for (std::int64_t row = 0; row < call_.batch; ++row) {
      const std::int64_t at = row * model_.hidden_size;
      normalize(hidden_ + at, norm, model_.hidden_size, input() + at);
    }
  }

  // Of each head: norm, if the model has one there, and rotation.
  void finish_heads(float* x, std::int64_t heads, const DecodeNorm& norm) {
    const std::int64_t dim = model_.head_dim;
    for (std::int64_t row = 0; row < call_.batch; ++row) {
      const std::int64_t angles = call_.rotary_per_row ? row * dim : 0;
      for (std::int64_t head = 0; head < heads; ++head, x += dim) {
        if (norm.weight) {
          const float scale = 1.0f / std::sqrt(dot(x, x, dim) / static_cast<float>(dim) + norm.epsilon);
          const T* weight = static_cast<const T*>(norm.weight);
          for (std::int64_t i = 0; i < dim; ++i) x[i] *= scale * widen(weight[i]);
        }
        rotate(x, static_cast<const T*>(call_.cos) + angles, static_cast<const T*>(call_.sin) + angles, dim);
      }
    }
  }

  void append(const DecodeLayer& layer, T* keys, T* values) {
    const std::int64_t dim = model_.head_dim, kv_heads = layer.k.out_features / dim;
    finish_heads(q_, layer.q.out_features / dim, layer.q_norm);
    finish_heads(k_, kv_heads, layer.k_norm);
    for (std::int64_t unit = 0; unit < call_.batch * kv_heads; ++unit) {
      const std::int64_t at = (unit * call_.capacity + call_.length) * dim;
      for (std::int64_t i = 0; i < dim; ++i) store(keys + at + i, k_[unit * dim + i]);
      for (std::int64_t i = 0; i < dim; ++i) store(values + at + i, v_[unit * dim + i]);
    }
  }

  void attention(const DecodeLayer& layer, const void* keys, const void* values) {
    Attention job{};
    job.queries = q_;
    job.keys = keys;
    job.values = values;
    job.mask = call_.mask;
    job.batch = call_.batch;
    job.heads = layer.q.out_features / model_.head_dim;
    job.kv_heads = layer.k.out_features / model_.head_dim;
    job.head_dim = model_.head_dim;
    job.count = call_.length + 1;
    job.capacity = call_.capacity;
    job.scores_stride = scores_stride_;
    job.scaling = layer.scaling;
    job.scores = scores_;
    job.output = input_;
    job.type = model_.type;
    job.avx2 = call_.avx2;
    const std::int64_t units = job.batch * job.heads, work = units * job.count * job.head_dim * 2;
    job.parts = parts_for(work, units, call_.threads);
    run_parallel(job.parts, &attend_part, &job);
  }

  void activate(std::int64_t inner) {
    T* target = input();
    for (std::int64_t i = 0; i < call_.batch * inner; ++i) {
      store(target + i, gate_[i] / (1.0f + fast_exp(-gate_[i])) * up_[i]);
    }
  }

  const DecodeModel& model_;
  const DecodeCall& call_;
  const Kernels& kernels_;
  std::int64_t scores_stride_;
  float *hidden_, *output_, *input_, *wide_input_, *q_, *k_, *v_, *gate_, *up_, *scores_;
};

void expect(const char* name, const DecodeLinear& linear, std::int64_t out_features, std::int64_t in_features) {
  if (linear.out_features == out_features && linear.in_features == in_features) return;
  throw std::invalid_argument(std::string(name) + " is " + std::to_string(linear.out_features) + " x " +
                              std::to_string(linear.in_features) + ", expected " + std::to_string(out_features) + " x " +
                              std::to_string(in_features));
}

}  // namespace

void check_layer(const DecodeModel& model, const DecodeLayer& layer) {
  const std::int64_t hidden = model.hidden_size, dim = model.head_dim;
  const std::int64_t query = layer.q.out_features, key = layer.k.out_features;
  const std::int64_t inner = layer.gate.out_features;
  if (model.type == FloatType::kFloat16) throw std::invalid_argument("a decoder in float16 is not provided for");
  if (hidden < 1 || inner < 1) throw std::invalid_argument("a decoder without inputs or channels");
  if (dim < 2 || dim % 2 || key < 1 || key % dim || query < key || query % key) {
    throw std::invalid_argument("heads of " + std::to_string(dim) + " do not divide " + std::to_string(query) +
                                " queries and " + std::to_string(key) + " keys");
  }
  expect("q", layer.q, query, hidden);
  expect("k", layer.k, key, hidden);
  expect("v", layer.v, key, hidden);
  expect("o", layer.o, hidden, query);
  expect("gate", layer.gate, inner, hidden);
  expect("up", layer.up, inner, hidden);
  expect("down", layer.down, hidden, inner);
}

void decode(const DecodeModel& model, const DecodeCall& call, const Kernels& kernels) {
  if (model.type == FloatType::kFloat32) {
    Step<float>(model, call, kernels).run();
  } else {
    Step<std::uint16_t>(model, call, kernels).run();
  }
}

namespace {

template <typename T>
void dense_linear_of(const DenseCall& call) {
  const std::int64_t inputs = call.rows * call.in_features, outputs = call.rows * call.out_features;
  float* const x = t_workspace.reserve(round_up(inputs) + outputs);
  float* const y = x + round_up(inputs);
  for (std::int64_t i = 0; i < inputs; ++i) x[i] = widen(static_cast<const T*>(call.x)[i]);
  DenseProduct job{};
  job.x = x;
  job.rows = call.rows;
  job.out_features = call.out_features;
  job.in_features = call.in_features;
  job.weight = call.weight;
  job.bias = call.bias;
  job.y = y;
  job.type = job.bias_type = call.type;
  job.avx2 = call.avx2;
  run_dense(job, call.threads);
  for (std::int64_t i = 0; i < outputs; ++i) store(static_cast<T*>(call.y) + i, y[i]);
}

}  // namespace

void dense_linear(const DenseCall& call) {
  if (call.type == FloatType::kFloat32) {
    dense_linear_of<float>(call);
  } else {
    dense_linear_of<std::uint16_t>(call);
  }
}

}  // namespace peft_elastic
