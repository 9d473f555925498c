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
#include <sstream>
#include <stdexcept>

#include "cpu_features.h"

namespace peft_elastic {
namespace {

struct Level {
  const char* name;
  const Kernels* (*kernels)();
  const char* features;   // that its file is compiled for
  bool needs_permission;  // to use the tile registers
};

constexpr Level kLevels[] = {
#define PEFT_ELASTIC_LEVEL(name, features, needs_permission) {#name, &name##_kernels, features, needs_permission},
    PEFT_ELASTIC_LEVELS(PEFT_ELASTIC_LEVEL)
#undef PEFT_ELASTIC_LEVEL
};

std::vector<std::string> missing_features(const Level& level) {
  static const CpuReport kCpu = detect_cpu();
  std::vector<std::string> missing;
  std::istringstream features(level.features);
  for (std::string needed; features >> needed;) {
    bool found = false;
    for (const auto& [name, usable] : kCpu.features) found = found || (usable && name == needed);
    if (!found) missing.push_back(needed);
  }
  if (level.needs_permission && missing.empty() && !kCpu.amx_permitted) missing.push_back("amx_permitted");
  return missing;
}

bool is_usable(const Level& level) { return level.kernels() && missing_features(level).empty(); }

const Level* best_level() {
  for (const Level& level : kLevels) {
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
  for (const Level& level : kLevels) {
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
  for (const Level& level : kLevels) {
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
