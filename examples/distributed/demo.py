"""Runs recipes/distributed.toml on one machine: two Ray nodes, a vLLM server with one expert, and the run, which starts the rest.

Stopped and started again, it goes on where it was, with the server and the nodes where they are then.

make demo-distributed
.venv/bin/python examples/distributed/demo.py [KEY=VALUE ...]
"""

import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from ray.cluster_utils import Cluster

import opd
from opd.distributed.engine import Engine, EnginePlan

ROOT = Path(__file__).parents[2]
RECIPE = "recipes/distributed.toml"


def server(config: opd.Config) -> EnginePlan:
    """What somebody else's server would be: the expert of matrices, on its own."""
    cluster = config.cluster
    return EnginePlan(
        command=tuple(cluster.engine_command),
        model=config.student,
        adapter="examples/merge/matrix",
        name="matrix",
        teachers=("matrix",),
        args=("--dtype", config.compute.dtype, *cluster.engine_args),
        start_s=cluster.engine_start_s,
    )


def main() -> None:
    os.chdir(ROOT)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; three servers live in one machine
    os.environ.setdefault("RAY_TMPDIR", tempfile.gettempdir())
    with ExitStack() as stack:
        matrix = Engine(server(opd.load_config(RECIPE, sys.argv[1:])), "127.0.0.1")
        stack.callback(matrix.stop)
        url = matrix.state().url
        print(f"the server of 'matrix': {url}", flush=True)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        stack.callback(cluster.shutdown)
        cluster.add_node(num_cpus=2)
        print(f"the cluster: {cluster.address}, 2 nodes", flush=True)
        places = [f"cluster.address={cluster.address}", f"teachers.matrix.url={url}"]
        config = opd.load_config(RECIPE, [*places, *sys.argv[1:]])
        begun = (Path(config.output) / "config.json").exists()
        result = opd.Trainer(config.output).resume([*places, *sys.argv[1:]]) if begun else opd.train(config)
    print(f"done: {result.run}")


if __name__ == "__main__":
    main()
