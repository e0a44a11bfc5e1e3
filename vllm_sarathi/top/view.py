"""What two scrapes say of the time between them, as plain values and for a terminal."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vllm_sarathi.core.figures import DEFAULT_CLASS, PREFIX
from vllm_sarathi.top.scrape import Scrape, finite, printable

Number = float | None


@dataclass(frozen=True)
class SloFigures:
    """How a kind of SLO was kept between two scrapes.

    Attributes:
        per_s: how many came under the SLO in a second.
        kept: the share of them that kept it; None without any.
        kept_since_start: the same since the server started.
        ratio_p50, ratio_p99: the time over its SLO, estimated from the buckets; None without any.
    """

    per_s: Number
    kept: Number
    kept_since_start: Number
    ratio_p50: Number
    ratio_p99: Number


@dataclass(frozen=True)
class ClassView:
    """One class of requests of one engine; counts are since the server started."""

    unattainable: bool | None
    waiting: Number
    relegated: Number
    refused: Number
    gaps: SloFigures
    first_tokens: SloFigures


@dataclass(frozen=True)
class EngineView:
    """One engine; rates are of the time between two scrapes."""

    running: Number
    waiting: Number
    tbt_slo_s: Number
    ttft_slo_s: Number
    unattainable: bool | None
    decode_step_s: Number
    token_budget: Number
    prediction_error: Number
    prediction_bias: Number
    headroom_tokens_per_s: Number
    prefill_tokens_per_s: Number
    generated_tokens_per_s: Number
    steps_per_s: Number
    kv_cache_usage: Number
    faults: Number
    classes: dict[str, ClassView] = field(default_factory=dict)


@dataclass(frozen=True)
class View:
    """A server.

    Attributes:
        url: where its figures are.
        interval_s: the time between the scrapes, seconds.
        engines: by rank.
    """

    url: str
    interval_s: float
    engines: dict[str, EngineView]

    def to_mapping(self) -> dict[str, Any]:
        """Return it as plain values, for JSON: no NaN in it."""
        return asdict(self)


class _Between:
    """Answers of two scrapes of the same server."""

    def __init__(self, before: Scrape, after: Scrape) -> None:
        self.before, self.after = before, after
        self.interval_s = max(after.at_s - before.at_s, 1e-9)

    def gained(self, name: str, **labels: str) -> Number:
        """Return by how much a counter rose; one that fell belongs to a server that has started anew."""
        new, old = self.after.total(name, **labels), self.before.total(name, **labels)
        if new is None:
            return None
        return new if old is None or new < old else finite(new - old)

    def rate(self, name: str, **labels: str) -> Number:
        """Return by how much a counter rose in a second."""
        return _share(self.gained(name, **labels), self.interval_s)

    def quantile(self, histogram: str, share: float, **labels: str) -> Number:
        """Return a quantile of what fell into a histogram between the scrapes, interpolated in its bucket.

        That of values beyond the last bound is the last bound, as in Prometheus.
        """
        bounds = {float(own["le"]): own["le"] for own, _ in self.after.of(f"{histogram}_bucket", **labels)}
        counts = [
            (bound, self.gained(f"{histogram}_bucket", **labels, le=text) or 0.0)
            for bound, text in sorted(bounds.items())
        ]
        if not counts or counts[-1][1] <= 0:
            return None
        wanted, low, below = share * counts[-1][1], 0.0, 0.0
        for bound, count in counts:
            if count >= wanted:
                if bound == math.inf:
                    return low
                return low + (bound - low) * (wanted - below) / max(count - below, 1e-9)
            low, below = bound, count
        return low


def compare(url: str, before: Scrape, after: Scrape) -> View:
    """Return what happened between two scrapes."""
    between = _Between(before, after)
    engines = {rank: _engine(between, rank) for rank in after.label_values("engine")}
    return View(url, between.interval_s, engines)


def _engine(between: _Between, rank: str) -> EngineView:
    def now(name: str) -> Number:
        return between.after.total(PREFIX + name, engine=rank)

    predicted = between.gained(f"{PREFIX}step_predicted_seconds_total", engine=rank)
    measured = between.gained(f"{PREFIX}step_measured_seconds_total", engine=rank)
    return EngineView(
        running=now("running_requests"),
        waiting=now("waiting_requests"),
        tbt_slo_s=now("tbt_slo_seconds"),
        ttft_slo_s=now("ttft_slo_seconds"),
        unattainable=_true(now("slo_unattainable")),
        decode_step_s=now("decode_step_seconds"),
        token_budget=now("token_budget"),
        prediction_error=now("prediction_error_ratio"),
        prediction_bias=_share(measured, predicted),
        headroom_tokens_per_s=now("headroom_tokens_per_second"),
        prefill_tokens_per_s=between.rate(f"{PREFIX}prefill_tokens_total", engine=rank),
        generated_tokens_per_s=between.rate("vllm:generation_tokens_total", engine=rank),
        steps_per_s=between.rate(f"{PREFIX}steps_total", engine=rank),
        kv_cache_usage=between.after.total("vllm:kv_cache_usage_perc", engine=rank),
        faults=now("faults_total"),
        classes={
            name: _class(between, rank, name) for name in between.after.label_values("slo_class", engine=rank)
        },
    )


def _class(between: _Between, rank: str, name: str) -> ClassView:
    def now(figure: str) -> Number:
        return between.after.total(PREFIX + figure, engine=rank, slo_class=name)

    return ClassView(
        unattainable=_true(now("slo_unattainable")),
        waiting=now("waiting_requests"),
        relegated=now("relegated_requests_total"),
        refused=now("refused_requests_total"),
        gaps=_slo_figures(between, rank, name, "gaps", "time_between_tokens_slo_ratio"),
        first_tokens=_slo_figures(between, rank, name, "first_tokens", "time_to_first_token_slo_ratio"),
    )


def _slo_figures(between: _Between, rank: str, name: str, counter: str, histogram: str) -> SloFigures:
    labels = {"engine": rank, "slo_class": name}
    all_name, kept_name = f"{PREFIX}{counter}_total", f"{PREFIX}{counter}_kept_total"
    return SloFigures(
        per_s=between.rate(all_name, **labels),
        kept=_share(between.gained(kept_name, **labels), between.gained(all_name, **labels)),
        kept_since_start=_share(
            between.after.total(kept_name, **labels), between.after.total(all_name, **labels)
        ),
        ratio_p50=between.quantile(PREFIX + histogram, 0.5, **labels),
        ratio_p99=between.quantile(PREFIX + histogram, 0.99, **labels),
    )


def _true(value: Number) -> bool | None:
    return None if value is None else value > 0


def _share(part: Number, whole: Number) -> Number:
    return finite(part / whole) if part is not None and whole else None


def render(view: View) -> RenderableType:
    """Return a view for a terminal of 80 columns or more."""
    parts: list[RenderableType] = [Text(f"{view.url}, {view.interval_s:.1f} s", style="dim")]
    for rank, engine in view.engines.items():
        parts += [_engine_text(rank, engine), _classes_table(engine)]
    return Group(*parts)


def _engine_text(rank: str, engine: EngineView) -> Text:
    text = Text()
    text.append(f"engine {printable(rank)}", style="bold")
    text.append(f"  {_number(engine.running)} running, {_number(engine.waiting)} waiting, ")
    text.append(f"KV {_percent(engine.kv_cache_usage)}, {_number(engine.steps_per_s)} steps/s, ")
    text.append(f"{_number(engine.faults)} faults\n", style="bold red" if engine.faults else "")
    slo = f"  SLO {_number(engine.tbt_slo_s, 1e3)} ms, decodes alone {_number(engine.decode_step_s, 1e3)} ms"
    text.append(slo)
    if engine.unattainable:
        broken = [
            name for name, each in engine.classes.items() if each.unattainable and name != DEFAULT_CLASS
        ]
        whose = f" ({printable(', '.join(broken))})" if broken else ""
        text.append(f": cannot be kept{whose}", style="bold red")
    text.append(f"\n  budget {_number(engine.token_budget)}, error {_percent(engine.prediction_error)}, ")
    text.append(f"measured/predicted {_times(engine.prediction_bias)}\n")
    text.append(f"  prompts {_number(engine.prefill_tokens_per_s)} tokens/s, ")
    spent = engine.headroom_tokens_per_s == 0
    text.append(f"headroom {_number(engine.headroom_tokens_per_s)}", style="bold yellow" if spent else "")
    text.append(f", answers {_number(engine.generated_tokens_per_s)} tokens/s")
    return text


def _classes_table(engine: EngineView) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    for name in ("class", "wait", "gaps/s", "kept", "P99", "first kept", "P99", "relegated", "refused"):
        table.add_column(
            name, justify="left" if name == "class" else "right", no_wrap=name != "class", overflow="fold"
        )
    for name, each in engine.classes.items():
        table.add_row(
            Text(printable(name)),  # a table would take a plain string for markup
            _number(each.waiting),
            _number(each.gaps.per_s),
            _kept(each.gaps.kept),
            _times(each.gaps.ratio_p99),
            _kept(each.first_tokens.kept),
            _times(each.first_tokens.ratio_p99),
            _number(each.relegated),
            _number(each.refused),
        )
    return table


def _kept(share: Number) -> Text:
    return Text(_percent(share), style="" if share is None or share >= 0.99 else "bold red")


def _number(value: Number, factor: float = 1.0) -> str:
    if value is None:
        return "-"
    value *= factor
    return f"{value:,.0f}" if abs(value) >= 100 or value == round(value) else f"{value:.3g}"


def _percent(share: Number) -> str:
    return "-" if share is None else f"{share:.1%}"


def _times(ratio: Number) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"
