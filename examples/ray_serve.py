"""The server's application on Ray Serve: replicas of one model behind one address, on one machine or several.

Each replica is a process with a model and a queue of its own. Ray gives a request to the replica that has the fewest, restarts
replicas that die, and tells a replica when a client goes away. Needs `pip install 'ray[serve]'` besides the extra `serve`.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

EXAMPLE = """example:
  python examples/ray_serve.py --replicas 2 --port 8000 &
  curl -s localhost:8000/v1/images/generations -H 'Content-Type: application/json' \\
    -d '{"prompt": "a red circle above a blue square", "seed": 1}'
"""


def load(model: str, preset: str, device: str, api_key: str | None, threads: int) -> Any:
    """The application on a model of its own; called in each replica."""
    import torch

    from flashu_ext.models.folders import load_pipeline
    from flashu_ext.server.app import application

    torch.set_num_threads(threads)
    pipe = load_pipeline(model, device=device)
    config, plan = pipe.preset(preset)
    if config is not None:
        pipe.accelerate(config, plan)
    return application(pipe, api_key=api_key)


def deployment(
    model: str = "nano",
    preset: str = "exact",
    device: str = "cpu",
    api_key: str | None = None,
    replicas: int = 2,
    cpus: float = 1.0,
    gpus: float = 0.0,
) -> Any:
    """A Ray Serve application, for `serve.run`.

    Args:
        replicas: processes with a model each.
        cpus, gpus: that Ray reserves for each of them; torch gets as many threads.
    """
    from ray import serve

    from flashu_ext.server.limits import Limits

    limits = Limits()

    def build() -> Any:
        return load(model, preset, device, api_key, max(1, int(cpus)))

    # More than the queues of images and answers hold: the application refuses by 429 itself.
    most = 2 * (limits.at_once + limits.waiting) + 16

    @serve.deployment(
        name="flashu",
        num_replicas=replicas,
        max_ongoing_requests=most,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        health_check_period_s=10,
    )
    @serve.ingress(build)
    class Replica:
        """One model."""

    return Replica.bind()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="nano", help="'nano', or a folder with a checkpoint of any family")
    parser.add_argument("--preset", default="exact", choices=("dense", "exact", "paper", "fast"))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--cpus", type=float, default=1.0, help="of each replica")
    parser.add_argument("--gpus", type=float, default=0.0, help="of each replica")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    options = vars(parser.parse_args())
    import os

    import ray
    from ray import serve

    http = {name: options.pop(name) for name in ("host", "port")}
    ray.init(include_dashboard=False)
    serve.start(http_options=http)
    serve.run(deployment(**options, api_key=os.environ.get("FLASHU_API_KEY")))
    print(f"http://{http['host']}:{http['port']}", flush=True)
    try:
        while True:
            time.sleep(1)
    finally:
        serve.shutdown()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        pass
