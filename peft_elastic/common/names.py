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
"""Names of modules, as lists of suffixes mean them."""

from __future__ import annotations


def has_suffix(name: str, suffix: str) -> bool:
    """Whether a dotted name is `suffix` or ends with it at a dot: "layers.0.q_proj" has the suffix "q_proj", and "0.q_proj"."""
    return name == suffix or name.endswith(f".{suffix}")
