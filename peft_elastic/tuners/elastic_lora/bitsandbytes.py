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
"""LoRA on 4 bits of bitsandbytes. Importing this module imports bitsandbytes."""

from __future__ import annotations

from typing import Optional

from peft.tuners.lora import bnb

from ...layers.backends.bitsandbytes import unpack


class Linear4bit(bnb.Linear4bit):
    """peft's layer, for a base whose weight may be in the order of bitsandbytes' inference on CPUs."""

    def merge(self, safe_merge: bool = False, adapter_names: Optional[list[str]] = None) -> None:
        unpack(self.get_base_layer())
        super().merge(safe_merge, adapter_names)

    def unmerge(self) -> None:
        unpack(self.get_base_layer())
        super().unmerge()
