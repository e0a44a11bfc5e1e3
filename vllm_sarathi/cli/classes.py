"""`vllm-sarathi bench classes`."""

import functools
from typing import Annotated

import typer
from rich.console import Console

from vllm_sarathi.cli.devices import SeedSetOption, seeds_of
from vllm_sarathi.cli.options import JsonOption, RayOption, read_names


def classes(
    questions: Annotated[str, typer.Option(help="mixed, beside, tenants, refusal; default: all.")] = "",
    deployment: Annotated[str, typer.Option(help="MODEL/DEVICE, as in `bench devices`.")] = "",
    requests: Annotated[int, typer.Option(help="Requests in a run.")] = 400,
    seeds: Annotated[int, typer.Option(help="Runs with different requests.")] = 1,
    seed_set: SeedSetOption = "judging",
    tolerance: Annotated[
        float, typer.Option(help="Accuracy of the searches, as a fraction of the rate.")
    ] = 0.05,
    ttft_slo_ms: Annotated[
        float, typer.Option(help="SLO for the time to first token of tenants and refusal, ms.")
    ] = 2000.0,
    ray: RayOption = None,
    json: JsonOption = None,
) -> None:
    """Judge SLO classes on a device with measured kernel times: goodput, batch work, tenants, refusals."""
    from vllm_sarathi.benchmark.capacity import classes as benchmark
    from vllm_sarathi.benchmark.capacity.search import check_requests
    from vllm_sarathi.benchmark.common import farm, results
    from vllm_sarathi.core.classes import slo_ms
    from vllm_sarathi.core.config import check_positive

    check_requests(requests, least=20)
    numbers = seeds_of(seed_set, seeds)
    check_positive("tolerance", tolerance, 1.0)
    slo_ms(ttft_slo_ms, "--ttft-slo-ms")
    asked = read_names(questions) or tuple(benchmark.QUESTIONS)
    place = deployment or benchmark.DEPLOYMENT
    cells = benchmark.cells_of(asked, place, numbers, requests, tolerance, ttft_slo_ms)
    console = Console()
    rows: list[benchmark.Row] = []

    def done(index: int, row: benchmark.Row) -> None:
        rows.append(row)
        results.write_rows(rows, json)

    run_all = functools.partial(farm.run_all, console=console, ray=ray, done=done)
    answers = run_all(benchmark.ask, cells)
    results.write_rows(answers, json)
    for question in asked:
        console.print(benchmark.question_table(question, answers))
