"""The policies, which plan each step: a file each, whose name with dashes is the policy's.

A file offers `make`, a `PolicyMaker`. `--scheduler`, the simulator and the tables take the names from here.
"""

import pkgutil

_FILES = sorted(
    (info.name for info in pkgutil.iter_modules(__path__)), key=lambda name: (name != "sarathi", name)
)

POLICIES = {name.replace("_", "-"): f"{__name__}.{name}" for name in _FILES}
"""Name to module, ours before those to compare with. None is imported: names are needed where numpy must not be."""
