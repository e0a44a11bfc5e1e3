"""A server's /metrics, fetched and read: the only thing that `top` touches."""

import http.client
import math
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from vllm_sarathi.core.figures import PREFIX

MOST_BYTES = 64 * 2**20
MOST_QUOTED = 160
"""Characters of a page that a sentence quotes: what is no page of figures may be one long line."""

Labels = Mapping[str, str]


class TopError(RuntimeError):
    """What a user can cause: a wrong URL, a server without our figures; the message is one sentence."""


def finite(value: float) -> float | None:
    """Return a number, or None for what is none."""
    return value if math.isfinite(value) else None


def printable(text: str) -> str:
    """Return a text with what could move a terminal's cursor, or cannot be written, replaced."""
    return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text)


@dataclass(frozen=True)
class Scrape:
    """What a server showed at a moment.

    Attributes:
        at_s: when, seconds on a monotonic clock.
        samples: the numbers of each metric, with their labels.
    """

    at_s: float
    samples: Mapping[str, list[tuple[Labels, float]]]

    def of(self, name: str, **labels: str) -> Iterator[tuple[Labels, float]]:
        """Yield the samples of a metric that have these labels."""
        for own, value in self.samples.get(name, ()):
            if all(own.get(key) == wanted for key, wanted in labels.items()):
                yield own, value

    def total(self, name: str, **labels: str) -> float | None:
        """Return the sum of those samples; None where there are none, or they are no numbers."""
        values = [value for _, value in self.of(name, **labels)]
        return finite(sum(values)) if values else None

    def label_values(self, label: str, **labels: str) -> list[str]:
        """Return the values of a label among the samples of ours."""
        found = {
            own[label]
            for name, samples in self.samples.items()
            if name.startswith(PREFIX)
            for own, _ in samples
            if label in own and all(own.get(key) == wanted for key, wanted in labels.items())
        }
        return sorted(found, key=lambda text: (len(text), text))


def metrics_url(text: str) -> str:
    """Return the address of /metrics of the server that a user names: `host:8000`, or a URL of it.

    Raises:
        TopError: it is no address of an HTTP server.
    """
    try:
        url = urllib.parse.urlsplit(text if "//" in text else f"http://{text}")
        usable = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # a port that is no number, half of an IPv6 address
        usable = False
    if "@" in text:  # urllib would take it for a part of the host's name; and a password is not repeated
        raise TopError("the URL must be the address of a server alone, without a user's name and password.")
    if not usable or any(c.isspace() for c in text):
        raise TopError(f"{text!r}: must be the address of a server, such as http://127.0.0.1:8000.")
    path = url.path.rstrip("/")
    if not path.endswith("/metrics"):
        path += "/metrics"
    return urllib.parse.urlunsplit((url.scheme, url.netloc, path, url.query, ""))


def fetch(url: str, timeout_s: float) -> str:
    """Return the text at the address of a /metrics.

    Raises:
        TopError: it cannot be had.
    """
    # A proxy of the environment's would be asked for loopback addresses, too.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=timeout_s) as answer:
            body: bytes = answer.read(MOST_BYTES + 1)
            missing = 0 if len(body) > MOST_BYTES else answer.length
    except urllib.error.HTTPError as error:
        raise TopError(f"{url}: the server answers {error.code} {printable(str(error.reason))}.") from error
    except urllib.error.URLError as error:
        raise TopError(f"{url}: cannot be reached ({_reason(error.reason)}).") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise TopError(f"{url}: cannot be read ({_reason(error)}).") from error
    if len(body) > MOST_BYTES:
        raise TopError(f"{url}: is longer than {MOST_BYTES // 2**20} MiB, too long for /metrics.")
    if missing:
        raise TopError(f"{url}: cannot be read (it ends too soon).")
    return body.decode(errors="replace")


def _reason(error: object) -> str:
    return printable(str(getattr(error, "strerror", None) or error or type(error).__name__))[:MOST_QUOTED]


def parse(text: str, url: str, at_s: float) -> Scrape:
    """Return what an exposition says.

    Raises:
        TopError: it is none, or of a server without our figures.
    """
    # Imported here: `--help` does not need it.
    from prometheus_client.parser import text_string_to_metric_families

    samples: dict[str, list[tuple[Labels, float]]] = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                _check_bucket(sample.name, sample.labels)
                samples.setdefault(sample.name, []).append((sample.labels, sample.value))
    except (ValueError, IndexError, KeyError) as error:
        why = printable(str(error) or type(error).__name__)
        why = why if len(why) <= MOST_QUOTED else why[:MOST_QUOTED] + "..."
        raise TopError(f"{url}: is not in Prometheus's text format ({why}).") from error
    if not any(name.startswith(PREFIX) for name in samples):
        what = "a vLLM server" if any(name.startswith("vllm:") for name in samples) else "not a vLLM server's"
        raise TopError(
            f"{url}: has no figures of vllm-sarathi ({what}); start it with vllm serve --scheduler sarathi, and "
            "without --disable-log-stats."
        )
    return Scrape(at_s, samples)


def _check_bucket(name: str, labels: Labels) -> None:
    """Raise ValueError where a bucket of ours has no bound that is a number."""
    if not (name.startswith(PREFIX) and name.endswith("_bucket")):
        return
    text = labels.get("le")
    try:
        valid = text is not None and not math.isnan(float(text))
    except ValueError:
        valid = False
    if not valid:
        raise ValueError(f"{name} has le={text!r}, which must be a number")
