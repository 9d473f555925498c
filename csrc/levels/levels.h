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

// The list of levels, best first: dispatch.cpp chooses among them, kernels.h declares a table of kernels for each, and setup.py
// compiles levels/NAME.cpp for the features that are named here, and for nothing else.
//
// LEVEL(name, features, needs permission): features of the processor as cpu_features.h names them; the permission is that
// for the tile registers (CpuReport::amx_permitted).
#pragma once

#ifndef PEFT_ELASTIC_MORE_LEVELS
#define PEFT_ELASTIC_MORE_LEVELS(LEVEL)  // those of a test
#endif

#define PEFT_ELASTIC_LEVELS(LEVEL)                                                                                         \
  PEFT_ELASTIC_MORE_LEVELS(LEVEL)                                                                                          \
  LEVEL(amx,                                                                                                               \
        "amx_tile amx_bf16 amx_int8 avx512_bf16 avx512_vnni avx512_vbmi2 avx512vbmi avx512bw avx512vl avx512dq avx512f "   \
        "avx2 fma bmi2 popcnt",                                                                                            \
        true)                                                                                                              \
  LEVEL(avx512_bf16,                                                                                                       \
        "avx512_bf16 avx512_vnni avx512_vbmi2 avx512vbmi avx512bw avx512vl avx512dq avx512f avx2 fma bmi2 popcnt", false)  \
  LEVEL(avx512, "avx512_vnni avx512_vbmi2 avx512vbmi avx512bw avx512vl avx512dq avx512f avx2 fma bmi2 popcnt", false)      \
  LEVEL(avx2, "avx2 fma bmi2 popcnt", false)                                                                               \
  LEVEL(portable, "", false)
