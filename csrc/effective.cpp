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

#include "effective.h"

#include <algorithm>
#include <stdexcept>

#include "threads.h"

namespace peft_elastic {
void effective_panel(const EffectivePanel& call, const Kernels& kernels) {
  if (call.rows < 0 || call.columns < 0 || call.weight_stride < call.columns) {
    throw std::invalid_argument("the panel has no such rows and columns");
  }
  if (call.weight_type == FloatType::kFloat16) throw std::invalid_argument("a weight in float16 is not provided for");
  if (call.scales && (!call.zeros || call.group_size < 1 || call.columns % call.group_size)) {
    throw std::invalid_argument("the groups do not fit the columns");
  }
  const auto parts = static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>(call.threads, call.rows)));
  run_ranges(parts, call.rows, kernels.fill, call);
}

}  // namespace peft_elastic
