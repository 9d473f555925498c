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

#include "values/plain.h"

namespace peft_elastic {

// Symmetric: a weight is its value times the scale of its output.
struct Int8 : PlainValues<Int8, std::int8_t> {
  static constexpr ValueType kType = ValueType::kInt8;
  static constexpr ValueLayout kLayout = {"int8", 1, 64, 4, 128, false, true};

  static bool is_stored(Value value) { return value != 0; }
  static const char* fault(Value value) {
    return value == 0 ? "a stored value is zero" : value == -128 ? "an int8 value is -128, allowed are -127 to 127" : nullptr;
  }
  static constexpr bool kDenseMayBeFaulty = true;
  static PE_INLINE std::int32_t widen(Value value) { return value; }
};

}  // namespace peft_elastic
