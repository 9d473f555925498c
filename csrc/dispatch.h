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

// The levels (instruction sets) of the kernels, and which one is in use.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace peft_elastic {

struct LevelStatus {
  std::string name;
  bool built;                        // this build has it
  bool usable;                       // built, and this processor and system can run it
  std::vector<std::string> missing;  // features of the processor that it lacks
};

// Best first.
std::vector<LevelStatus> level_statuses();

// The best usable level unless another was selected.
std::string selected_level();
const Kernels& selected_kernels();

// By name; an empty name selects the best usable level. Throws std::invalid_argument that lists the usable levels.
void select_level(const std::string& name);

}  // namespace peft_elastic
