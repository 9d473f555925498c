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
"""The structure of transformers models: their blocks, heads and channels, how to narrow, skip, sort and extract them, and how
to feed calibration data through them block by block."""

from .blocks import Structure
from .folder import importance_of_folder, sort_folder
from .importance import sort_by_importance
from .layouts import AttentionLayout, BlockLayout, MLPLayout, register_layout, skip_attention, skip_to_zeros
from .scores import load_scores, save_scores


__all__ = [
    "AttentionLayout",
    "BlockLayout",
    "MLPLayout",
    "Structure",
    "importance_of_folder",
    "load_scores",
    "register_layout",
    "save_scores",
    "skip_attention",
    "skip_to_zeros",
    "sort_by_importance",
    "sort_folder",
]
