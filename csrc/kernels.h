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
// What a level (an instruction set) provides. A level's file is pure: pointers, sizes and a range of blocks in, sums out. It
// does not allocate, start threads, throw, or call anything but memcpy; threads, checks, bias, scales and dispatch live
// above it (linear.cpp, decode.cpp, effective.cpp). Nor does it define a function that another file could get instead of its
// own, as the linker keeps one of several: whatever it shares with other levels is in an unnamed namespace or inlined.
#pragma once

#include <cstdint>

#include "floats.h"
#include "format.h"
#include "levels/levels.h"
#include "values/values.h"

namespace peft_elastic {

// sums[row * sums_stride + 16 * block + n] = sum over k of x[row, k] * W[16 * block + n, k], for first <= block < last.
//
// x: rows (1 .. kMaxRows) of x_stride elements, zero behind in_features up to the end of the last tile. Its type is that of
// the kernel: float, bf16 (uint16_t) or int8. Values of int8 weights enter as whole numbers; scales are applied above. Those of
// int4 weights are applied here, group by group; x is in the order of the tiles (Weight::order).
// sums: float, aligned to 64 bytes, and so is sums_stride (a multiple of 16). scratch: kScratchBytes, aligned to 64.
using Kernel = void (*)(const Weight& weight, const void* x, std::int64_t x_stride, std::int64_t rows, std::int64_t first,
                        std::int64_t last, float* sums, std::int64_t sums_stride, void* scratch);

constexpr std::size_t kScratchBytes = 512 * 1024;

// One query for each head of each row, over the positions of a cache. first, last: of the batch * heads queries.
struct Attention {
  const float* queries;      // [batch, heads, head_dim]
  const void *keys, *values;  // [batch, kv_heads, capacity, head_dim]
  const std::uint8_t* mask;  // [batch, count], 0 where a position is hidden; null: all are seen
  std::int64_t batch, heads, kv_heads, head_dim, count, capacity, scores_stride;
  float scaling;
  float* scores;   // [batch * heads][scores_stride]: `count` scores, then `head_dim` sums
  void* output;    // [batch, heads, head_dim]
  FloatType type;  // of keys, values and output: float32 or bfloat16
};
using Attend = void (*)(const Attention& job, std::int64_t first, std::int64_t last);

// y = x W^T + b with a dense W, for few rows of x: as fast as W comes from memory. first, last: of the out_features.
struct DenseProduct {
  const float* x;  // [rows, in_features]
  std::int64_t rows, out_features, in_features;
  const void* weight;  // [out_features, in_features]
  const void* bias;    // [out_features] or null
  float* y;            // [rows, out_features]
  FloatType type, bias_type;  // float32 or bfloat16
};
using MultiplyDense = void (*)(const DenseProduct& job, std::int64_t first, std::int64_t last);

// For each element of a panel [rows, columns], which holds the update D on entry:
//
//   panel = W + D, or W + D where W is not zero and 0 elsewhere (masked); just the (masked) D without `add`;
//   panel = s (clamp(round(panel / s) + z, 0, top) - z) with scales; rounding half to even, as torch does.
//
// slopes, if not null: 1 where the result follows D, 0 where it is constant (masked or clamped).
struct EffectivePanel {
  const void* weight;  // float32 or bfloat16 [rows, columns], weight_stride elements from one row to the next
  FloatType weight_type;
  std::int64_t rows, columns, weight_stride;
  float* panel;   // contiguous
  float* slopes;  // contiguous or null
  bool masked, add;
  const float* scales;  // [rows, columns / group_size] or null
  const float* zeros;   // of that shape
  std::int64_t group_size;
  float top;
  int threads;
};
// first, last: of the rows.
using Fill = void (*)(const EffectivePanel& job, std::int64_t first, std::int64_t last);

// What a level has no faster way for, it takes from the table of another that needs no more instructions than it has itself.
struct Kernels {
  // By the type of the weight's values. Null: the portable level's is used, which has those of every type.
  Kernel floats[kValueTypes];  // float activations
  Kernel own[kValueTypes];     // activations of the values' own type. bf16: if null, the caller widens them. int8: all in
                               // -127 .. 127, and the sum is exact (32 bits) before it becomes float. int4: none
  Attend attend;
  MultiplyDense dense;
  Fill fill;  // of the same bits on every level
};

// portable_kernels() and so on, one for each level. Null where the compiler or its target has none of these instructions; the
// portable level is always there.
#define PEFT_ELASTIC_DECLARE(name, features, needs_permission) const Kernels* name##_kernels();
PEFT_ELASTIC_LEVELS(PEFT_ELASTIC_DECLARE)
#undef PEFT_ELASTIC_DECLARE

}  // namespace peft_elastic
