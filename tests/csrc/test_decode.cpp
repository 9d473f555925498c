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

// The decode step against the same in double precision, on random models, for the sanitizers (test_decode.py).
// Usage: test_decode ROUNDS

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <random>
#include <vector>

#include "decode.h"
#include "pack.h"

using namespace peft_elastic;

namespace {

std::mt19937 g_random(0);

struct Free {
  void operator()(std::uint8_t* p) const { ::operator delete(p, std::align_val_t{64}); }
};
using Buffer = std::unique_ptr<std::uint8_t, Free>;

float uniform() { return std::uniform_real_distribution<float>(-1, 1)(g_random); }
std::int64_t between(std::int64_t low, std::int64_t high) {
  return std::uniform_int_distribution<std::int64_t>(low, high)(g_random);
}

std::uint16_t to_bf16(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
float from_bf16(std::uint16_t value) {
  const std::uint32_t bits = static_cast<std::uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

// Numbers in the type of a model, of exactly the size that they need, so that the sanitizer sees every step beyond.
struct Numbers {
  FloatType type;
  std::vector<float> floats;
  std::vector<std::uint16_t> halves;

  Numbers(FloatType type_, std::int64_t count, float scale = 1) : type(type_) {
    for (std::int64_t i = 0; i < count; ++i) {
      const float value = scale * uniform();
      if (type == FloatType::kFloat32) {
        floats.push_back(value);
      } else {
        halves.push_back(to_bf16(value));
      }
    }
  }
  void* data() { return type == FloatType::kFloat32 ? static_cast<void*>(floats.data()) : halves.data(); }
  double operator[](std::int64_t i) const {
    const auto at = static_cast<std::size_t>(i);
    return type == FloatType::kFloat32 ? floats[at] : from_bf16(halves[at]);
  }
};

struct Linear {
  std::int64_t out, in;
  std::vector<double> weight;
  std::vector<float> scales, bias;
  Buffer packed;
  Numbers stored{FloatType::kFloat32, 0};  // a dense weight, instead
  DecodeLinear view;

  Linear(std::int64_t out_, std::int64_t in_, ValueType type, bool with_bias, FloatType model_type) : out(out_), in(in_) {
    const auto count = static_cast<std::size_t>(out * in);
    std::vector<std::uint16_t> bf16(count);
    std::vector<std::int8_t> int8(count);
    weight.resize(count);
    const float size = 1.0f / std::sqrt(static_cast<float>(in));
    if (type == ValueType::kInt8) scales.assign(static_cast<std::size_t>(out), size / 64);
    for (std::size_t i = 0; i < count; ++i) {
      if (value_layout(type).has_groups || between(0, 1)) continue;
      if (type == ValueType::kBf16) {
        bf16[i] = to_bf16(2 * size * uniform());
        weight[i] = from_bf16(bf16[i]);
      } else {
        int8[i] = static_cast<std::int8_t>(between(-127, 127));
        weight[i] = static_cast<double>(int8[i]) * scales[0];
      }
    }
    std::size_t bytes;
    if (value_layout(type).has_groups) {
      // groups of 4, in the order of the inputs or from last to first
      const std::int64_t groups = (in + 3) / 4;
      std::vector<float> steps(static_cast<std::size_t>(out * groups), size / 4);
      std::vector<std::uint8_t> zeros(steps.size(), 6), values((count + 1) / 2, 0);
      std::vector<std::int32_t> order;
      for (std::int64_t k = in; k-- > 0;) order.push_back(static_cast<std::int32_t>(k));
      for (std::size_t i = 0; i < count; ++i) {
        const std::int64_t code = between(0, 15);
        weight[i] = static_cast<double>(size / 4) * static_cast<double>(code - 6);
        values[i / 2] |= static_cast<std::uint8_t>(code << (i % 2 * 4));
      }
      const Source source{type, out, in, nullptr, 0, values.data(), values.size(), 4, steps.data(), zeros.data(),
                          between(0, 1) ? order.data() : nullptr};
      bytes = packed_bytes(source);
      packed.reset(static_cast<std::uint8_t*>(::operator new(bytes, std::align_val_t{64})));
      pack(source, packed.get(), bytes);
    } else {
      const void* dense = type == ValueType::kBf16 ? static_cast<const void*>(bf16.data()) : int8.data();
      bytes = packed_bytes(type, out, in, count_nonzeros(type, dense, out, in, in));
      packed.reset(static_cast<std::uint8_t*>(::operator new(bytes, std::align_val_t{64})));
      pack_dense(type, dense, out, in, in, packed.get(), bytes);
    }
    if (with_bias) {
      for (std::int64_t i = 0; i < out; ++i) bias.push_back(uniform());
    }
    view = {out, in, open_packed(packed.get(), bytes), nullptr, scales.empty() ? nullptr : scales.data(),
            bias.empty() ? nullptr : bias.data(), FloatType::kFloat32};
    if (between(0, 3) == 0) {
      stored = Numbers(model_type, out * in, size);
      for (std::size_t i = 0; i < count; ++i) weight[i] = stored[static_cast<std::int64_t>(i)];
      view.weight = {};
      view.scales = nullptr;
      view.dense = stored.data();
    }
  }

  std::vector<double> operator()(const std::vector<double>& x) const {
    std::vector<double> y(static_cast<std::size_t>(out));
    for (std::int64_t n = 0; n < out; ++n) {
      double sum = bias.empty() ? 0 : bias[static_cast<std::size_t>(n)];
      for (std::int64_t k = 0; k < in; ++k) sum += weight[static_cast<std::size_t>(n * in + k)] * x[static_cast<std::size_t>(k)];
      y[static_cast<std::size_t>(n)] = sum;
    }
    return y;
  }
};

void normalize(double* x, std::int64_t count, const Numbers& weight, double epsilon) {
  double squares = 0;
  for (std::int64_t i = 0; i < count; ++i) squares += x[i] * x[i];
  for (std::int64_t i = 0; i < count; ++i) {
    x[i] *= weight[i] / std::sqrt(squares / static_cast<double>(count) + epsilon);
  }
}

struct Layer {
  Linear q, k, v, o, gate, up, down;
  Numbers input_norm, mlp_norm, q_norm, k_norm, keys, values;
};

// One random model and step. Returns the distance from double precision, relative to what the layers add.
double round_trip() {
  const FloatType type = between(0, 1) ? FloatType::kFloat32 : FloatType::kBfloat16;
  const ValueType types[] = {ValueType::kBf16, ValueType::kInt8, ValueType::kInt4Dense}, value_type = types[between(0, 2)];
  const std::int64_t batch = between(1, 3), length = between(0, 70), capacity = length + between(1, 5);
  const std::int64_t dim = 2 * between(1, 20), kv_heads = between(1, 3), group = between(1, 3), heads = kv_heads * group;
  const std::int64_t hidden = between(1, 70), inner = between(1, 90), count = between(1, 3);
  const bool bias = between(0, 1), head_norms = between(0, 1), rotary_per_row = between(0, 1), masked = between(0, 1);
  const float epsilon = 1e-5f, scaling = 1.0f / std::sqrt(static_cast<float>(dim));

  std::vector<std::unique_ptr<Layer>> layers;
  DecodeModel model{type, hidden, dim, {}};
  std::vector<void*> keys, values;
  const std::int64_t cells = batch * kv_heads * capacity * dim;
  for (std::int64_t i = 0; i < count; ++i) {
    layers.emplace_back(new Layer{{heads * dim, hidden, value_type, bias, type}, {kv_heads * dim, hidden, value_type, bias, type},
                                  {kv_heads * dim, hidden, value_type, bias, type}, {hidden, heads * dim, value_type, bias, type},
                                  {inner, hidden, value_type, bias, type}, {inner, hidden, value_type, bias, type},
                                  {hidden, inner, value_type, bias, type}, {type, hidden}, {type, hidden}, {type, dim},
                                  {type, dim}, {type, cells}, {type, cells}});
    Layer& l = *layers.back();
    model.layers.push_back({l.q.view, l.k.view, l.v.view, l.o.view, l.gate.view, l.up.view, l.down.view,
                            {l.input_norm.data(), epsilon}, {l.mlp_norm.data(), epsilon},
                            {head_norms ? l.q_norm.data() : nullptr, epsilon},
                            {head_norms ? l.k_norm.data() : nullptr, epsilon}, scaling});
    check_layer(model, model.layers.back());
    keys.push_back(l.keys.data());
    values.push_back(l.values.data());
  }
  Numbers input(type, batch * hidden), output(type, batch * hidden);
  Numbers cos(type, (rotary_per_row ? batch : 1) * dim), sin(type, (rotary_per_row ? batch : 1) * dim);
  std::vector<std::uint8_t> mask(static_cast<std::size_t>(batch * (length + 1)));
  for (auto& seen : mask) seen = static_cast<std::uint8_t>(between(0, 3) != 0);
  const std::vector<std::unique_ptr<Layer>>& all = layers;

  DecodeCall call{batch, length, capacity, input.data(), cos.data(), sin.data(), rotary_per_row,
                  masked ? mask.data() : nullptr, keys.data(), values.data(), output.data(),
                  static_cast<int>(between(1, 4))};
  const bool avx2 = avx2_kernels() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && between(0, 1);
  decode(model, call, avx2 ? *avx2_kernels() : *portable_kernels());

  double error = 0, size = 0;
  for (std::int64_t b = 0; b < batch; ++b) {
    std::vector<double> h;
    for (std::int64_t i = 0; i < hidden; ++i) h.push_back(input[b * hidden + i]);
    const std::vector<double> start = h;
    for (const auto& layer : all) {
      const Layer& l = *layer;
      std::vector<double> x = h;
      normalize(x.data(), hidden, l.input_norm, epsilon);
      std::vector<double> q = l.q(x), k = l.k(x), v = l.v(x), mixed(static_cast<std::size_t>(heads * dim));
      const std::int64_t angles = rotary_per_row ? b * dim : 0;
      for (std::int64_t head = 0; head < heads + kv_heads; ++head) {
        double* each = head < heads ? &q[static_cast<std::size_t>(head * dim)] : &k[static_cast<std::size_t>((head - heads) * dim)];
        if (head_norms) normalize(each, dim, head < heads ? l.q_norm : l.k_norm, epsilon);
        std::vector<double> old(each, each + dim);
        for (std::int64_t i = 0; i < dim; ++i) {
          const double other = i < dim / 2 ? -old[static_cast<std::size_t>(i + dim / 2)] : old[static_cast<std::size_t>(i - dim / 2)];
          each[i] = old[static_cast<std::size_t>(i)] * cos[angles + i] + other * sin[angles + i];
        }
      }
      for (std::int64_t head = 0; head < heads; ++head) {
        const std::int64_t kv = head / group, base = (b * kv_heads + kv) * capacity * dim;
        std::vector<double> weights;
        double total = 0;
        for (std::int64_t t = 0; t <= length; ++t) {
          double score = 0;
          for (std::int64_t i = 0; i < dim; ++i) {
            const double key = t < length ? l.keys[base + t * dim + i] : k[static_cast<std::size_t>(kv * dim + i)];
            score += q[static_cast<std::size_t>(head * dim + i)] * key;
          }
          const bool seen = !masked || mask[static_cast<std::size_t>(b * (length + 1) + t)];
          weights.push_back(seen ? std::exp(score * scaling) : 0.0);
          total += weights.back();
        }
        for (std::int64_t i = 0; i < dim; ++i) {
          double sum = 0;
          for (std::int64_t t = 0; t <= length; ++t) {
            const double value = t < length ? l.values[base + t * dim + i] : v[static_cast<std::size_t>(kv * dim + i)];
            sum += weights[static_cast<std::size_t>(t)] * value;
          }
          mixed[static_cast<std::size_t>(head * dim + i)] = total > 0 ? sum / total : 0;
        }
      }
      const std::vector<double> attended = l.o(mixed);
      for (std::int64_t i = 0; i < hidden; ++i) h[static_cast<std::size_t>(i)] += attended[static_cast<std::size_t>(i)];
      x = h;
      normalize(x.data(), hidden, l.mlp_norm, epsilon);
      std::vector<double> gate = l.gate(x);
      const std::vector<double> up = l.up(x);
      for (std::size_t i = 0; i < gate.size(); ++i) gate[i] *= up[i] / (1 + std::exp(-gate[i]));
      const std::vector<double> added = l.down(gate);
      for (std::int64_t i = 0; i < hidden; ++i) h[static_cast<std::size_t>(i)] += added[static_cast<std::size_t>(i)];
    }
    for (std::int64_t i = 0; i < hidden; ++i) {
      const auto at = static_cast<std::size_t>(i);
      error += std::pow(output[b * hidden + i] - h[at], 2);
      size += std::pow(h[at], 2) + std::pow(start[at], 2);
    }
  }
  return std::sqrt(error / size) / (type == FloatType::kFloat32 ? 1e-5 : 0.03);
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 20;
  int failures = 0;
  double worst = 0;
  for (int round = 0; round < rounds; ++round) {
    const double error = round_trip();
    worst = std::max(worst, error);
    failures += !(error < 1);
  }
  std::printf("%d rounds, %d failures, worst %.3f of the tolerance\n", rounds, failures, worst);
  return failures != 0;
}
