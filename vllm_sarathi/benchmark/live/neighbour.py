"""A neighbour on the machine: a process that keeps one core busy for some seconds, and rests for as many."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

BUSY_S = 5.0
"""How long it works, and how long it rests."""

_CODE = """
import sys, time
busy_s = float(sys.argv[1])
while True:
    end_s = time.monotonic() + busy_s
    while time.monotonic() < end_s:
        pass
    time.sleep(busy_s)
"""


@contextmanager
def busy_neighbour(busy_s: float = BUSY_S) -> Iterator[int]:
    """Have one as long as the context lasts; yields its process id."""
    process = subprocess.Popen(
        [sys.executable, "-c", _CODE, str(busy_s)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()
