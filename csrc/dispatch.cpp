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

#include "dispatch.h"

#include <atomic>
#include <stdexcept>

#include "cpu_features.h"

namespace peft_elastic {
namespace {

struct Level {
  const char* name;
  const Kernels* (*kernels)();
  std::vector<const char*> features;  // that the compiler was told to use in the file of the level
};

const std::vector<Level>& levels() {
  static const std::vector<Level> kLevels = {
      {"amx", &amx_kernels,
       {"amx_tile", "amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni", "avx512_vbmi2", "avx512vbmi", "avx512bw",
        "avx512vl", "avx512dq", "avx512f", "avx2", "fma", "bmi2", "popcnt"}},
      {"avx512_bf16", &avx512_bf16_kernels,
       {"avx512_bf16", "avx512_vnni", "avx512_vbmi2", "avx512vbmi", "avx512bw", "avx512vl", "avx512dq", "avx512f", "avx2",
        "fma", "bmi2", "popcnt"}},
      {"avx512", &avx512_kernels,
       {"avx512_vnni", "avx512_vbmi2", "avx512vbmi", "avx512bw", "avx512vl", "avx512dq", "avx512f", "avx2", "fma", "bmi2",
        "popcnt"}},
      {"avx2", &avx2_kernels, {"avx2", "fma", "bmi2", "popcnt"}},
      {"portable", &portable_kernels, {}},
  };
  return kLevels;
}

std::vector<std::string> missing_features(const Level& level) {
  static const CpuReport kCpu = detect_cpu();
  std::vector<std::string> missing;
  for (const char* needed : level.features) {
    bool found = false;
    for (const auto& [name, usable] : kCpu.features) found = found || (usable && name == needed);
    if (!found) missing.push_back(needed);
  }
  if (level.kernels == &amx_kernels && missing.empty() && !kCpu.amx_permitted) missing.push_back("amx_permitted");
  return missing;
}

bool is_usable(const Level& level) { return level.kernels() && missing_features(level).empty(); }

const Level* best_level() {
  for (const Level& level : levels()) {
    if (is_usable(level)) return &level;
  }
  throw std::logic_error("the portable level is always there");
}

std::atomic<const Level*>& selection() {
  static std::atomic<const Level*> selected{best_level()};
  return selected;
}

}  // namespace

std::vector<LevelStatus> level_statuses() {
  std::vector<LevelStatus> statuses;
  for (const Level& level : levels()) {
    statuses.push_back({level.name, level.kernels() != nullptr, is_usable(level), missing_features(level)});
  }
  return statuses;
}

std::string selected_level() { return selection().load()->name; }

const Kernels& selected_kernels() { return *selection().load()->kernels(); }

void select_level(const std::string& name) {
  if (name.empty()) {
    selection() = best_level();
    return;
  }
  std::string usable;
  for (const Level& level : levels()) {
    if (!is_usable(level)) continue;
    if (name == level.name) {
      selection() = &level;
      return;
    }
    usable += (usable.empty() ? "'" : ", '") + std::string(level.name) + "'";
  }
  throw std::invalid_argument("'" + name + "' is not an instruction set level that this build and machine can run: " + usable);
}

}  // namespace peft_elastic
