"""Whose code and objects are a library's, and whose the user's."""

import site
import sys
import sysconfig
from types import CodeType, FrameType, ModuleType, TracebackType
from typing import Any
from weakref import WeakKeyDictionary

from autolrs_plugin.training.slots import slot_names

SKIPPED = {
    *(
        "autolrs_plugin",
        "logging",
        "threading",
        "multiprocessing",
        "concurrent",
        "asyncio",
        "io",
        "weakref",
        "types",
    ),
    *(
        "rich",
        "tqdm",
        "wandb",
        "tensorboard",
        "lightning",
        "pytorch_lightning",
        "accelerate",
        "ray",
        "pyarrow",
    ),
    *(
        "pytest",
        "_pytest",
        "unittest",
        "inspect",
        "socket",
        "subprocess",
        "pathlib",
        "enum",
        "re",
        "matplotlib",
    ),
}
"""Packages whose objects hold nothing of a job that is not reached in another way."""

INSIDE = {
    "concurrent.futures._base": "_result",
    "multiprocessing.sharedctypes": "_obj",
    "multiprocessing.shared_memory": "_buf",
}
"""Modules of those packages whose objects hold one thing for others, and the attribute that has it."""

STATEFUL = (
    *("torch.distributed.algorithms", "torch.distributed.optim"),
    *("lightning.fabric.wrappers", "lightning_fabric.wrappers"),
)
"""Modules among those skipped or only walked whose objects have a state of their own: hooks of DistributedDataParallel
with their memory of gradients, averagers of weights, loaders that count their epochs."""

PLAINLY = ("asyncio.queues", "asyncio.locks")
"""Modules among those skipped whose objects hold their state in their attributes."""

COUNTING = ("accelerate.", "lightning.fabric.", "lightning_fabric.")
"""Modules among those skipped whose objects count steps and batches, and hold in their numbers all that counts."""

TORCHS_OWN = ("torch.nn.parallel", "torch.distributed", "torch._dynamo", "torch.fx")
"""Wrappers whose attributes mirror objects that cannot be set back; for what of them matters see WrapperSlots."""

WALKED_ONLY = (
    *TORCHS_OWN,
    *("torch.nn", "torch.optim", "torch.utils", "torch.cuda", "torch.autograd", "torch.profiler", "torch._"),
    *("transformers.trainer", "trl"),
)
"""Modules whose objects are looked through, and have no state that is not reached in another way."""

STREAMS = ("datasets.",)
"""Modules whose load_state_dict() tells where the next iterator begins: what the one in use has come to is in their
attributes."""

CACHES = (
    *("pandas._libs.index", "pandas._libs.hashtable", "pandas._libs.internals.BlockPlacement"),
    "_thread._local",
)
"""Types of C whose fields are filled when they are first needed, and tell nothing beside the attributes."""

_LIBRARIES = (
    *(sysconfig.get_paths()[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")),
    *(site.getusersitepackages(), "<frozen"),
)


def is_users(thing: Any) -> bool:
    """Tell whether a module, class, function or code is the user's own, and not a library's."""
    if isinstance(thing, CodeType):
        return not thing.co_filename.startswith(_LIBRARIES)
    name = getattr(thing, "__name__" if isinstance(thing, ModuleType) else "__module__", None) or ""
    if not isinstance(name, str) or name.partition(".")[0] in SKIPPED:
        return False
    module = thing if isinstance(thing, ModuleType) else sys.modules.get(name)
    file = getattr(module, "__file__", None)
    if name == "__main__":
        return True
    if file is not None:
        return not file.startswith(_LIBRARIES)
    code = getattr(thing, "__code__", None)  # of a script that was run by exec() or a loader of its own
    if isinstance(code, CodeType):
        return is_users(code)
    return bool(name) and module is None


def is_opaque(value: Any) -> bool:
    """Tell whether an object has fields of C, its own or of a base, of which only the garbage collector knows."""
    kind = type(value)
    if kind not in _opaque:
        named = (f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__)
        known = issubclass(kind, _NEVER_OPAQUE) or any(name.startswith(_KNOWN) for name in named)
        _opaque[kind] = not known and _has_fields(kind)
    return _opaque[kind]


_KNOWN = (*WALKED_ONLY, *CACHES)
_NEVER_OPAQUE = (BaseException, FrameType, TracebackType, CodeType)
_opaque: WeakKeyDictionary[type, bool] = WeakKeyDictionary()
"""By type, as every look at a job asks it of each object."""


def _has_fields(kind: type) -> bool:
    """Tell whether objects of a class are larger than attributes and slots make them."""
    places = [kind.__dictoffset__, kind.__weakrefoffset__, *[1] * len(slot_names(kind))]
    size = object.__basicsize__ + tuple.__itemsize__ * sum(place > 0 for place in places)
    return kind.__basicsize__ > size or kind.__itemsize__ > 0
