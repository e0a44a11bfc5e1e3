"""A turn that was given and not taken is not given again at once: nobody waits for one who cannot run."""

FIRST_PASS_STEPS = 2
MOST_PASS_STEPS = 256


class RefusedTurns:
    """Which requests had a turn and did not run, and for how many steps each is passed over; twice as many each time.

    vLLM may find at the last moment that a request cannot run (a connector that cannot say yet what it brings, an
    encoder's budget that others have used): what no predicate can know, one lost step tells.
    """

    def __init__(self) -> None:
        self._steps: dict[str, int] = {}
        self._until: dict[str, int] = {}

    def note(self, request_id: str, ran: bool, step: int) -> None:
        """Note whether a request that others yielded to ran in a step."""
        if ran:
            self.forget(request_id)
            return
        steps = min(MOST_PASS_STEPS, 2 * self._steps.get(request_id, FIRST_PASS_STEPS // 2))
        self._steps[request_id] = steps
        self._until[request_id] = step + steps

    def is_passed_over(self, request_id: str, step: int) -> bool:
        """True where a request is not to be given a turn in a step."""
        return step < self._until.get(request_id, step)

    def forget(self, request_id: str) -> None:
        """Forget a request: it ran, or it has ended."""
        self._steps.pop(request_id, None)
        self._until.pop(request_id, None)
