"""Where step times come from, as every answer that rests on them says it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Source:
    """Where step times come from.

    Attributes:
        kind: `measured` (kernel times), `interpolated` (also, but tables were missing), `roofline` (a data sheet),
            or `calibrated` (steps measured here).
        detail: which tables, which data sheet.
        warnings: what a reader should know before trusting them; sentences.
    """

    kind: str
    detail: str
    warnings: tuple[str, ...] = ()

    @property
    def lines(self) -> tuple[str, ...]:
        """What to print beside an answer."""
        return (f"step times: {self.kind}, {self.detail}", *(f"warning: {text}" for text in self.warnings))
