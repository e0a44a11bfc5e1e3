"""Ray Serve LLM with vllm-sarathi: the scheduler by `engine_kwargs`, as many replicas as the headroom asks for.

pip install 'vllm-sarathi[vllm]' 'ray[serve,llm]'
python examples/ray_serve.py --model MODEL --tbt-slo-ms 100

On a machine without a GPU add `--cpus 1`. On a cluster: `ray job submit --working-dir examples -- python ray_serve.py`
and its options. Each replica gets a GPU, and Ray starts nodes for those that find none. The engine's other options are
in ENGINE.
"""

import argparse
import logging
import time
from collections import Counter
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingContext
from ray.serve.llm import LLMConfig, build_openai_app
from ray.serve.llm.deployment import LLMServer

from vllm_sarathi import SarathiConfig
from vllm_sarathi.core.headroom import replicas_wanted
from vllm_sarathi.engine.metrics import serve_figures

ENGINE: dict[str, Any] = {"max_model_len": 4096}
"""What vLLM's engine is started with, beside the scheduler."""

HEADROOM = "vllm_sarathi_headroom_tokens_per_second"
POLICY = "ray_serve:HeadroomPolicy"
"""By name: the replicas look it up again, and of a script's own module there is nothing to be found there."""


class SarathiServer(LLMServer):  # type: ignore[misc]  # Ray has no types
    """A replica that tells Ray's autoscaler what it reads, and what more it could read within the SLO."""

    async def __init__(self, *args: Any, **kwargs: Any) -> None:
        serve_figures()  # before the engine starts: it leaves its figures where this process looks for them
        self._seen = (0.0, time.monotonic())
        await super().__init__(*args, **kwargs)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return tokens per second; Ray calls this every few seconds."""
        # Imported here: Ray sends this class to its workers by value, and the registry holds a lock.
        from prometheus_client import REGISTRY

        figures: Counter[str] = Counter()
        for metric in REGISTRY.collect():
            for sample in metric.samples:
                figures[sample.name] += sample.value
        # Batch work gives way, and calls for no replica.
        read = (
            figures["vllm_sarathi_prefill_tokens_total"] - figures["vllm_sarathi_batch_prefill_tokens_total"]
        )
        waiting = figures["vllm_sarathi_waiting_requests"] - figures["vllm_sarathi_batch_waiting_requests"]
        now_s = time.monotonic()
        (before, before_s), self._seen = self._seen, (read, now_s)
        told = {"waiting": waiting}
        if HEADROOM in figures:  # it is missing until the first steps have been seen
            told["headroom"], told["read"] = figures[HEADROOM], (read - before) / max(1e-3, now_s - before_s)
        return told


class HeadroomPolicy:
    """Asks for as many replicas as what all of them read is worth, at what one can read within the SLO.

    Args:
        full: so much of what the replicas can read is used before there is one more.
    """

    def __init__(self, full: float) -> None:
        self._full = full

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Return how many replicas are wanted; Ray waits until that has been so for a while (its delays)."""
        told = {name: context.aggregated_metrics.get(name, {}) for name in ("read", "headroom", "waiting")}
        read = told["read"]
        wanted = replicas_wanted([*read.values()], [told["headroom"][name] for name in read], self._full)
        if wanted is None:
            stuck = sum(told["waiting"].values()) > 0
            wanted = context.current_num_replicas + 1 if stuck else context.target_num_replicas
        lowest, highest = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
        wanted = min(highest, max(lowest, wanted))
        if wanted != context.policy_state.get("wanted"):
            figures = {name: [round(value) for value in each.values()] for name, each in told.items()}
            logging.getLogger("ray.serve").info("%d replicas are wanted: %s", wanted, figures)
        return wanted, {"wanted": wanted}


def application(chosen: argparse.Namespace) -> Any:
    """Return the application: an OpenAI-compatible server whose model is called `chat`."""
    on_cpu, engine = {}, ENGINE
    if chosen.cpus:
        on_cpu = {
            "placement_group_config": {"bundles": [{"CPU": chosen.cpus}]},
            "accelerator_config": {"kind": "cpu"},
        }
        engine = {**ENGINE, "enforce_eager": True, "dtype": "float32"}
    config = LLMConfig(
        model_loading_config={"model_id": "chat", "model_source": chosen.model},
        engine_kwargs={**engine, **SarathiConfig(tbt_slo_ms=chosen.tbt_slo_ms).engine_args()},
        server_cls=SarathiServer,
        deployment_config={
            "autoscaling_config": {
                "min_replicas": 1,
                "max_replicas": chosen.max_replicas,
                "downscale_delay_s": 600,  # a model takes minutes to load
                "policy": {"policy_function": POLICY, "policy_kwargs": {"full": chosen.full}},
            }
        },
        **on_cpu,
    )
    # The router of requests is small: it takes no CPU away from the replicas.
    router = {"ray_actor_options": {"num_cpus": 0}}
    return build_openai_app({"llm_configs": [config], "ingress_deployment_config": router})


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a name on a model hub, or a folder on every node")
    parser.add_argument("--tbt-slo-ms", type=float, default=100.0)
    parser.add_argument("--max-replicas", type=int, default=4)
    parser.add_argument(
        "--full", type=float, default=0.8, help="the share of what replicas can read that is used"
    )
    parser.add_argument(
        "--cpus", type=int, default=0, help="CPUs of a replica, which then serves without a GPU"
    )
    parser.add_argument("--port", type=int, default=8000)
    chosen = parser.parse_args()
    if chosen.cpus:  # to Ray they are numbers, whatever the machine has; a replica takes one more for itself
        cpus = (chosen.cpus + 1) * chosen.max_replicas
        ray.init(num_cpus=cpus, include_dashboard=False)
    else:
        ray.init(address="auto")
    serve.start(http_options={"host": "127.0.0.1", "port": chosen.port})
    serve.run(application(chosen))
    print(f"serving at http://127.0.0.1:{chosen.port}/v1", flush=True)
    try:
        while True:
            time.sleep(1)
    except KeyboardInterrupt:
        pass
    finally:
        serve.shutdown()


if __name__ == "__main__":
    main()
