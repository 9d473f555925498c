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

// Where the sections of a packed weight lie.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "format.h"

namespace peft_elastic {

constexpr char kMagic[8] = {'P', 'E', 'F', 'T', 'E', 'L', 'S', '1'};

[[noreturn]] inline void fail(const std::string& message) { throw std::invalid_argument(message); }

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// What a header says of a weight.
struct Shape {
  ValueType type;
  std::int64_t out_features, in_features, nonzeros;
  std::int64_t value_count;     // items in the section of the values
  std::int64_t group_size = 0;  // int4 only
  bool has_order = false;
};

struct Layout {
  std::int64_t blocks, tiles, group_count;
  std::size_t offsets_at, bitmaps_at, groups_at, order_at, values_at, total;
};

// Throws std::invalid_argument if the numbers are out of range or do not fit together.
Layout layout_of(const Shape& shape);

// Writes the header, and zeros between the sections.
void write_header(const Shape& shape, const Layout& layout, std::uint8_t* packed);

}  // namespace peft_elastic
