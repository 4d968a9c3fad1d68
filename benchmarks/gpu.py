"""On an accelerator: the exact reverse KL beside TRL's kernel and Liger's fused loss, a step and sampling against the roofline.

    make peers && .venv/bin/python benchmarks/gpu.py

Says "no accelerator" and ends where there is none. Weights, hidden states and heads are bfloat16, sums float32. Both environments
need a torch that knows the device.
"""

import reverse_kl
import roofline
import torch
from in_turns import require_peers

SETTINGS = ["compute.device=cuda", "compute.dtype=bfloat16", "compute.max_tokens=16384"]


def main() -> None:
    if not torch.cuda.is_available():
        print("no accelerator")
        return
    require_peers()
    print(f"{torch.cuda.get_device_name()}\n", flush=True)
    reverse_kl.compare(list(reverse_kl.SIZES), rounds=3, repeats=5, device="cuda")
    print(flush=True)
    roofline.main(["--lengths", "128", "512", "--rows", "32", "256", "--set", *SETTINGS])


if __name__ == "__main__":
    main()
