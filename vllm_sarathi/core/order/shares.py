"""Shares of the tenants of a class, by start-time fair queueing (Goyal, Vin and Cheng, 1996) of the prefill time.

A request gets a tag when it arrives, and those of a class are prefilled by their tags:

    tag    = max(V - CREDIT_S, end of the tenant's last request)
    end    = tag + seconds to prefill the request
    V      = the least tag of those that are there; it never falls

If two tenants always have work, neither gets more than CREDIT_S plus the time of one prompt of each ahead of the other.
CREDIT_S is what a tenant that has asked for less than its share may have at once when it comes back: it then goes
before the tenant that floods, and not only beside it.

A tenant that is held back because more of its requests run than its share is charged for that time as if it had been
prefilled. Otherwise V would stand still meanwhile, and all others would soon have had more than it.
"""

CREDIT_S = 2.0
"""Seconds of prefill; a tenant that is owed more is not owed more."""

REMEMBERED_S = 120.0
"""A tenant that has asked for nothing for this time counts no more among those that a class is shared by."""

MOST_TENANTS = 4096
"""Names of tenants come from outside: of more than this in a class, those that are owed most are forgotten first."""


class Shares:
    """Hands out the tags of one class."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._ends: dict[str, float] = {}
        self._paid_s: dict[str, float] = {}
        self._asked_s: dict[str, float] = {}

    def tag(self, tenant: str, prefill_s: float, wall_s: float = 0.0) -> float:
        """Return the tag of a request whose prefill takes `prefill_s` seconds, and charge the tenant for it."""
        self._asked_s.pop(tenant, None)
        self._asked_s[tenant] = wall_s  # the last to ask stands last
        earliest_s = self.now_s - CREDIT_S - self._paid_s.get(tenant, 0.0)
        tag_s = max(earliest_s, self._ends.get(tenant, earliest_s))
        self._ends[tenant] = tag_s + prefill_s
        if len(self._ends) > MOST_TENANTS:
            self._forget()
        return tag_s

    def pay(self, tenant: str, seconds: float) -> None:
        """Charge a tenant for time in which it was kept from the device: all of its tags go back so far."""
        if tenant in self._ends:
            self._paid_s[tenant] = self._paid_s.get(tenant, 0.0) + seconds

    def place(self, tenant: str, tag_s: float) -> float:
        """Return where a tag stands beside those of other tenants."""
        return tag_s + self._paid_s.get(tenant, 0.0)

    def seen(self, least_tag_s: float) -> None:
        """Note the least tag of those that are there."""
        self.now_s = max(self.now_s, least_tag_s)

    def is_owed(self, tag_s: float) -> bool:
        """True for a request that the class has passed by already: its tenant has had less than its share."""
        return tag_s < self.now_s

    def is_beyond(self, tag_s: float) -> bool:
        """True for a request beyond its tenant's share: it goes first where not all can be kept."""
        return tag_s > self.now_s + CREDIT_S

    def tenants(self, wall_s: float) -> int:
        """Return how many tenants have asked for something lately."""
        while self._asked_s:
            first = next(iter(self._asked_s))
            if wall_s - self._asked_s[first] <= REMEMBERED_S and len(self._asked_s) <= MOST_TENANTS:
                break
            del self._asked_s[first]
        return len(self._asked_s)

    def _forget(self) -> None:
        """Drop the tenants to whom a tag would be given as if they were new; then those that are nearest to it."""
        earliest_s = self.now_s - CREDIT_S
        ends = {name: self.place(name, end_s) for name, end_s in self._ends.items()}
        owing = [name for name in sorted(ends, key=ends.__getitem__) if ends[name] > earliest_s]
        kept = set(owing[max(0, len(owing) - MOST_TENANTS) :])
        self._ends = {name: end_s for name, end_s in self._ends.items() if name in kept}
        self._paid_s = {name: paid_s for name, paid_s in self._paid_s.items() if name in kept}
