# Copyright 2026 The peft-elastic authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The methods that `prune` knows, by name."""

from __future__ import annotations

from ..common.registry import Registry


# A method prunes layers in place and returns the number of calibration tokens: f(model, layers, config, calibration, progress).
PRUNING_METHODS = Registry()
pruning_method = PRUNING_METHODS.register
