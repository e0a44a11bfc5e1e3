"""Who plans each step: each file here is a policy, and its name is the file's, with dashes.

A file offers `make`, a `PolicyMaker`. `--scheduler`, the simulator and the tables take the names from here.
"""

import pkgutil

POLICIES = {info.name.replace("_", "-"): f"{__name__}.{info.name}" for info in pkgutil.iter_modules(__path__)}
"""Name to module. None of them is imported here: the names are needed where numpy must not be loaded."""
