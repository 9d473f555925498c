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

// The types of activations; bfloat16 and the bits of a float, as loops over them become vectors.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__GNUC__)
#define PE_INLINE inline __attribute__((always_inline))
#else
#define PE_INLINE inline
#endif

namespace peft_elastic {

enum class FloatType : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

PE_INLINE float bits_to_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

PE_INLINE std::uint32_t float_to_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

PE_INLINE float widen_bf16(std::uint16_t value) { return bits_to_float(static_cast<std::uint32_t>(value) << 16); }

// To nearest, ties to even; NaN stays NaN.
PE_INLINE std::uint16_t round_to_bf16(float value) {
  const std::uint32_t bits = float_to_bits(value);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
}

}  // namespace peft_elastic
