"""How the property tests of the engine run: the same examples each time, however long one takes."""

from hypothesis import HealthCheck, settings

REPEATABLE = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
