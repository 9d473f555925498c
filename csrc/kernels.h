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
// above it (linear.cpp).
#pragma once

#include <cstdint>

#include "format.h"

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

struct Kernels {
  Kernel bf16_float;  // bf16 weight, float activations
  Kernel bf16_bf16;   // bf16 weight, bf16 activations; null: the caller widens the activations
  Kernel int8_float;  // int8 weight, float activations
  Kernel int8_int8;   // int8 weight and activations, both in -127 .. 127; the sum is exact (32 bits) before it becomes float;
                      // null: the portable level's is used
  Kernel int4_float;        // int4 weight, float activations
  Kernel int4_dense_float;  // dense int4 weight, float activations
};

const Kernels* portable_kernels();
// Null where the compiler or its target has none of these instructions.
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512_bf16_kernels();
const Kernels* amx_kernels();

}  // namespace peft_elastic
