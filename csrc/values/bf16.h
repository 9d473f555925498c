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

#pragma once

#include <cstdint>

#include "floats.h"
#include "values/plain.h"

namespace peft_elastic {

struct Bf16 : PlainValues<Bf16, std::uint16_t> {
  static constexpr ValueType kType = ValueType::kBf16;
  static constexpr ValueLayout kLayout = {"bf16", 2, 32, 2, 64, false, false};

  static bool is_stored(Value value) { return (value & 0x7fffu) != 0; }  // zeros of either sign are dropped
  static const char* fault(Value value) { return is_stored(value) ? nullptr : "a stored value is zero"; }
  static constexpr bool kDenseMayBeFaulty = false;
  static PE_INLINE float widen(Value value) { return widen_bf16(value); }
};

}  // namespace peft_elastic
