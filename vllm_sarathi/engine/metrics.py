"""Our figures at the server's own /metrics.

The engine core runs in a process of its own, and vLLM's statistics carry no figures of ours from there to the API
server. So the engine core leaves them in a small file, in a folder that the API server made and named in the
environment, and the API server reads it when /metrics is asked for. With several API servers (`--api-server-count`)
vLLM builds a registry of its own at every request, and ours are in the log and in the step trace only.
"""

import atexit
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from vllm_sarathi.core.files import write_whole

FOLDER_VARIABLE = "SARATHI_METRICS_FOLDER"

GAUGES = {
    "tbt_slo_seconds": "Promised time between tokens.",
    "promise_unkeepable": "1 where decodes alone take longer than promised.",
    "decode_step_seconds": "Median time of a step of decodes alone, in the latest ten seconds of work.",
    "token_budget": "Median budget of the steps that read prompts beside decodes, in the latest ten seconds of work.",
    "prediction_error_ratio": "Median relative error of the predicted times of such steps.",
}
COUNTERS = {
    "steps": "Steps that the scheduler saw end.",
    "gaps": "Gaps between tokens that the scheduler saw end under a promise.",
    "gaps_kept": "Those of them that kept the promise.",
    "faults": "Errors of the plugin in the engine's loop; stock scheduling served those steps.",
}
PREFIX = "vllm_sarathi_"


class FiguresCollector:
    """A Prometheus collector of the figures that the engine cores of this process have left in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def describe(self) -> tuple[()]:
        """Return nothing: then the registry does not look before there is something to see."""
        return ()

    def collect(self) -> Iterator[Any]:
        """Yield each figure with the rank of its engine."""
        # Imported here: vLLM brings it, and this module is loaded in processes that have no vLLM.
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        engines = self._read()
        for family, names in ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS)):
            for name, documentation in names.items():
                metric = family(PREFIX + name, documentation, labels=["engine"])
                for rank, figures in engines.items():
                    if isinstance(value := figures.get(name), int | float):
                        metric.add_metric([rank], value)
                yield metric

    def _read(self) -> dict[str, dict[str, Any]]:
        engines = {}
        for path in sorted(self.folder.glob("*.json")):
            with suppress(OSError, ValueError):  # ended meanwhile
                engines[path.stem] = json.loads(path.read_text(encoding="utf-8"))
        return engines


@functools.cache
def serve_figures() -> None:
    """Have this process show the figures of the engine cores that it will start; calling it again does nothing.

    A folder that the environment names already is that of a process that started this one, for its own engines.
    """
    # Imported here: as above.
    from prometheus_client import REGISTRY

    folder = Path(tempfile.mkdtemp(prefix="vllm-sarathi-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ[FOLDER_VARIABLE] = str(folder)
    REGISTRY.register(FiguresCollector(folder))


def leave_figures(rank: int, figures: dict[str, float | None]) -> None:
    """Leave the figures where the process that started this one finds them, if it looks for any.

    Raises:
        OSError: the folder is gone or full.
    """
    if folder := os.environ.get(FOLDER_VARIABLE):
        write_whole(Path(folder) / f"{rank}.json", json.dumps(figures))
