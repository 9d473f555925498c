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

// Would a layout of its own for N:M patterns pay on AVX2? With as many nonzeros behind each byte of the bitmap, the place of
// the values is a constant: no population count, no address that depends on the byte before. Batch 1, one thread, 50%:
//
//     expansion OUT IN COPIES ROUNDS
//
// prints one JSON object: seconds of each case by round. The cases take turns.

// Its tables and helpers. The kernel as it is comes from an object file of its own, compiled as it is for the package: inside of
// this file it would be compiled to something slower.
#define avx2_kernels avx2_kernels_of_this_file
#include "levels/avx2.cpp"
#undef avx2_kernels
namespace peft_elastic {
const Kernels* avx2_kernels();
}

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "pack.h"

namespace {

using namespace peft_elastic;

struct Free {
  void operator()(std::uint8_t* p) const { ::operator delete(p, std::align_val_t{64}); }
};
using Buffer = std::unique_ptr<std::uint8_t, Free>;

Buffer allocate(std::size_t bytes) {
  return Buffer(static_cast<std::uint8_t*>(::operator new(bytes, std::align_val_t{64})));
}

// A weight whose bitmap has 4 bits in each byte, 2 in each half: [8 outputs][groups of inputs][a byte for each output], where
// a byte is 8 inputs of bf16 (4:8 and 8:16, as 2:4 is both), or 4 inputs of two outputs (2:4).
struct Constant {
  Buffer bitmap, values;
};

enum class Pattern { k2of4, k4of8, k8of16 };

template <Pattern pattern>
void multiply_constant_bf16(const Constant& w, std::int64_t blocks, std::int64_t groups, const float* x, float* sums) {
  const std::uint8_t* bitmap = w.bitmap.get();
  const std::uint8_t* values = w.values.get();
  for (std::int64_t block = 0; block < blocks; ++block) {
    __m256 a0 = _mm256_setzero_ps(), a1 = a0, a2 = a0, a3 = a0, a4 = a0, a5 = a0, a6 = a0, a7 = a0;
    for (std::int64_t group = 0; group < groups; ++group, bitmap += 8, values += 64) {
      prefetch(values, kPrefetchDistance);
      const __m256 input = pattern == Pattern::k2of4 ? broadcast_group<ValueType::kInt8>(x + 4 * group)
                                                     : _mm256_loadu_ps(x + 8 * group);
      const auto weight = [&](int byte) __attribute__((always_inline)) {
        const std::size_t offset = static_cast<std::size_t>(bitmap[byte]) << 5;
        const auto* control = reinterpret_cast<const __m256i*>(&kShufflesBf16.of[0][0] + offset);
        __m256i packed;
        if (pattern == Pattern::k8of16 && byte % 2) {  // only every other byte has a place of its own
          const int before = 2 * static_cast<int>(_mm_popcnt_u64(bitmap[byte - 1]));
          packed = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values + 8 * (byte - 1) + before)));
        } else if (pattern == Pattern::k8of16) {
          packed = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values + 8 * byte)));
        } else {
          packed = _mm256_castpd_si256(_mm256_broadcast_sd(reinterpret_cast<const double*>(values + 8 * byte)));
        }
        return _mm256_castsi256_ps(_mm256_shuffle_epi8(packed, _mm256_load_si256(control)));
      };
      a0 = _mm256_fmadd_ps(weight(0), input, a0);
      a1 = _mm256_fmadd_ps(weight(1), input, a1);
      a2 = _mm256_fmadd_ps(weight(2), input, a2);
      a3 = _mm256_fmadd_ps(weight(3), input, a3);
      a4 = _mm256_fmadd_ps(weight(4), input, a4);
      a5 = _mm256_fmadd_ps(weight(5), input, a5);
      a6 = _mm256_fmadd_ps(weight(6), input, a6);
      a7 = _mm256_fmadd_ps(weight(7), input, a7);
    }
    const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(a0, a1), _mm256_hadd_ps(a2, a3));
    const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(a4, a5), _mm256_hadd_ps(a6, a7));
    _mm256_storeu_ps(sums + 16 * block, low);  // 4 sums in each half, which the sums of a real kernel would add or not
    _mm256_storeu_ps(sums + 16 * block + 8, high);
  }
}

// The kernel's own layout of int8: a byte is 4 inputs of two outputs, so that 2:4 has 4 values behind each.
void multiply_constant_int8(const Weight& w, const float* x, float* sums) {
  for (std::int64_t block = 0; block < w.blocks; ++block) {
    const std::uint8_t* bitmap = w.bitmaps + block * w.tiles * tile_bitmap_bytes(ValueType::kInt8);
    const std::uint8_t* values = w.values + w.offsets[block];
    __m256 a0 = _mm256_setzero_ps(), a1 = a0, a2 = a0, a3 = a0, a4 = a0, a5 = a0, a6 = a0, a7 = a0;
    const float* const end = x + w.tiles * 64;
    for (const float* inputs = x; inputs != end; inputs += 4, bitmap += 8, values += 32) {
      const __m256 input = broadcast_group<ValueType::kInt8>(inputs);
      const auto weight = [&](int byte) __attribute__((always_inline)) {
        int four;
        std::memcpy(&four, values + 4 * byte, sizeof(four));
        const std::size_t offset = static_cast<std::size_t>(bitmap[byte]) << 5;
        const auto* control = reinterpret_cast<const __m256i*>(&kShufflesInt8.of[0][0] + offset);
        return _mm256_cvtepi32_ps(_mm256_shuffle_epi8(_mm256_set1_epi32(four), _mm256_load_si256(control)));
      };
      a0 = _mm256_fmadd_ps(weight(0), input, a0);
      a1 = _mm256_fmadd_ps(weight(1), input, a1);
      a2 = _mm256_fmadd_ps(weight(2), input, a2);
      a3 = _mm256_fmadd_ps(weight(3), input, a3);
      a4 = _mm256_fmadd_ps(weight(4), input, a4);
      a5 = _mm256_fmadd_ps(weight(5), input, a5);
      a6 = _mm256_fmadd_ps(weight(6), input, a6);
      a7 = _mm256_fmadd_ps(weight(7), input, a7);
    }
    store_quads(a0, a1, a2, a3, sums + block * kBlock);
    store_quads(a4, a5, a6, a7, sums + block * kBlock + 8);
  }
}

// The total of all sums, which does not depend on how they are ordered, against double precision.
void check_constant(const Constant& w, std::int64_t bytes, bool pairs, std::int64_t groups, const float* x,
                    const std::vector<float>& sums) {
  double expected = 0, size = 0, total = 0;
  const auto* values = reinterpret_cast<const std::uint16_t*>(w.values.get());
  for (std::int64_t byte = 0; byte < bytes; ++byte) {
    const std::int64_t group = byte / 8 % groups;
    for (int bit = 0; bit < 8; ++bit) {
      if (!((w.bitmap.get()[byte] >> bit) & 1)) continue;
      const std::uint32_t widened = static_cast<std::uint32_t>(*values++) << 16;
      float value;
      std::memcpy(&value, &widened, sizeof(value));
      const double product = static_cast<double>(value) * (pairs ? x[4 * group + bit % 4] : x[8 * group + bit]);
      expected += product;
      size += std::fabs(product);
    }
  }
  for (float sum : sums) total += sum;
  if (!(std::fabs(total - expected) < 1e-5 * size)) {
    std::fprintf(stderr, "wrong: %g, expected %g\n", total, expected);
    std::exit(1);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) return 2;
  const std::int64_t out = std::atoll(argv[1]), in = std::atoll(argv[2]);
  const int copies = std::atoi(argv[3]), rounds = std::atoi(argv[4]);
  std::mt19937 random(1);
  std::vector<float> input(static_cast<std::size_t>(in));
  for (float& value : input) value = static_cast<float>(static_cast<int>(random() % 2001) - 1000) / 1000;
  Buffer x_buffer = allocate(static_cast<std::size_t>(in) * 4), sums_buffer = allocate(static_cast<std::size_t>(out) * 4);
  auto* const x = reinterpret_cast<float*>(x_buffer.get());
  auto* const sums = reinterpret_cast<float*>(sums_buffer.get());
  std::memcpy(x, input.data(), input.size() * 4);

  // The kernel as it is, on a 2:4 weight of each type.
  std::vector<Buffer> packed[2];
  std::size_t bytes[2];
  for (ValueType type : {ValueType::kBf16, ValueType::kInt8}) {
    const auto size = static_cast<std::size_t>(value_bytes(type));
    std::vector<std::uint8_t> dense(static_cast<std::size_t>(out * in) * size);
    for (std::size_t i = 0; i < dense.size(); i += 4 * size) {
      const unsigned first = random() % 4, second = (first + 1 + random() % 3) % 4;
      for (unsigned k : {first, second}) {
        dense[i + k * size] = static_cast<std::uint8_t>(1 + random() % 127);
        if (size == 2) dense[i + k * size + 1] = 0x3f;
      }
    }
    const std::int64_t nonzeros = count_nonzeros(type, dense.data(), out, in, in);
    const int index = type == ValueType::kInt8;
    bytes[index] = packed_bytes(type, out, in, nonzeros);
    for (int copy = 0; copy < copies; ++copy) {
      packed[index].push_back(allocate(bytes[index]));
      if (copy == 0) {
        pack_dense(type, dense.data(), out, in, in, packed[index][0].get(), bytes[index]);
      } else {
        std::memcpy(packed[index].back().get(), packed[index][0].get(), bytes[index]);
      }
    }
  }

  // As many nonzeros of bf16 in the layout with a constant stride.
  const std::int64_t bitmap_bytes = out * in / 8, groups8 = in / 8, groups4 = in / 4;
  static constexpr std::uint8_t kHalves[] = {3, 5, 6, 9, 10, 12};
  std::vector<Constant> constants;
  for (int copy = 0; copy < copies; ++copy) {
    Constant w{allocate(static_cast<std::size_t>(bitmap_bytes)), allocate(static_cast<std::size_t>(bitmap_bytes) * 8 + 64)};
    for (std::int64_t i = 0; i < bitmap_bytes; ++i) {
      w.bitmap.get()[i] = static_cast<std::uint8_t>(kHalves[random() % 6] | kHalves[random() % 6] << 4);
    }
    auto* values = reinterpret_cast<std::uint16_t*>(w.values.get());
    for (std::int64_t i = 0; i < bitmap_bytes * 4 + 32; ++i) values[i] = static_cast<std::uint16_t>(0x3f00 + random() % 128);
    constants.push_back(std::move(w));
  }
  std::vector<float> checked(static_cast<std::size_t>(out * 2));
  multiply_constant_bf16<Pattern::k4of8>(constants[0], out / 8, groups8, x, checked.data());
  check_constant(constants[0], bitmap_bytes, false, groups8, x, checked);
  multiply_constant_bf16<Pattern::k8of16>(constants[0], out / 8, groups8, x, checked.data());
  check_constant(constants[0], bitmap_bytes, false, groups8, x, checked);
  std::fill(checked.begin(), checked.end(), 0.0f);
  multiply_constant_bf16<Pattern::k2of4>(constants[0], out / 16, groups4, x, checked.data());
  check_constant(constants[0], bitmap_bytes, true, groups4, x, checked);
  std::vector<float> spare(static_cast<std::size_t>(out * 2)), expected(static_cast<std::size_t>(out));
  const Weight first = open_packed(packed[1][0].get(), bytes[1]);
  avx2_kernels()->floats[static_cast<int>(ValueType::kInt8)](first, x, in, 1, 0, first.blocks, sums, out, nullptr);
  std::memcpy(expected.data(), sums, expected.size() * 4);
  multiply_constant_int8(first, x, sums);
  if (std::memcmp(expected.data(), sums, expected.size() * 4) != 0) return 1;

  const auto open = [&](int index, int copy) { return open_packed(packed[index][static_cast<std::size_t>(copy)].get(), bytes[index]); };
  const auto constant = [&](int copy) -> const Constant& { return constants[static_cast<std::size_t>(copy)]; };
  struct Case {
    std::string name;
    std::function<void(int)> run;
    std::vector<double> seconds;
  };
  Case cases[] = {
      {"bf16", [&](int copy) { const Weight w = open(0, copy); avx2_kernels()->floats[static_cast<int>(ValueType::kBf16)](w, x, in, 1, 0, w.blocks, sums, out, nullptr); }, {}},
      {"bf16 2:4", [&](int copy) { multiply_constant_bf16<Pattern::k2of4>(constant(copy), out / 16, groups4, x, spare.data()); }, {}},
      {"bf16 4:8", [&](int copy) { multiply_constant_bf16<Pattern::k4of8>(constant(copy), out / 8, groups8, x, spare.data()); }, {}},
      {"bf16 8:16", [&](int copy) { multiply_constant_bf16<Pattern::k8of16>(constant(copy), out / 8, groups8, x, spare.data()); }, {}},
      {"int8", [&](int copy) { const Weight w = open(1, copy); avx2_kernels()->floats[static_cast<int>(ValueType::kInt8)](w, x, in, 1, 0, w.blocks, sums, out, nullptr); }, {}},
      {"int8 2:4", [&](int copy) { multiply_constant_int8(open(1, copy), x, sums); }, {}},
  };
  for (int round = 0; round < rounds; ++round) {
    for (Case& each : cases) {
      const auto start = std::chrono::steady_clock::now();
      each.run(round % copies);
      each.seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
  }
  std::printf("{");
  for (const Case& each : cases) {
    std::printf("%s\"%s\": [", &each == cases ? "" : ", ", each.name.c_str());
    for (std::size_t i = 0; i < each.seconds.size(); ++i) std::printf("%s%.9f", i ? ", " : "", each.seconds[i]);
    std::printf("]");
  }
  std::printf("}\n");
}
