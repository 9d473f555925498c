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

// What the format asks of a type of values in numbers: enough for those who only read a packed weight, as the levels do.
#pragma once

#include <cstdint>

#include "format.h"

namespace peft_elastic {

struct ValueLayout {
  const char* name;
  std::int64_t value_bytes;        // what offsets count: of a value, or 1 where a value has less than a byte
  std::int64_t tile_inputs;        // of a tile
  std::int64_t group_inputs;       // of one output in a row of a tile
  std::int64_t tile_bitmap_bytes;  // 0: every value is stored
  bool has_groups;                 // with scales and zeros inside of the weight
  bool has_row_scales;             // a scale for each output, beside the weight
};

}  // namespace peft_elastic
