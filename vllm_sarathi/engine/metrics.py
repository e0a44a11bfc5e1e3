"""Our figures at the server's own /metrics, whatever number of processes serves it.

They arise in the engine core's process; /metrics is answered by the API server's, of which there may be several. Of the
ways between them that vLLM and Prometheus support, this is prometheus_client's multiprocess mode: each process leaves
files in a folder, and whoever is asked sums up all of them.

- With several API servers vLLM uses that mode itself, so that each of them shows all that is in the folder of
  PROMETHEUS_MULTIPROC_DIR. An engine's file there is shown like an API server's, with no part of ours in between, and
  each engine of a data-parallel group has its own.
- With one API server there is no such folder; we make one, and register prometheus_client's collector for it beside
  vLLM's own metrics.
- The Ray executor places workers, not the scheduler: nothing changes. Data-parallel engines that Ray places are told of
  the folder by vLLM, which hands on what VLLM_RAY_EXTRA_ENV_VARS_TO_COPY names. An engine on another machine than the
  API server has no folder in common with it, and says so in its log: scrape the server on that machine, too
  (`--data-parallel-hybrid-lb`, `--data-parallel-external-lb`).

A stat logger (`vllm.stat_logger_plugins`) would not do. It lives in the API server and is handed vLLM's own statistics,
which carry no figures of others across and go to one API server of several; they name no request, so nothing in them is
by class; and where one is installed vLLM gathers statistics even if told `--disable-log-stats`.

prometheus_client writes through memory maps; a full disk under one ends the process with SIGBUS, which here would be
the engine. So the files, which have prometheus_client's format, are written whole, once a second, and a failure leaves
the last ones. A folder that somebody has deleted meanwhile is made again.

What is not ours to extend: the figures in a response (`--enable-per-request-metrics`) and the attributes of vLLM's
tracing spans are made in the API server from vLLM's statistics, and no plugin is asked.
"""

import atexit
import functools
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterable
from pathlib import Path

from vllm_sarathi.core.figures import PREFIX, Kind, Sample
from vllm_sarathi.core.files import write_whole
from vllm_sarathi.engine.vllm.internals import logger

FOLDER_VARIABLE = "SARATHI_METRICS_FOLDER"
SHARED_FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
RAY_COPIES_VARIABLE = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"

FILE_PREFIXES = {Kind.COUNTER: "counter", Kind.GAUGE: "gauge_mostrecent", Kind.HISTOGRAM: "histogram"}
"""How prometheus_client knows what a file holds, and how to sum it up."""

HEADER = struct.Struct("i4x")
LENGTH = struct.Struct("i")
VALUE_AND_TIME = struct.Struct("dd")
ALIGNMENT = 8


@functools.cache
def serve_figures() -> None:
    """Have this process show the figures of the engine cores that it will start; calling it again does nothing.

    A folder of ours that the environment names already is that of a process that started this one, for its own engines.
    """
    copied = [name for name in os.environ.get(RAY_COPIES_VARIABLE, "").split(",") if name]
    if FOLDER_VARIABLE not in copied:
        os.environ[RAY_COPIES_VARIABLE] = ",".join([*copied, FOLDER_VARIABLE])
    shared = os.environ.get(SHARED_FOLDER_VARIABLE)
    if shared:
        os.environ[FOLDER_VARIABLE] = shared
        return
    # Imported here: vLLM brings it, and this module is loaded in processes that have no vLLM.
    from prometheus_client import REGISTRY
    from prometheus_client.multiprocess import MultiProcessCollector

    folder = tempfile.mkdtemp(prefix="vllm-sarathi-")
    atexit.register(_remove, folder)
    os.environ[FOLDER_VARIABLE] = folder
    REGISTRY.register(MultiProcessCollector(None, folder))  # type: ignore[no-untyped-call]


def _remove(folder: str) -> None:
    """Remove a folder of ours at the end of its process; an engine inside that process makes it no more."""
    os.environ.pop(FOLDER_VARIABLE, None)
    shutil.rmtree(folder, ignore_errors=True)


def figures_folder() -> Path | None:
    """Return the folder in which the process that started this one looks for figures; None where it does not look."""
    named = os.environ.get(FOLDER_VARIABLE)
    return Path(named) if named else None


class FiguresFiles:
    """The files of one engine.

    Args:
        folder: where they go.
        rank: which of several data-parallel engines this is.
        pid: of the engine's process: a new one of the same rank goes on beside the old one's counters.
    """

    def __init__(self, folder: Path, rank: int, pid: int) -> None:
        self._folder = folder
        self._rank = str(rank)
        self._owner = f"sarathi{rank}-{pid}"
        self._stands_still = False

    def renew(self, samples: Iterable[Sample], at_s: float) -> None:
        """Write all figures anew; where that fails, say so once, until they can be written again.

        Args: as of `write`.
        """
        folder = self._folder
        try:
            if not folder.exists() and folder == figures_folder():
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                logger.warning("The folder of the metrics at /metrics was deleted: %s is made again.", folder)
            self.write(samples, at_s)
            self._stands_still = False
        except OSError as error:
            if not self._stands_still and folder == figures_folder():
                logger.warning(
                    "The metrics of engine %s at /metrics are no longer updated: %s cannot be written (%s).",
                    self._rank,
                    folder,
                    error.strerror,
                )
            self._stands_still = True

    def write(self, samples: Iterable[Sample], at_s: float) -> None:
        """Write all figures anew.

        Args:
            samples: all of them.
            at_s: seconds since the epoch.

        Raises:
            OSError: the folder is gone or full.
        """
        by_kind: dict[Kind, list[Sample]] = {kind: [] for kind in Kind}
        for sample in samples:
            by_kind[sample.figure.kind].append(sample)
        for kind, own in by_kind.items():
            data = encode([(self._key(sample), sample.value, at_s) for sample in own])
            write_whole(self._folder / f"{FILE_PREFIXES[kind]}_{self._owner}.db", data, lasting=False)

    def _key(self, sample: Sample) -> str:
        name = PREFIX + sample.figure.name
        labels = {"engine": self._rank, **dict(sample.labels)}
        return json.dumps([name, name + sample.suffix, labels, sample.figure.help], sort_keys=True)


def encode(entries: Iterable[tuple[str, float, float]]) -> bytes:
    """Return keys, values and times (seconds since the epoch) as prometheus_client reads them from a file.

    The bytes in use, then for each entry the length of its key, the key padded to eight bytes, value and time (see
    `prometheus_client.mmap_dict.MmapedDict`).
    """
    parts = []
    for key, value, at_s in entries:
        encoded = key.encode()
        padded = encoded + b" " * (ALIGNMENT - (len(encoded) + LENGTH.size) % ALIGNMENT)
        parts.append(LENGTH.pack(len(encoded)) + padded + VALUE_AND_TIME.pack(value, at_s))
    body = b"".join(parts)
    return HEADER.pack(HEADER.size + len(body)) + body
