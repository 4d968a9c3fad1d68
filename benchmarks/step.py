"""A whole training step (sample, score, update) beside TRL's DistillationTrainer: time and peak memory.

    make peers && .venv/bin/python benchmarks/step.py

The same prompts, batch, response lengths, adapter and objective (the exact reverse KL, LoRA 16, float32, one expert). Response
lengths are fixed, so both do the same work: no end token ends a response. Each program loads its models, makes one step that
does not count, then `--steps` that do; the two take turns for `--rounds` rounds.
"""

import argparse
import json
import resource
import sys
from dataclasses import replace
from pathlib import Path

from in_turns import PEERS, in_turns, ratio, require_peers

SHAPES = {"8x4": (8, 4), "32x1": (32, 1)}
LENGTHS = {"short": 12, "long": 128}
RECIPE = Path(__file__).with_suffix(".toml")
STUDENT, EXPERT, PROMPTS = (
    "models/smollm2-135m-instruct",
    "examples/merge/letters",
    "examples/merge/letters_train.jsonl",
)


def ours(prompts: int, group: int, tokens: int, steps: int, overrides: list[str]) -> dict[str, object]:
    """Steps of opd in this process; seconds of each, of its phases, and the process's peak memory."""
    import opd
    from opd.embedded.build import build
    from opd.embedded.sampler import EmbeddedSampler
    from opd.loop import train_step
    from opd.startup import make_parts, read_tasks
    from opd.tasks.episodes import EpisodePlayer, one_turn
    from opd.text.chat import Chat

    shape = [
        f"sampling.prompts_per_step={prompts}",
        f"sampling.group_size={group}",
        f"sampling.max_new_tokens={tokens}",
    ]
    config = opd.load_config(RECIPE, [*shape, f"steps={steps + 1}", *overrides])
    material = read_tasks(config, None, None)
    studio = build(config, material.make_environment)
    endless = EpisodePlayer(
        Chat(studio.student.network.tokenizer), config.episodes, end_ids=(), make_environment=one_turn
    )
    sampler = EmbeddedSampler(
        studio.student.network,
        adapter=studio.student.adapter,
        temperature=1.0,
        max_new_tokens=tokens,
        max_rows=config.sampling.max_rows,
        max_tokens=config.compute.max_tokens,
        player=endless,
    )
    parts = replace(make_parts(config, studio, material), sampler=sampler)
    times, phases, packed = [], [], 0.0
    for step in range(1, steps + 2):
        values = train_step(config, parts, step).values
        times.append(values["time/step_s/sum"])
        phases.append({name: values[f"time/{name}_s/sum"] for name in ("sample", "score", "update")})
        packed = values["batch/packed_tokens/sum"]
    return {
        "step_s": sum(times[1:]) / steps,
        "phases_s": {name: round(sum(p[name] for p in phases[1:]) / steps, 3) for name in phases[0]},
        "tokens": values["batch/tokens/sum"],
        "packed_tokens": packed,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--lengths", nargs="+", default=list(LENGTHS), choices=LENGTHS)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--alone", action="store_true", help="opd by itself, one shape and length, as JSON")
    parser.add_argument(
        "--checkpointing", action="store_true", help="TRL with its default gradient checkpointing: slower, leaner"
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of opd for --alone")
    options = parser.parse_args()
    if options.alone:
        (prompts, group), tokens = SHAPES[options.shapes[0]], LENGTHS[options.lengths[0]]
        print(json.dumps(ours(prompts, group, tokens, options.steps, options.set)))
        return
    require_peers()
    print("| batch | response | opd, s | TRL, s | TRL / opd | opd, GB | TRL, GB | opd / TRL |")
    print("|---|---|---|---|---|---|---|---|")
    for shape in options.shapes:
        for length in options.lengths:
            prompts, group = SHAPES[shape]
            mine = [
                sys.executable,
                __file__,
                "--alone",
                "--shapes",
                shape,
                "--lengths",
                length,
                "--steps",
                options.steps,
            ]
            theirs = [
                PEERS, Path(__file__).parent / "peers" / "trl_step.py", "--student", STUDENT, "--expert", EXPERT,
                "--prompts", PROMPTS, "--num-prompts", prompts, "--group", group, "--tokens", LENGTHS[length],
                "--steps", options.steps, *(["--checkpointing"] if options.checkpointing else []),
            ]  # fmt: skip
            found = in_turns({"opd": mine, "trl": theirs}, rounds=options.rounds)
            seconds = {name: [answer["step_s"] for answer in answers] for name, answers in found.items()}
            memory = {name: max(answer["peak_gb"] for answer in answers) for name, answers in found.items()}
            print(
                f"| {shape} | {LENGTHS[length]} tokens | {min(seconds['opd']):.2f} | {min(seconds['trl']):.2f} | "
                f"{ratio(seconds['opd'], seconds['trl'])} | {memory['opd']:.2f} | {memory['trl']:.2f} | "
                f"{memory['opd'] / memory['trl']:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
