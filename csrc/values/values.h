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

// The types of values. Each is a struct that says what differs (bf16.h, int8.h, int4.h):
//
//   kType, kLayout     its number in the header of a packed weight, and what the format asks for
//   Value, kNone       of the expanded weight, and what stands where no value is stored
//   is_stored          whether an expanded value is one that is stored
//   load, store, bytes_of, kWholeBytes        on disk: one value; the bytes of so many, each of whole ones or not
//   compress_row, expand_row, count_of, fits  in memory: a row of a tile; what rows take in the offsets; what they can take
//   fault, widen, kDenseMayBeFaulty           of those without groups: why a value must not be there, or null; as a number
//
// What is done with weights is written once, as a template over these (pack.cpp, linear.cpp).
#pragma once

#include <cstdint>

#include "values/bf16.h"
#include "values/int4.h"
#include "values/int8.h"

namespace peft_elastic {

// By ValueType.
constexpr ValueLayout kValueLayouts[] = {Bf16::kLayout, Int8::kLayout, Int4::kLayout, Int4Dense::kLayout};
static_assert(sizeof(kValueLayouts) / sizeof(kValueLayouts[0]) == kValueTypes, "one for each");

// static, so that no level's instructions end up in a function that the linker merges with another's
static constexpr int index_of(ValueType type) { return static_cast<int>(type); }
static constexpr bool is_value_type(ValueType type) { return static_cast<std::uint32_t>(type) < kValueTypes; }
static constexpr const ValueLayout& value_layout(ValueType type) { return kValueLayouts[index_of(type)]; }
static constexpr std::int64_t value_bytes(ValueType type) { return value_layout(type).value_bytes; }
static constexpr std::int64_t tile_inputs(ValueType type) { return value_layout(type).tile_inputs; }
static constexpr std::int64_t group_inputs(ValueType type) { return value_layout(type).group_inputs; }
static constexpr std::int64_t tile_bitmap_bytes(ValueType type) { return value_layout(type).tile_bitmap_bytes; }

// use(Bf16{}) or that of another type, and its result.
template <typename Use>
auto with_value_type(ValueType type, Use use) {
  switch (type) {
    case ValueType::kBf16: return use(Bf16{});
    case ValueType::kInt8: return use(Int8{});
    case ValueType::kInt4: return use(Int4{});
    default: return use(Int4Dense{});
  }
}

}  // namespace peft_elastic
