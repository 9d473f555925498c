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

// Runs everything that has kernels on a level called "novel", which is built beside this file (test_levels.py). The tables of all
// other levels, defined here, count whoever calls them.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "decode.h"
#include "dispatch.h"
#include "effective.h"
#include "linear.h"
#include "pack.h"

using namespace peft_elastic;

namespace {

int calls_of_others = 0, failures = 0;

void other(const Weight&, const void*, std::int64_t, std::int64_t, std::int64_t, std::int64_t, float*, std::int64_t, void*) {
  ++calls_of_others;
}
template <typename Job>
void other(const Job&, std::int64_t, std::int64_t) {
  ++calls_of_others;
}
const Kernels kOther = {{&other, &other, &other, &other}, {&other, &other, &other, &other}, &other<Attention>,
                        &other<DenseProduct>, &other<EffectivePanel>};

void expect(bool condition, const char* what) {
  if (condition) return;
  std::printf("failed: %s\n", what);
  ++failures;
}

struct Free {
  void operator()(std::uint8_t* p) const { ::operator delete(p, std::align_val_t{64}); }
};
struct Packed {
  std::unique_ptr<std::uint8_t, Free> memory;
  Weight weight;
  explicit Packed(std::size_t bytes) : memory(static_cast<std::uint8_t*>(::operator new(bytes, std::align_val_t{64}))) {}
};

constexpr std::int64_t kOut = 48, kIn = 96;

// A weight of ones; of int4 3 - 2.
Packed ones(ValueType type) {
  const auto count = static_cast<std::size_t>(kOut * kIn);
  static const std::vector<std::uint8_t> bitmask(count / 8, 0xff), nibbles(count / 2, 0x33), zeros(static_cast<std::size_t>(kOut), 2);
  static const std::vector<float> scales(static_cast<std::size_t>(kOut), 1.0f);
  static const std::vector<std::uint16_t> bf16(count, 0x3f80);
  static const std::vector<std::int8_t> int8(count, 1);
  Source source{type, kOut, kIn, bitmask.data(), bitmask.size(), nibbles.data(), nibbles.size(), kIn, scales.data(), zeros.data(), nullptr};
  if (!value_layout(type).has_groups) {
    source.values = type == ValueType::kBf16 ? reinterpret_cast<const std::uint8_t*>(bf16.data())
                                             : reinterpret_cast<const std::uint8_t*>(int8.data());
    source.value_bytes = count * static_cast<std::size_t>(value_bytes(type));
    source.group_size = 0;
  }
  const std::size_t bytes = packed_bytes(source);
  Packed packed(bytes);
  pack(source, packed.memory.get(), bytes);
  packed.weight = open_packed(packed.memory.get(), bytes);
  check_contents(packed.weight);
  return packed;
}

void run_products(const Kernels& kernels) {
  const std::vector<float> scales(static_cast<std::size_t>(kOut), 1.0f);
  for (const ValueType type : {ValueType::kBf16, ValueType::kInt8, ValueType::kInt4, ValueType::kInt4Dense}) {
    const Packed packed = ones(type);
    for (const FloatType x_type : {FloatType::kFloat32, FloatType::kBfloat16}) {
      for (const bool int8 : {false, true}) {
        if (int8 && type != ValueType::kInt8) continue;
        for (const std::int64_t rows : {1, 3, 40}) {
          const auto count = static_cast<std::size_t>(rows * kIn);
          const std::vector<float> x(count, 1.0f);
          const std::vector<std::uint16_t> narrow(count, 0x3f80);
          std::vector<float> y(static_cast<std::size_t>(rows * kOut));
          LinearCall call{};
          call.weight = packed.weight;
          call.x = x_type == FloatType::kFloat32 ? static_cast<const void*>(x.data()) : narrow.data();
          call.x_type = x_type;
          call.rows = rows;
          call.x_stride = kIn;
          call.scales = type == ValueType::kInt8 ? scales.data() : nullptr;
          call.y = y.data();
          call.y_type = FloatType::kFloat32;
          call.threads = 2;
          call.int8_activations = int8;
          linear(call, kernels);
          for (const float value : y) expect(std::fabs(value - static_cast<float>(kIn)) < 0.01f, value_layout(type).name);
        }
      }
    }
  }
}

// One layer, half of it dense.
void run_decode(const Kernels& kernels, FloatType type) {
  constexpr std::int64_t kDim = 16, kLength = 5;
  const Packed packed = ones(ValueType::kBf16);  // 48 x 96: queries from a hidden state of 96
  const std::uint32_t hundredth = 0x3c243c24;  // as float, and each half of it as bf16
  float number;
  std::memcpy(&number, &hundredth, sizeof(number));
  const std::vector<float> numbers(static_cast<std::size_t>(kIn * kIn), number);
  const auto dense = [&](std::int64_t out, std::int64_t in) {
    DecodeLinear each{};
    each.out_features = out;
    each.in_features = in;
    each.dense = numbers.data();
    return each;
  };
  DecodeLinear query{};
  query.out_features = kOut;
  query.in_features = kIn;
  query.weight = packed.weight;
  const DecodeNorm norm{numbers.data(), 1e-5f}, none{nullptr, 0};
  DecodeModel model{type, kIn, kDim, {}};
  model.layers.push_back({query, query, query, dense(kIn, kOut), dense(32, kIn), dense(32, kIn), dense(kIn, 32), norm, norm, none,
                          none, 0.25f});
  check_layer(model, model.layers[0]);
  std::vector<float> keys(numbers), values(numbers), output(static_cast<std::size_t>(kIn), NAN);
  void* const all_keys[] = {keys.data()};
  void* all_values[] = {values.data()};
  DecodeCall call{1, kLength, kLength + 1, numbers.data(), numbers.data(), numbers.data(), false, nullptr, all_keys, all_values,
                  output.data(), 2};
  decode(model, call, kernels);
  float first;
  std::uint16_t narrow;
  std::memcpy(&narrow, output.data(), sizeof(narrow));
  const std::uint32_t bits = static_cast<std::uint32_t>(narrow) << 16;
  std::memcpy(&first, type == FloatType::kFloat32 ? static_cast<const void*>(output.data()) : &bits, sizeof(first));
  expect(std::isfinite(first), "decode");
}

void run_rest(const Kernels& kernels) {
  const std::vector<float> x(static_cast<std::size_t>(2 * kIn), 1.0f), weight(static_cast<std::size_t>(kOut * kIn), 1.0f);
  std::vector<float> y(static_cast<std::size_t>(2 * kOut)), panel(weight);
  dense_linear({x.data(), 2, kOut, kIn, weight.data(), nullptr, y.data(), FloatType::kFloat32, 2}, kernels);
  for (const float value : y) expect(value == static_cast<float>(kIn), "dense product");
  EffectivePanel call{};
  call.weight = weight.data();
  call.weight_type = FloatType::kFloat32;
  call.rows = kOut;
  call.columns = call.weight_stride = kIn;
  call.panel = panel.data();
  call.masked = call.add = true;
  call.threads = 2;
  effective_panel(call, kernels);
  for (const float value : panel) expect(value == 2.0f, "effective weight");
}

void run_all() {
  const Kernels& kernels = selected_kernels();
  run_products(kernels);
  run_decode(kernels, FloatType::kFloat32);
  run_decode(kernels, FloatType::kBfloat16);
  run_rest(kernels);
}

}  // namespace

namespace peft_elastic {
#define LEVEL(name, features, needs_permission) \
  const Kernels* name##_kernels() { return &kOther; }
PEFT_ELASTIC_LEVELS(LEVEL)
#undef LEVEL
}  // namespace peft_elastic

int main() {
  select_level("novel");
  expect(selected_level() == "novel", "the level is selected");
  run_all();
  std::printf("novel: %d calls of other levels, %d failures\n", calls_of_others, failures);
  const bool fine = calls_of_others == 0 && failures == 0;
  // What it has no product for, the portable level multiplies, which is one of those that count here.
  Kernels holes = selected_kernels();
  holes.floats[index_of(ValueType::kInt4)] = holes.own[index_of(ValueType::kInt8)] = nullptr;
  run_products(holes);
  const int filled = calls_of_others;
  select_level("portable");
  run_all();
  std::printf("with two holes: %d calls; portable, as it is here: %d more\n", filled, calls_of_others - filled);
  return fine && filled > 0 && calls_of_others > filled ? 0 : 1;
}
