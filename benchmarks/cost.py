"""What a response token costs as responses, groups and teachers grow, and what a logit costs as the vocabulary does.

    .venv/bin/python benchmarks/cost.py

Whole steps of opd on the demo's letters task (work.py), lengths fixed; one thing at a time grows fourfold: 8 prompts x 2 samples
(of teachers: x 4, so that each has a few) x 32 tokens, one teacher. Each size is a program of its own and they take turns, so the
ratios are those of neighbouring runs. A larger vocabulary is more work for every state, so there the loss alone (reverse_kl.py) is
divided by states and vocabulary.
"""

import argparse
import json
import sys

from in_turns import in_turns, ratio
from reverse_kl import measured
from work import opd_parts

LENGTHS, GROUPS, TEACHERS = (32, 64, 128), (2, 4, 8), (1, 2, 4)
VOCABULARIES = (49152, 98304, 196608)
PROMPTS, STATES, WIDTH = 8, 2048, 576
_FILES = {"path": "train", "held_out_path": "held_out"}


def step(length: int, group: int, teachers: int, steps: int) -> dict[str, float]:
    """Seconds of a step of opd for each token of its responses."""
    from opd.loop import train_step

    shape = [f"sampling.prompts_per_step={PROMPTS}", f"sampling.group_size={group}"]
    for number in range(1, teachers):
        # the same weights under further names, each with a task of its own: as much work as other weights
        shape += [f"teachers.more{number}.adapter=examples/merge/letters", f"tasks.more{number}.type=file"]
        shape += [f"tasks.more{number}.{k}=examples/merge/letters_{v}.jsonl" for k, v in _FILES.items()]
        shape.append(f"tasks.more{number}.teacher=more{number}")
    config, _, _, parts = opd_parts("8x4", length, steps + 1, shape, endless=True)
    times = [train_step(config, parts, number).values["time/step_s/sum"] for number in range(1, steps + 2)]
    return {"seconds": sum(times[1:]) / steps / (PROMPTS * group * length)}


def loss(vocab: int) -> dict[str, float]:
    """Seconds of the exact reverse KL for each logit of one model."""
    return {"seconds": measured("opd", STATES, vocab, WIDTH, 2)["seconds"] / STATES / vocab}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--what", nargs="+", default=["length", "group", "teachers", "vocabulary"])
    parser.add_argument("--alone", type=int, nargs=3, metavar=("LENGTH", "GROUP", "TEACHERS"), help="one size, as JSON")
    parser.add_argument("--alone-loss", type=int, metavar="VOCABULARY", help="one vocabulary, as JSON")
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(step(*options.alone, options.steps)))
        return
    if options.alone_loss:
        print(json.dumps(loss(options.alone_loss)))
        return
    sizes = {
        "length": {n: (n, GROUPS[0], TEACHERS[0]) for n in LENGTHS},
        "group": {n: (LENGTHS[0], n, TEACHERS[0]) for n in GROUPS},
        "teachers": {n: (LENGTHS[0], GROUPS[1], n) for n in TEACHERS},
        "vocabulary": {n: (n,) for n in VOCABULARIES},
    }
    print("| what grows | to | cost | over the smallest |\n|---|---|---|---|")
    for what in options.what:
        commands = {}
        for size, arguments in sizes[what].items():
            alone = ["--alone-loss"] if what == "vocabulary" else ["--steps", options.steps, "--alone"]
            commands[str(size)] = [sys.executable, __file__, *alone, *arguments]
        found = in_turns(commands, rounds=options.rounds)
        first = [answer["seconds"] for answer in found[str(next(iter(sizes[what])))]]
        for size in sizes[what]:
            mine = [answer["seconds"] for answer in found[str(size)]]
            cost = f"{min(mine) * 1e9:.1f} ns a logit" if what == "vocabulary" else f"{min(mine) * 1e3:.1f} ms a token"
            print(f"| {what} | {size} | {cost} | {ratio(first, mine)} |", flush=True)


if __name__ == "__main__":
    main()
