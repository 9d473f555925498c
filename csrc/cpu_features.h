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

// What the processor can do and the operating system allows. Plain C++17: knows neither Python nor torch.

#pragma once

#include <cstddef>
#include <string>
#include <utility>
#include <vector>

namespace peft_elastic {

struct CpuReport {
  std::string architecture;  // "x86_64", "aarch64", ...; "unknown" where the compiler does not say
  std::string vendor;        // "GenuineIntel", "AuthenticAMD", ...; empty off x86
  std::string brand;         // the marketing name; empty off x86
  // The names are those of Linux' /proc/cpuinfo. True only where the processor has the instructions *and* the operating
  // system saves the registers they use (XCR0), so that executing one cannot fault; all false off x86. AMX tile data
  // needs `amx_permitted` too.
  std::vector<std::pair<std::string, bool>> features;
  bool amx_permitted = false;  // whether this process may use the AMX tile registers; false without AMX
  // Bytes of one cache of each level; 0 where unknown.
  std::size_t l1d_bytes = 0;
  std::size_t l2_bytes = 0;
  std::size_t l3_bytes = 0;
};

// On Linux with AMX, the first call asks the kernel for the tile registers on behalf of the process, as any user of
// them has to; a refusal changes nothing.
CpuReport detect_cpu();

// What compiled this extension: "gcc 12.2.0", "clang 17.0.6", "msvc 1938", ...
std::string compiler_name();

}  // namespace peft_elastic
