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
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "lanes.h"
#include "threads.h"

namespace peft_elastic {
namespace {

// Fewer multiplications take less time than handing them to another thread.
constexpr std::int64_t kMultiplicationsPerThread = 100'000;

int parts_for(std::int64_t multiplications, std::int64_t units, int threads) {
  const std::int64_t most = std::min<std::int64_t>(threads, units);
  return static_cast<int>(std::max<std::int64_t>(1, std::min(most, multiplications / kMultiplicationsPerThread)));
}

void run_dense(const DenseProduct& job, const Kernels& kernels, int threads) {
  const int parts = parts_for(job.rows * job.in_features * job.out_features, job.out_features, threads);
  run_ranges(parts, job.out_features, kernels.dense, job);
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
    run_dense(job, kernels_, call_.threads);
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
    const std::int64_t units = job.batch * job.heads, work = units * job.count * job.head_dim * 2;
    run_ranges(parts_for(work, units, call_.threads), units, kernels_.attend, job);
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
void dense_linear_of(const DenseCall& call, const Kernels& kernels) {
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
  run_dense(job, kernels, call.threads);
  for (std::int64_t i = 0; i < outputs; ++i) store(static_cast<T*>(call.y) + i, y[i]);
}

}  // namespace

void dense_linear(const DenseCall& call, const Kernels& kernels) {
  if (call.type == FloatType::kFloat32) {
    dense_linear_of<float>(call, kernels);
  } else {
    dense_linear_of<std::uint16_t>(call, kernels);
  }
}

}  // namespace peft_elastic
