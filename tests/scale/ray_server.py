"""Runs `api.ray_serve` on a Ray cluster of this process's own, on loopback: `ray_server.py PORT ARGUMENTS`.

ARGUMENTS and each line of stdin are arguments of `build` as JSON; each deploys the application anew. A line `NUMBER` on
stdout is the number of running replicas, printed at each change.
"""

from __future__ import annotations

import json
import sys
import threading

import ray
from ray import serve

from api.ray_serve import build


def deploy(arguments: str) -> None:
    """Deploys the application and blocks until it is healthy."""
    serve.run(build(json.loads(arguments)), name="paceline")


def print_replicas(ended: threading.Event) -> None:
    """Prints the number of running replicas at each change until `ended` is set."""
    last = -1
    while not ended.wait(0.2):
        deployment = serve.status().applications["paceline"].deployments.get("paceline")
        running = deployment.replica_states.get("RUNNING", 0) if deployment else 0
        if running != last:
            last = running
            sys.stdout.write(f"{running}\n")
            sys.stdout.flush()


def main() -> None:
    """Serves until the end of stdin."""
    ray.init(num_cpus=4, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    deploy(sys.argv[2])
    ended = threading.Event()
    printing = threading.Thread(target=print_replicas, args=(ended,))
    printing.start()
    for line in sys.stdin:
        deploy(line)
    ended.set()
    printing.join()
    serve.shutdown()


if __name__ == "__main__":
    main()
