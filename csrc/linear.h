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

// y = x W^T + b with a packed W: checks, threads, conversions, scales and bias around the kernels of a level.
#pragma once

#include <cstddef>
#include <cstdint>

#include "format.h"
#include "kernels.h"

namespace peft_elastic {

struct LinearCall {
  Weight weight;
  const void* x;  // [rows, in_features], x_stride elements from one row to the next
  FloatType x_type;
  std::int64_t rows, x_stride;
  const float* scales;  // [out_features], int8 weights only
  const void* bias;     // [out_features] or null
  FloatType bias_type;
  void* y;  // [rows, out_features], contiguous
  FloatType y_type;
  int threads;
  bool int8_activations;  // int8 weights only: each row of x is rounded to int8, symmetric, scale max |x| / 127
};

// Throws std::bad_alloc; nothing else once the call is in order.
void linear(const LinearCall& call, const Kernels& kernels);

// The dense rows first_row .. first_row + rows of the weight, scaled, as y_type: [rows, in_features], contiguous.
void dense_rows(const Weight& weight, const float* scales, std::int64_t first_row, std::int64_t rows, void* target,
                FloatType type, int threads);

}  // namespace peft_elastic
