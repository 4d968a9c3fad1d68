"""Accelerators as their makers describe them, and everything else that a plan takes for granted."""

from dataclasses import dataclass

from opd.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One accelerator: dense bfloat16 and float32 (no tensor cores) rates in TFLOPS, memory in GiB, its bandwidth in GB/s, and in
    GB/s and one direction the link to its neighbours in a node and that to the host; how many tokens a vLLM server computes in one
    pass there, and how many sequences it runs at once, unless its arguments say otherwise."""

    name: str
    bf16_tflops: float
    fp32_tflops: float
    memory_gib: float
    memory_gb_s: float
    link_gb_s: float
    host_gb_s: float
    batched_tokens: int
    running: int

    def tflops(self, bytes_each: int) -> float:
        """The rate for numbers of so many bytes: float32 products do not use tensor cores, as torch is set up by default."""
        return self.bf16_tflops if bytes_each == 2 else self.fp32_tflops


# Source: NVIDIA's data sheets of the A100 80GB SXM, H100 SXM, H200 SXM and HGX B200 (per GPU). Rates are without sparsity, which
# the sheets of Hopper and Blackwell double; NVLink (600, 900, 900 and 1800 GB/s) and PCIe (gen 4: 64, gen 5: 128 GB/s) are both
# directions together there, and halved here. Memory is the sheet's number taken as 10^9 bytes, the smaller reading. The last two
# numbers are vLLM 0.32's (`EngineArgs.get_batch_defaults`, for its server).
DEVICES = {
    device.name: device
    for device in (
        Device("a100-80", 312, 19.5, 74.5, 2039, 300, 32, 2048, 256),
        Device("h100", 989, 67, 74.5, 3350, 450, 64, 8192, 1024),
        Device("h200", 989, 67, 131.3, 4800, 450, 64, 8192, 1024),
        Device("b200", 2250, 75, 167.6, 8000, 900, 64, 16384, 1024),
    )
}


@dataclass(frozen=True)
class Assumptions:
    """What the model of a step takes for granted, beside the device. None of it was measured on the cluster in question.

    prompt_tokens: of every prompt. gpus_per_node: they share the device's link; others meet over network_gb_s (one direction, for
    each GPU). The shares are what is reached of a peak. step_ms: what an engine adds to each pass for scheduling and launches.
    collective_us: what a collective takes whatever its size. disk_gb_s: of writing or reading a file of weights. driver_ms: what
    the driver spends on each rollout that a served teacher scores, driver_us on each of its tokens, driver_named_us on each token
    that is named beside it. reserve_gib: what contexts, libraries and fragments take of a device, sleeper_gib what a sleeping
    engine leaves there. Unless its arguments say otherwise an engine takes engine_fraction of a device's memory.
    """

    device: Device
    prompt_tokens: int = 512
    gpus_per_node: int = 8
    network_gb_s: float = 50.0  # 400 Gbit/s for each GPU
    matmul_fraction: float = 0.5
    memory_fraction: float = 0.7
    link_fraction: float = 0.7
    step_ms: float = 2.0
    collective_us: float = 10.0
    disk_gb_s: float = 2.0
    driver_ms: float = 1.6  # this and the next two: docs/results/cluster.md, beside a stand-in for an engine
    driver_us: float = 1.0
    driver_named_us: float = 0.4
    reserve_gib: float = 3.0
    sleeper_gib: float = 1.5
    engine_fraction: float = 0.9

    def flops(self, bytes_each: int) -> float:
        """Operations a second that one device reaches on numbers of so many bytes."""
        return self.device.tflops(bytes_each) * 1e12 * self.matmul_fraction

    @property
    def memory_rate(self) -> float:
        """Bytes a second that one device reads."""
        return self.device.memory_gb_s * 1e9 * self.memory_fraction

    def link(self, devices: int) -> float:
        """Bytes a second, one direction, that each of so many devices gets of what all of them exchange. Past a node all devices of
        the smallest one carry it to the others together, each over its own part of the network."""
        rate = self.device.link_gb_s
        if devices > self.gpus_per_node:
            rate = min(rate, self.network_gb_s * (devices % self.gpus_per_node or self.gpus_per_node))
        return rate * 1e9 * self.link_fraction


def device_of(name: str) -> Device:
    """The device of that name. Raises ConfigError with those that are known."""
    name = name.lower()
    if name not in DEVICES:
        raise ConfigError(f"--gpu {name}: no known device; expected one of {', '.join(DEVICES)}")
    return DEVICES[name]
