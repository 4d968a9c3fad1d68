"""A whole training step (sample, score, update) beside TRL's DistillationTrainer: time and peak memory.

    make peers && .venv/bin/python benchmarks/step.py

Response lengths are fixed, so both do the same work (work.py): no end token ends a response. Each program loads its models, makes
one step that does not count, then `--steps` that do; the two take turns for `--rounds` rounds. Seconds are the least of the
rounds' means, with opd's phases of that round. All rows with the defaults take about 40 minutes on two cores, `--lengths short
--rounds 1` three.
"""

import argparse
import json
import resource
import sys

from in_turns import in_turns, ratio, require_peers
from work import SHAPES, opd_parts, trl_command

LENGTHS = {"short": 12, "long": 128}


def ours(shape: str, tokens: int, steps: int, overrides: list[str]) -> dict[str, object]:
    """Steps of opd in this process; seconds of each, of its phases, and the process's peak memory."""
    from opd.loop import train_step

    config, _, _, parts = opd_parts(shape, tokens, steps + 1, overrides, endless=True)
    times, phases, values = [], [], {}
    for step in range(1, steps + 2):
        values = train_step(config, parts, step).values
        times.append(values["time/step_s/sum"])
        phases.append({name: values[f"time/{name}_s/sum"] for name in ("sample", "score", "update")})
    return {
        "step_s": sum(times[1:]) / steps,
        "phases_s": {name: round(sum(p[name] for p in phases[1:]) / steps, 3) for name in phases[0]},
        "tokens": values["batch/tokens/sum"],
        "packed_tokens": values["batch/packed_tokens/sum"],
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--lengths", nargs="+", default=list(LENGTHS), choices=LENGTHS)
    parser.add_argument("--steps", type=int, default=3, help="that count (default 3)")
    parser.add_argument("--rounds", type=int, default=3, help="(default 3)")
    parser.add_argument("--alone", action="store_true", help="opd by itself, one shape and length, as JSON")
    parser.add_argument(
        "--checkpointing", action="store_true", help="TRL with its default gradient checkpointing: slower, leaner"
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of opd for --alone")
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(ours(options.shapes[0], LENGTHS[options.lengths[0]], options.steps, options.set)))
        return
    require_peers()
    print(
        "| batch | response | opd, s | sample + score + update | TRL, s | time, TRL / opd | opd, GB | TRL, GB | memory, opd / TRL |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for shape in options.shapes:
        for length in options.lengths:
            alone = ["--alone", "--shapes", shape, "--lengths", length, "--steps", str(options.steps)]
            more = ["--endless", *(["--checkpointing"] if options.checkpointing else [])]
            theirs = trl_command(shape, LENGTHS[length], options.steps + 1, *more)
            found = in_turns({"opd": [sys.executable, __file__, *alone], "trl": theirs}, rounds=options.rounds)
            mine = [answer["step_s"] for answer in found["opd"]]
            trl = [(a["ends_s"][-1] - a["ends_s"][0]) / options.steps for a in found["trl"]]
            least = min(found["opd"], key=lambda answer: answer["step_s"])["phases_s"]
            phases = " + ".join(f"{seconds:.1f}" for seconds in least.values())
            memory = {name: max(answer["peak_gb"] for answer in answers) for name, answers in found.items()}
            print(
                f"| {shape} | {LENGTHS[length]} tokens | {min(mine):.2f} | {phases} | {min(trl):.2f} | "
                f"{ratio(mine, trl)} | {memory['opd']:.2f} | {memory['trl']:.2f} | {memory['opd'] / memory['trl']:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
