"""Runs recipes/distributed.toml on one machine: a vLLM server with both experts, two Ray nodes, and the run itself.

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
EXPERTS = {name: ROOT / "examples" / "merge" / name for name in ("letters", "matrix")}
# Without the head, whose logits vLLM 0.32 cannot adapt on a CPU where a prompt's own log-probabilities are asked for.
ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def teachers(config: opd.Config) -> EnginePlan:
    """A server that holds the base once, and both experts as adapters on it."""
    adapters = [f"{name}={folder}" for name, folder in EXPERTS.items()]
    args = ["--dtype", "float32", "--max-model-len", "512", "--enforce-eager", "--enable-lora", "--max-lora-rank", "16"]
    args += ["--max-loras", "2", "--lora-target-modules", *ADAPTED, "--lora-modules", *adapters]
    cluster = config.cluster
    return EnginePlan(tuple(cluster.engine_command), config.student, "base", tuple(args), cluster.engine_start_s)


def main() -> None:
    os.chdir(ROOT)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; two servers live in one machine
    os.environ.setdefault("RAY_TMPDIR", tempfile.gettempdir())
    recipe = "recipes/distributed.toml"
    config = opd.load_config(recipe, sys.argv[1:])
    with ExitStack() as stack:
        server = Engine(teachers(config), "127.0.0.1")
        stack.callback(server.stop)
        url = server.address()
        print(f"teachers: {url}", flush=True)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        stack.callback(cluster.shutdown)
        cluster.add_node(num_cpus=1)
        print(f"cluster: {cluster.address}, 2 nodes", flush=True)
        places = [f"cluster.address={cluster.address}", f"teachers.letters.url={url}", f"teachers.matrix.url={url}"]
        result = opd.train(opd.load_config(recipe, [*places, *sys.argv[1:]]))
    print(f"done: {result.run}")


if __name__ == "__main__":
    main()
