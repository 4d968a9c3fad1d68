"""The exact reverse KL from hidden states and heads (loss and gradient to the student's hidden states): time and peak memory.

    make peers && .venv/bin/python benchmarks/reverse_kl.py

opd's `exact_reverse_kl`, TRL's chunked divergence, Liger's chunked JSD (beta = 1), the dense form, and the three matrix products
that nothing can do without (student logits, teacher logits, the gradient), in turns on the same numbers. Peak memory is what a
process needs beyond its inputs.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from in_turns import PEERS, in_turns, ratio, require_peers

SIZES = {
    "2k x 49k": (2048, 49152, 576),
    "16k x 49k": (16384, 49152, 576),
    "2k x 152k": (2048, 151936, 896),
    "16k x 152k": (16384, 151936, 896),
}
OURS, THEIRS = ("products", "opd", "dense"), ("trl", "liger")
DENSE_AT_MOST = 2**29  # logits: six tensors of them would not fit


def measured(
    method: str, states: int, vocab: int, width: int, repeats: int, *, device: str = "cpu"
) -> dict[str, float]:
    """Seconds of a run, and the memory that it needs beyond its inputs; on a CPU in float32, elsewhere in bfloat16."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, torch.float32 if device == "cpu" else torch.bfloat16)

    # logits of about the spread that a language model's have
    student, teacher = normal(states, width), normal(states, width)
    student_head, teacher_head = (normal(vocab, width) * (2.0 / width**0.5) for _ in range(2))
    student.requires_grad_(method != "products")
    run = METHODS[method](student, student_head, teacher, teacher_head)
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew, now that the inputs are there
        before = memory("VmRSS")
    else:
        before = torch.cuda.memory_allocated() / 2**30
    times = []
    for _ in range(repeats + 1):
        student.grad = None
        start = time.perf_counter()
        loss = run()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    answer = {"seconds": statistics.median(times[1:]), "loss": loss}
    answer["gb"] = (memory("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated() / 2**30) - before
    if student.grad is not None:
        answer["grad_norm"] = float(student.grad.norm())
    return answer


def memory(what: str) -> float:
    """Gigabytes that Linux counts for this process."""
    [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(what)]
    return int(line.split()[1]) / 2**20


def opd(student, student_head, teacher, teacher_head) -> Callable[[], float]:
    import torch

    from opd.objectives.losses import exact_reverse_kl

    weights = torch.full((len(student),), 1.0 / len(student), device=student.device)

    def run() -> float:
        loss, *_ = exact_reverse_kl(student, student_head, teacher, teacher_head, weights)
        loss.backward()
        return float(loss.detach())

    return run


def products(student, student_head, teacher, teacher_head) -> Callable[[], float]:
    """The three products by themselves, in buffers that are there already."""
    import torch

    rows = min(len(student), 1024)
    ours, theirs = (student.new_empty(rows, len(student_head)) for _ in range(2))
    gradient = student.new_empty(rows, student.shape[1])

    def run() -> float:
        for start in range(0, len(student), rows):
            torch.mm(student[start : start + rows], student_head.T, out=ours)
            torch.mm(teacher[start : start + rows], teacher_head.T, out=theirs)
            torch.mm(ours, student_head, out=gradient)
        return 0.0

    return run


def dense(student, student_head, teacher, teacher_head) -> Callable[[], float]:
    import torch

    def run() -> float:
        logp = torch.log_softmax((student @ student_head.T).float(), -1)
        logq = torch.log_softmax((teacher @ teacher_head.T).float(), -1)
        loss = (logp.exp() * (logp - logq)).sum() / len(student)
        loss.backward()
        return float(loss.detach())

    return run


def trl(student, student_head, teacher, teacher_head) -> Callable[[], float]:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def run() -> float:
        found, _ = ChunkedDivergenceFunction.apply(student, student_head, None, teacher, teacher_head, None, 1.0)
        loss = found.sum() / len(student)
        loss.backward()
        return float(loss.detach())

    return run


def liger(student, student_head, teacher, teacher_head) -> Callable[[], float]:
    import torch
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    # its compiled form is for accelerators; the labels only say that every state counts
    compiled = student.device.type != "cpu"
    loss_of = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=compiled)
    labels = torch.zeros(len(student), dtype=torch.long, device=student.device)

    def run() -> float:
        loss = loss_of(student, student_head, teacher, teacher_head, labels)
        loss.backward()
        return float(loss.detach())

    return run


METHODS = {f.__name__: f for f in (opd, products, dense, trl, liger)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=2, help="runs that count in a round")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--alone", choices=METHODS, help="one method by itself, as JSON")
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(measured(options.alone, *SIZES[options.sizes[0]], options.repeats, device=options.device)))
        return
    require_peers()
    compare(options.sizes, rounds=options.rounds, repeats=options.repeats, device=options.device)


def compare(sizes: Sequence[str], *, rounds: int, repeats: int, device: str) -> None:
    """All methods on each size, in turns; prints the table."""
    print("| states x vocabulary | method | seconds | over the products | over opd | GB | GB over opd | loss |")
    print("|---|---|---|---|---|---|---|---|")
    for size in sizes:
        states, vocab, _ = SIZES[size]
        methods = [m for m in (*OURS, *THEIRS) if m != "dense" or states * vocab <= DENSE_AT_MOST]
        alone = ["--sizes", size, "--repeats", repeats, "--device", device]
        commands = {m: [PEERS if m in THEIRS else sys.executable, __file__, "--alone", m, *alone] for m in methods}
        found = in_turns(commands, rounds=rounds)
        seconds = {m: [a["seconds"] for a in answers] for m, answers in found.items()}
        memory = {m: max(a["gb"] for a in answers) for m, answers in found.items()}
        for m in methods:
            print(
                f"| {size} | {m} | {min(seconds[m]):.2f} | {ratio(seconds['products'], seconds[m])} | "
                f"{ratio(seconds['opd'], seconds[m])} | {memory[m]:.2f} | {memory[m] / memory['opd']:.1f} | "
                f"{found[m][0]['loss']:.6f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
