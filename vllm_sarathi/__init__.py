"""An SLO-aware scheduler for vLLM, after Sarathi-Serve (arXiv 2403.02310).

Public names are imported on first use, so that `import vllm_sarathi` needs neither vLLM nor torch:
`SarathiScheduler` (the class to name in `scheduler_cls`), `SarathiConfig` (its settings) and `SarathiMixin` (to put
before another scheduler).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_sarathi.core.config import SarathiConfig
    from vllm_sarathi.engine.scheduler import SarathiMixin, SarathiScheduler

    __version__: str

__all__ = ["SarathiConfig", "SarathiMixin", "SarathiScheduler", "__version__"]


def __getattr__(name: str) -> Any:
    # Imported here, not above: the scheduler needs vLLM, which takes seconds and may not be installed.
    if name in ("SarathiMixin", "SarathiScheduler"):
        from vllm_sarathi.engine import scheduler

        return getattr(scheduler, name)
    if name == "SarathiConfig":
        from vllm_sarathi.core.config import SarathiConfig

        return SarathiConfig
    if name == "__version__":
        # pyproject.toml alone states it; what was installed is asked.
        from importlib.metadata import version

        return version("vllm-sarathi")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
