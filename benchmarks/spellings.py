"""How much of a sampled response's log-probability is its spelling: the bonus that hides in -log pi of a path.

    .venv/bin/python benchmarks/spellings.py runs/merge --step 1

The text of a response has the probability of all its spellings together, log pi(text) = log sum over paths of pi(path). What a
path lacks of it, log pi(text) - log pi(path), is paid to the student by no teacher. All paths cannot be summed; here are those of
one change, two neighbouring tokens written as one or one as two, and two bounds: with those alone, and the sampled path alone
(0). The student is the run's as it was before its first step.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

import opd
from opd.models.loading import load_network
from opd.models.network import Network
from opd.models.packing import micro_batches
from opd.objectives.logprobs import token_logprobs
from opd.text.student_text import StudentSide


def respellings(ids: list[int], student_side: StudentSide, id_of: dict[bytes, int]) -> list[list[int]]:
    """The same bytes with one change."""
    pieces = [student_side.table.of(i) for i in ids]
    text = [bool(p) and not student_side.table.control[i] for i, p in zip(ids, pieces, strict=True)]
    found = []
    for k, piece in enumerate(pieces):
        if not text[k]:
            continue
        if k + 1 < len(ids) and text[k + 1] and piece + pieces[k + 1] in id_of:
            found.append([*ids[:k], id_of[piece + pieces[k + 1]], *ids[k + 2 :]])
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        found += [[*ids[:k], id_of[a], id_of[b], *ids[k + 1 :]] for a, b in halves if a in id_of and b in id_of]
    return found


@torch.no_grad()
def path_logprobs(network: Network, sequences: list[np.ndarray], starts: list[int], temperature: float) -> np.ndarray:
    """log pi of each sequence from its place `start` on."""
    network.activate(None)
    masks = [np.arange(len(s)) >= start for s, start in zip(sequences, starts, strict=True)]
    found = np.zeros(len(sequences))
    for micro in micro_batches(sequences, masks, max_tokens=1024):
        states, targets = (torch.from_numpy(x).to(network.device) for x in (micro.states, micro.targets))
        hidden = network.hidden_states(micro.tree)[states]
        each = token_logprobs(hidden, network.head_weight(), targets, temperature=temperature)
        np.add.at(found, micro.owners, each.double().cpu().numpy())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--step", type=int, default=1)
    parser.add_argument("--responses", type=int, default=64)
    options = parser.parse_args()
    config = opd.parse_config(json.loads((Path(options.run) / "config.json").read_text()))
    torch.set_num_threads(config.compute.threads or torch.get_num_threads())
    network = load_network(config.student, config.compute)
    student_side = StudentSide(network.tokenizer, vocab_size=network.vocab_size)
    plain = np.flatnonzero(~student_side.table.control & ~student_side.table.unknown).tolist()
    id_of = {student_side.table.of(i): i for i in plain}
    sequences, starts, owners, bonus, size, odd = [], [], [], [], [], []
    chosen = [s.rollout for s in opd.read_rollouts(options.run, step=options.step)][: options.responses]
    for owner, rollout in enumerate(chosen):
        first = int(np.flatnonzero(rollout.loss_mask)[0])
        prompt, ids = rollout.token_ids[:first].tolist(), rollout.token_ids[first:].tolist()
        odd.append(bool(student_side.strange(np.array(ids), {}).any()))
        size.append(len(ids))
        for path in [ids, *respellings(ids, student_side, id_of)]:
            sequences.append(np.array([*prompt, *path]))
            starts.append(first)
            owners.append(owner)
    logprobs = path_logprobs(network, sequences, starts, config.temperature)
    owner_of = np.array(owners)
    for owner in range(len(chosen)):
        mine = logprobs[owner_of == owner]
        bonus.append(float(np.logaddexp.reduce(mine) - mine[0]))
    usual = [b for b, o in zip(bonus, odd, strict=True) if not o]
    strange = [b for b, o in zip(bonus, odd, strict=True) if o]
    print(f"{len(chosen)} responses, {sum(size)} tokens, {len(sequences) - len(chosen)} respellings of one change")
    for name, part in (("canonical", usual), ("not canonical", strange)):
        if part:
            print(
                f"{name}: {len(part)} responses, at least {np.mean(part):.4f} nats a response hidden, the most {max(part):.2f}"
            )
    print(f"all: at least {sum(bonus) / sum(size):.5f} nats a token")


if __name__ == "__main__":
    main()
