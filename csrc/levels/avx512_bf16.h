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

// The dot product of bf16 (VDPBF16PS), for the levels that have it.
#pragma once

#include "levels/avx512.h"

namespace peft_elastic {
namespace {

struct Bf16Bf16 {
  static constexpr ValueType kType = ValueType::kBf16;
  using Input = std::uint16_t;
  using Sum = __m512;
  using Row = __m512i;
  static std::int32_t offset_of(const Input*, std::int64_t) { return 0; }
  static PE_INLINE Sum start(std::int32_t) { return _mm512_setzero_ps(); }
  static PE_INLINE Row prepare(__m512i row) { return row; }
  static PE_INLINE Sum add(Sum sum, const Row& row, const Input* x) {
    std::int32_t pair;
    std::memcpy(&pair, x, sizeof(pair));
    return _mm512_dpbf16_ps(sum, (__m512bh)row, (__m512bh)_mm512_set1_epi32(pair));
  }
  static PE_INLINE Sum join(Sum a, Sum b) { return _mm512_add_ps(a, b); }
  static PE_INLINE __m512 finish(Sum sum) { return sum; }
};

}  // namespace
}  // namespace peft_elastic
