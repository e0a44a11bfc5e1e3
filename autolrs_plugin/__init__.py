"""AutoLRS: finds the learning rate while training, stage by stage, and counts what the search costs.

`AutoLRS` is imported on first use, so that `import autolrs_plugin` needs no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autolrs_plugin.integrations.torch_loop import AutoLRS

    __version__: str

__all__ = ["AutoLRS", "__version__"]


def __getattr__(name: str) -> Any:
    # Imported here, not above: torch takes seconds and may not be installed.
    if name == "AutoLRS":
        from autolrs_plugin.integrations.torch_loop import AutoLRS

        return AutoLRS
    if name == "__version__":
        # pyproject.toml alone states it; what was installed is asked.
        from importlib.metadata import version

        return version("vllm-sarathi")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
