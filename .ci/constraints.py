"""Prints constraints.txt for the environment it runs in: every installed package at its version.

    python .ci/constraints.py > constraints.txt

A package that does not run on the oldest Python that we support is pinned on newer ones only.
"""

from importlib.metadata import distributions

from packaging.specifiers import SpecifierSet
from packaging.version import Version


OLDEST = "3.10"
OWN = {"peft-elastic", "pip"}

print("# Versions that the tests pass with; made by .ci/constraints.py. Only what is installed anyway is constrained.")
for dist in sorted(distributions(), key=lambda dist: dist.name.lower()):
    if dist.name.lower().replace("_", "-") in OWN:
        continue
    requires = SpecifierSet(dist.metadata.get("Requires-Python", ""))
    marker = ""
    if f"{OLDEST}.99" not in requires:
        oldest = next(f"3.{minor}" for minor in range(11, 100) if f"3.{minor}.99" in requires)
        marker = f'; python_version >= "{oldest}"'
    print(f"{dist.name}=={Version(dist.version).public}{marker}")
