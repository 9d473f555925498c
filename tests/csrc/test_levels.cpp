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

// Every level on the same packed bytes, through the software model, against double precision. Built by test_levels.py, also
// with sanitizers: every buffer ends where the interface says.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "kernels.h"
#include "pack.h"

using namespace peft_elastic;

namespace {

int failures = 0;
double worst = 0;

struct Aligned {
  explicit Aligned(std::size_t bytes) : size(bytes), data(static_cast<std::uint8_t*>(::operator new(bytes, std::align_val_t{64}))) {
    std::memset(data, 0x7f, bytes);  // NaN, as bf16 and as float
  }
  ~Aligned() { ::operator delete(data, std::align_val_t{64}); }
  Aligned(const Aligned&) = delete;
  std::size_t size;
  std::uint8_t* data;
};

std::uint16_t to_bf16(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<std::uint16_t>(bits >> 16);
}

float from_bf16(std::uint16_t value) {
  const std::uint32_t bits = static_cast<std::uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

// int4 rounds activations to 24 bits of the largest one of their group: what a product may be off by besides.
struct Coarse {
  std::vector<std::int64_t> group_of;
  std::vector<double> sizes;  // [out, groups]: sum |w|
  std::int64_t groups = 0;
};

template <typename X>
void check(const char* level, const char* name, Kernel kernel, const Weight& w, const std::vector<double>& dense,
           std::int64_t rows, std::mt19937& random, const Coarse& coarse = {}, const std::int32_t* order = nullptr) {
  if (!kernel) return;
  std::normal_distribution<float> normal;
  const std::int64_t width = w.tiles * tile_inputs(w.type), stride = w.blocks * 16;
  Aligned x(static_cast<std::size_t>(rows * width) * sizeof(X)), sums(static_cast<std::size_t>(rows * stride) * 4);
  Aligned scratch(kScratchBytes);
  std::memset(x.data, 0, x.size);
  auto* inputs = reinterpret_cast<X*>(x.data);
  std::vector<double> exact(static_cast<std::size_t>(rows * width));
  for (std::int64_t m = 0; m < rows; ++m) {
    for (std::int64_t k = 0; k < w.in_features; ++k) {
      const float value = normal(random);
      double& as_double = exact[static_cast<std::size_t>(m * width + (order ? order[k] : k))];
      if constexpr (sizeof(X) == 4) {
        inputs[m * width + k] = value;
        as_double = value;
      } else if constexpr (sizeof(X) == 2) {
        inputs[m * width + k] = to_bf16(value);
        as_double = from_bf16(to_bf16(value));
      } else {
        const int whole = static_cast<int>(std::fmax(-127, std::fmin(127, value * 60)));
        inputs[m * width + k] = static_cast<X>(whole);
        as_double = whole;
      }
    }
  }
  // In two ranges of blocks, as two threads would.
  const std::int64_t middle = w.blocks / 2;
  for (int part = 0; part < 2; ++part) {
    const std::int64_t first = part ? middle : 0, last = part ? w.blocks : middle;
    if (first < last) {
      kernel(w, inputs, width, rows, first, last, reinterpret_cast<float*>(sums.data), stride, scratch.data);
    }
  }
  for (std::int64_t m = 0; m < rows; ++m) {
    for (std::int64_t n = 0; n < w.out_features; ++n) {
      double expected = 0, size = 0;
      for (std::int64_t k = 0; k < w.in_features; ++k) {
        const double product = exact[static_cast<std::size_t>(m * width + k)] * dense[static_cast<std::size_t>(n * w.in_features + k)];
        expected += product;
        size += std::fabs(product);
      }
      for (std::int64_t g = 0; g < coarse.groups; ++g) {
        double largest = 0;
        for (std::int64_t k = 0; k < w.in_features; ++k) {
          if (coarse.group_of[static_cast<std::size_t>(k)] != g) continue;
          largest = std::fmax(largest, std::fabs(exact[static_cast<std::size_t>(m * width + k)]));
        }
        size += 0.1 * largest * coarse.sizes[static_cast<std::size_t>(n * coarse.groups + g)];  // 2^-23 is 0.06 of the tolerance
      }
      const float got = reinterpret_cast<const float*>(sums.data)[m * stride + n];
      const double error = std::fabs(got - expected) / (size + 1e-30);
      if (error > worst) worst = error;
      if (!(error < (sizeof(X) == 1 ? 6e-8 : 2e-6)) && ++failures < 20) {
        std::printf("%s %s: %lld x %lld, %lld rows, [%lld, %lld]: %g, expected %g\n", level, name,
                    static_cast<long long>(w.out_features), static_cast<long long>(w.in_features),
                    static_cast<long long>(rows), static_cast<long long>(m), static_cast<long long>(n), got, expected);
      }
    }
  }
}

struct Level {
  const char* name;
  const Kernels* kernels;
};

const Level kLevels[] = {
#define LEVEL(name, features, needs_permission) {#name, name##_kernels()},
    PEFT_ELASTIC_LEVELS(LEVEL)
#undef LEVEL
};

void check_int4(std::int64_t out, std::int64_t in, std::int64_t group_size, double sparsity, bool dense, bool scattered,
                std::mt19937& random) {
  const std::int64_t groups = (in + group_size - 1) / group_size, row_bytes = (in + 7) / 8;
  std::vector<std::int32_t> order(static_cast<std::size_t>(in));
  for (std::int64_t k = 0; k < in; ++k) order[static_cast<std::size_t>(k)] = static_cast<std::int32_t>(k);
  if (scattered) std::shuffle(order.begin(), order.end(), random);
  Coarse coarse;
  coarse.groups = groups;
  coarse.group_of.resize(static_cast<std::size_t>(in));
  coarse.sizes.assign(static_cast<std::size_t>(out * groups), 0);
  for (std::int64_t place = 0; place < in; ++place) {
    coarse.group_of[static_cast<std::size_t>(order[static_cast<std::size_t>(place)])] = place / group_size;
  }
  std::vector<float> scales;
  std::vector<std::uint8_t> zeros, codes, bitmask(static_cast<std::size_t>(out * row_bytes), 0);
  for (std::int64_t i = 0; i < out * groups; ++i) {
    scales.push_back(std::normal_distribution<float>()(random));
    zeros.push_back(static_cast<std::uint8_t>(random() % 16));
  }
  std::vector<double> exact(static_cast<std::size_t>(out * in), 0);
  for (std::int64_t n = 0; n < out; ++n) {
    for (std::int64_t k = 0; k < in; ++k) {
      const auto at = static_cast<std::size_t>(n * groups + coarse.group_of[static_cast<std::size_t>(k)]);
      unsigned code = random() % 16;
      if (std::uniform_real_distribution<double>()(random) < sparsity) code = zeros[at];
      exact[static_cast<std::size_t>(n * in + k)] = static_cast<double>(scales[at]) * (static_cast<int>(code) - zeros[at]);
      coarse.sizes[at] += std::fabs(exact[static_cast<std::size_t>(n * in + k)]);
      if (code != zeros[at]) bitmask[static_cast<std::size_t>(n * row_bytes + k / 8)] |= static_cast<std::uint8_t>(1u << (k % 8));
      if (dense || code != zeros[at]) codes.push_back(static_cast<std::uint8_t>(code));
    }
  }
  std::vector<std::uint8_t> values((codes.size() + 1) / 2, 0);
  for (std::size_t i = 0; i < codes.size(); ++i) values[i / 2] |= static_cast<std::uint8_t>(codes[i] << (i % 2 * 4));
  const Source source{dense ? ValueType::kInt4Dense : ValueType::kInt4, out, in, dense ? nullptr : bitmask.data(), bitmask.size(),
                      values.data(), values.size(), group_size, scales.data(), zeros.data(), scattered ? order.data() : nullptr};
  Aligned packed(packed_bytes(source));
  pack(source, packed.data, packed.size);
  const Weight w = open_packed(packed.data, packed.size);
  check_contents(w);
  std::vector<std::uint8_t> bits_again(bitmask.size()), values_again(values.size()), zeros_again(zeros.size());
  std::vector<float> scales_again(scales.size());
  unpack(w, {bits_again.data(), values_again.data(), scales_again.data(), zeros_again.data(), nullptr});
  if ((!dense && bits_again != bitmask) || values_again != values || scales_again != scales || zeros_again != zeros) {
    std::printf("int4 %lld x %lld is another after packing\n", static_cast<long long>(out), static_cast<long long>(in));
    ++failures;
  }
  for (const auto& level : kLevels) {
    for (const std::int64_t rows : {1, 2, 3, 8, 9, 32}) {
      const Kernel kernel = level.kernels->floats[index_of(w.type)];
      check<float>(level.name, value_layout(w.type).name, kernel, w, exact, rows, random, coarse, w.order);
    }
  }
}

void check_shape(std::int64_t out_features, std::int64_t in_features, double sparsity, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<double> uniform;
  const auto count = static_cast<std::size_t>(out_features * in_features);
  std::vector<std::uint16_t> bf16(count, 0);
  std::vector<std::int8_t> int8(count, 0);
  std::vector<double> bf16_exact(count, 0), int8_exact(count, 0);
  for (std::size_t i = 0; i < count; ++i) {
    if (uniform(random) < sparsity) continue;
    bf16[i] = to_bf16(normal(random));
    bf16_exact[i] = from_bf16(bf16[i]);
    int8[i] = static_cast<std::int8_t>(static_cast<int>(random() % 255) - 127);
    int8_exact[i] = int8[i];
  }
  for (const ValueType type : {ValueType::kBf16, ValueType::kInt8}) {
    const bool is_bf16 = type == ValueType::kBf16;
    const void* dense = is_bf16 ? static_cast<const void*>(bf16.data()) : int8.data();
    Aligned packed(packed_bytes(type, out_features, in_features,
                                count_nonzeros(type, dense, out_features, in_features, in_features)));
    pack_dense(type, dense, out_features, in_features, in_features, packed.data, packed.size);
    const Weight w = open_packed(packed.data, packed.size);
    check_contents(w);
    for (const auto& level : kLevels) {
      if (!level.kernels) {
        std::printf("%s is missing\n", level.name);
        ++failures;
        continue;
      }
      for (const std::int64_t rows : {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 23, 31, 32}) {
        const Kernel floats = level.kernels->floats[index_of(type)], own = level.kernels->own[index_of(type)];
        if (is_bf16) {
          check<float>(level.name, "bf16 x float", floats, w, bf16_exact, rows, random);
          check<std::uint16_t>(level.name, "bf16 x bf16", own, w, bf16_exact, rows, random);
        } else {
          check<float>(level.name, "int8 x float", floats, w, int8_exact, rows, random);
          check<std::int8_t>(level.name, "int8 x int8", own, w, int8_exact, rows, random);
        }
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::mt19937 random(argc > 1 ? static_cast<unsigned>(std::atoi(argv[1])) : 0);
  const std::int64_t shapes[][2] = {{1, 1}, {16, 32}, {17, 33}, {33, 64}, {48, 65}, {50, 200}, {15, 127}};
  for (const auto& shape : shapes) {
    for (const double sparsity : {0.0, 0.5, 0.7, 1.0}) check_shape(shape[0], shape[1], sparsity, random);
  }
  const std::int64_t int4_shapes[][3] = {{1, 1, 4}, {17, 33, 4}, {33, 64, 32}, {16, 70, 70}, {20, 200, 64}, {35, 260, 128}, {5, 300, 512}};
  for (const auto& shape : int4_shapes) {
    for (const double sparsity : {0.0, 0.5, 1.0}) {
      for (int kind = 0; kind < 4; ++kind) check_int4(shape[0], shape[1], shape[2], sparsity, kind & 1, kind & 2, random);
    }
  }
  std::printf("largest error %g of sum |x||w|, %d failures\n", worst, failures);
  return failures ? 1 : 0;
}
