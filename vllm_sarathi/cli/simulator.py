"""`vllm-sarathi bench simulator`."""

from rich.console import Console

from vllm_sarathi.cli.options import FiguresOption


def simulator(json: FiguresOption = None) -> None:
    """Measure the simulator: steps a second, a long run, and how long a query for a step's time takes."""
    from vllm_sarathi.benchmark.common.results import write_rows
    from vllm_sarathi.benchmark.profile import speed

    rows, queries = speed.measure_speed(), speed.measure_queries()
    Console().print(speed.speed_table(rows))
    Console().print(speed.query_table(queries))
    write_rows([*rows, *queries], json)
