"""Score policies on prompt sets, and the parity table: does the student match each of its teachers?"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from opd.batch import pack
from opd.config import Config
from opd.data.tasks import SPLITS, TaskData
from opd.errors import DataError
from opd.logging.console import ProgressLine
from opd.logging.run_folder import RunFolder
from opd.loop import Components
from opd.metrics import Mean, Metrics, Sum, mean_interval, merge, values, wilson_interval
from opd.records import ChunkScore, HiddenScore, Prompt, SampledScore, ScoredRollout, TopKScore
from opd.rewards.judge import Judge
from opd.rewards.reward import TIMEOUTS
from opd.roles import Backend, Sampler, Seed, Teacher

ReverseKl = Callable[[Sequence[ScoredRollout]], list[np.ndarray]]

_BEFORE = "before.json"
EVALUATION_SEED: Seed = (0, "evaluate")


@dataclass(frozen=True)
class Cell:
    """One policy on one set of prompts, with one response to each.

    The fields about rewards are None if no response has a verdict. With a teacher behind a server or of another tokenizer the
    reverse KL is an estimate from the sampled tokens; otherwise it is exact over the vocabulary.

    Attributes:
        total: The episodes.
        verified: Those with a verdict.
        correct: Those with reward 1.
        truncated: Those that a limit on tokens cut.
        flagged: Those with a format error.
        mean_length: Tokens of the policy in an episode, on average.
        failed: Those whose environment failed. They have no verdict.
        timeouts: Those with reward 0 because the verifier did not compare them in time.
        mean_reward: The mean of the rewards.
        reward_deviation: The standard deviation of the rewards.
        kl_token: Reverse KL to the prompts' teacher on the policy's own responses, in nats per token.
        kl_sequence: The same in nats per episode.
        kl_byte: The same in nats per byte of text, with a teacher of another tokenizer.
        sampled: Whether the reverse KL is an estimate.
    """

    total: int
    verified: int
    correct: int | None
    truncated: int
    flagged: int
    mean_length: float
    failed: int = 0
    timeouts: int = 0
    mean_reward: float | None = None
    reward_deviation: float | None = None
    kl_token: float | None = None
    kl_sequence: float | None = None
    kl_byte: float | None = None
    sampled: bool = False

    @property
    def accuracy(self) -> float | None:
        """The fraction of verified episodes with reward 1."""
        return None if self.correct is None else self.correct / self.verified

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the accuracy (Wilson)."""
        return None if self.correct is None else wilson_interval(self.correct, self.verified)

    @property
    def reward_interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the mean reward (`opd.metrics.mean_interval`)."""
        if self.mean_reward is None or self.reward_deviation is None:
            return None
        return mean_interval(self.mean_reward, self.reward_deviation, self.verified)

    @property
    def in_part(self) -> bool:
        """Whether some rewards lie between 0 and 1, so that the mean reward is not the accuracy."""
        return self.mean_reward is not None and abs(self.mean_reward - (self.accuracy or 0.0)) > 1e-9


@dataclass(frozen=True)
class ParityRow:
    """One row of the parity table: one task and split.

    Attributes:
        task: A name of [tasks].
        split: "train" or "held_out".
        teacher: The teacher of these prompts.
        before: The untrained student.
        expert: The teacher alone; None for a teacher that is not measured, such as a mixture.
        after: The trained student.
    """

    task: str
    split: str
    teacher: str
    before: Cell | None
    expert: Cell | None
    after: Cell

    @property
    def parity(self) -> float | None:
        """The student's mean reward divided by its teacher's."""
        if self.expert is None or not self.expert.mean_reward or self.after.mean_reward is None:
            return None
        return self.after.mean_reward / self.expert.mean_reward


def evaluate(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    judge: Judge,
    *,
    seed: Seed = EVALUATION_SEED,
    teachers: Teacher | None = None,
    reverse_kl: ReverseKl | None = None,
    logprob_floor: float = -50.0,
) -> Cell:
    """One response a prompt at the sampler's temperature, verified; with `teachers` and `reverse_kl` also the KL, in which the
    teachers' log-probabilities have the floor that they have in training."""
    rollouts = judge(sampler.sample(prompts, num_samples=1, seed=seed))
    episodes = [r for r in rollouts if r.part == 0]
    faulty = {(r.prompt.id, r.sample) for r in rollouts if r.flags}
    known = [r.reward for r in episodes if r.reward is not None]
    kl: Mapping[str, float] = {}
    exact = False
    if teachers is not None and reverse_kl is not None:
        scored = teachers.score([r for r in rollouts if r.failure is None and r.num_actions])
        # One teacher scores all prompts of a set, so its scores are of one kind.
        hidden = [s for s in scored if isinstance(s.score, HiddenScore)]
        exact = bool(hidden)
        kl = _averages(reverse_kl(hidden), hidden) if exact else _from_samples(scored, logprob_floor)
    return Cell(
        total=len(episodes),
        verified=len(known),
        correct=sum(r >= 1.0 for r in known) if known else None,
        truncated=sum(r.truncated for r in episodes),
        flagged=len(faulty),
        mean_length=sum(r.num_actions for r in rollouts) / len(episodes),
        failed=sum(r.failure is not None for r in episodes),
        timeouts=sum(r.events.get(TIMEOUTS, 0) for r in rollouts),
        mean_reward=float(np.mean(known)) if known else None,
        reward_deviation=float(np.std(known)) if known else None,
        sampled=bool(kl) and not exact,
        **kl,
    )


def _averages(per_token: Sequence[np.ndarray], scored: Sequence[ScoredRollout]) -> dict[str, float]:
    """The reverse KL a token and an episode from that of every token, one array a rollout."""
    every = np.concatenate(per_token)
    episodes = {(s.rollout.prompt.id, s.rollout.sample) for s in scored}
    return {"kl_token": float(every.mean()), "kl_sequence": float(every.sum() / len(episodes))}


def _from_samples(scored: Sequence[ScoredRollout], logprob_floor: float) -> dict[str, float]:
    """The same from what was sampled, and a byte for a teacher that scores chunks; nothing when nothing was scored."""
    known = [s for s in scored if isinstance(s.score, SampledScore | TopKScore | ChunkScore) and s.mask.any()]
    if not known:
        return {}
    batch, _ = pack(known, logprob_floor=logprob_floor)
    ratios = batch.log_ratio.double()
    total, episodes = -float(ratios.sum()), len(batch.first_parts)
    found = {"kl_token": total / int(batch.scored.sum()), "kl_sequence": total / episodes}
    if batch.num_bytes is None or not bool(batch.num_bytes.any()):
        return found
    # as the training metric has it: a response without text has no bytes to share its cost
    readable = torch.repeat_interleave(batch.num_bytes > 0, batch.lengths)
    return found | {"kl_byte": -float(ratios[readable].sum()) / int(batch.num_bytes.sum())}


def pick(prompts: Sequence[Prompt], count: int, *, seed: int) -> list[Prompt]:
    """A fixed random choice of at most `count` prompts, in their order."""
    if len(prompts) <= count:
        return list(prompts)
    chosen = np.random.default_rng([seed, len(prompts)]).choice(len(prompts), size=count, replace=False)
    return [prompts[i] for i in sorted(chosen)]


def parity_json(rows: Sequence[ParityRow]) -> list[dict[str, Any]]:
    """The table as plain data, derived numbers included."""

    def cell(value: Cell | None) -> dict[str, Any] | None:
        return None if value is None else asdict(value) | {
            "accuracy": value.accuracy, "interval": value.interval, "reward_interval": value.reward_interval
        }  # fmt: skip

    return [
        {
            "task": row.task,
            "split": row.split,
            "teacher": row.teacher,
            "student_before": cell(row.before),
            "teacher_alone": cell(row.expert),
            "student_after": cell(row.after),
            "parity": row.parity,
        }
        for row in rows
    ]


def parity_text(rows: Sequence[ParityRow]) -> str:
    """The table as Markdown: accuracy in percent and the mean reward with their 95 % intervals, reverse KL in nats."""

    def accuracy(cell: Cell | None) -> str:
        if cell is None or cell.accuracy is None or cell.interval is None:
            return "-"
        low, high = cell.interval
        return f"{100 * cell.accuracy:.1f} [{100 * low:.1f}, {100 * high:.1f}] of {cell.verified}{reward_text(cell)}"

    def kl(cell: Cell | None) -> str:
        if cell is None or cell.kl_token is None or cell.kl_sequence is None:
            return "-"
        text = f"{cell.kl_token:.3f} / {cell.kl_sequence:.2f}" + ("~" if cell.sampled else "")
        return text if cell.kl_byte is None else f"{text} ({cell.kl_byte:.3f} a byte)"

    def faults(row: ParityRow) -> str:
        shares = [f"{100 * c.flagged / c.total:.1f}" for c in (row.before, row.expert, row.after) if c is not None]
        return " / ".join(shares) + " %"

    every = [c for row in rows for c in (row.before, row.expert, row.after) if c is not None]
    head = ["task", "prompts", "student before", "teacher", "student after", "after / teacher", "KL before", "KL after"]
    checked = any(c.flagged for c in every)
    if checked:
        head.append("format errors")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        parity = "-" if row.parity is None else f"{100 * row.parity:.1f} %"
        cells = (
            row.task,
            row.split.replace("_", "-"),
            accuracy(row.before),
            accuracy(row.expert),
        )
        cells += (accuracy(row.after), parity, kl(row.before), kl(row.after), *([faults(row)] if checked else []))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_notes(rows, every)])


def _notes(rows: Sequence[ParityRow], every: Sequence[Cell]) -> list[str]:
    """What stands below the table."""
    lines = []
    if failed := sum(c.failed for c in every):
        lines.append(f"{failed} episodes have no verdict, because their environments failed; they are not counted.")
    if late := sum(c.timeouts for c in every):
        lines.append(f"{late} responses count as wrong: the verifier did not compare them in time.")
    if any(c is not None and c.sampled for row in rows for c in (row.before, row.after)):
        lines.append(
            "~: estimated from the responses, of a teacher that gives no distributions over the student's tokens."
        )
    if any(c.flagged for c in every):
        lines.append(
            "Format errors: the share of episodes with one, of the student before, its teacher and the student after."
        )
    if any(c.in_part for c in every):
        lines.append("The mean reward counts partial rewards; after / teacher is the ratio of the mean rewards.")
    lines.append(
        "Right answers (reward 1) in % with 95 % intervals (Wilson); reverse KL to the teacher in nats per token / per sequence."
    )
    return lines


def reward_text(cell: Cell) -> str:
    """The mean reward and its interval, to stand behind an accuracy that does not tell it; else nothing."""
    if not cell.in_part or cell.reward_interval is None:
        return ""
    low, high = cell.reward_interval
    return f", mean reward {cell.mean_reward:.2f} [{low:.2f}, {high:.2f}]"


def by_task(prompts: Mapping[str, Mapping[str, Sequence[Prompt]]]) -> list[tuple[str, str, str]]:
    """(task, split, teacher) of every non-empty set, in order; a task may have several teachers."""
    found = []
    for task, splits in prompts.items():
        for split in SPLITS:
            teachers = dict.fromkeys(p.teacher for p in splits.get(split, ()))
            found += [(task, split, teacher) for teacher in teachers]
    return found


CellTable = dict[tuple[str, str, str], Cell]
"""By task, split and teacher."""


class Evaluator:
    """Evaluates a run's student as it is now, and its teachers, on the recipe's prompts."""

    def __init__(
        self, config: Config, folder: RunFolder, backend: Backend, components: Components, task_data: TaskData
    ) -> None:
        self._config = config
        self._folder = folder
        self._backend = backend
        self._components = components
        self._task_data = task_data

    def held_out(self, step: int) -> dict[str, float]:
        """The student's mean reward on held-out prompts, by another grader where a task names one; every `evaluation.every`
        steps."""
        config = self._config.evaluation
        if not config.every or step % config.every:
            return {}
        found: list[Metrics] = []
        for task, splits in self._task_data.prompts.items():
            chosen = pick(splits["held_out"], config.held_out_prompts, seed=0)
            cell = evaluate(self._backend.sampler(), chosen, self._task_data.grader()) if chosen else None
            if cell is not None and cell.mean_reward is not None:
                mean = Mean(cell.mean_reward * cell.verified, cell.verified)
                # over all and by task, as `reward` is
                found.append({"held_out/reward/mean": mean, f"held_out/reward/{task}/mean": mean})
                if cell.timeouts:
                    found.append({"held_out/timeouts/sum": Sum(cell.timeouts)})
        return values(merge(found))

    def before(self, line: ProgressLine, *, restored: bool) -> CellTable:
        """The student's cells before the first step: measured once, and kept."""
        if (self._folder.path / _BEFORE).exists():
            return self.kept()
        count = min(self._config.evaluation.before_prompts, self._config.evaluation.num_prompts)
        if restored or not count:
            return {}
        line.say("evaluating the student before the first step")
        cells = self._student_cells(count)
        plain = [[*key, asdict(cell)] for key, cell in cells.items()]
        self._folder.write_text(_BEFORE, json.dumps(plain, indent=1) + "\n")
        return cells

    def kept(self) -> CellTable:
        """What `before` kept; nothing where it measured nothing."""
        path = self._folder.path / _BEFORE
        if not path.exists():
            return {}
        return {(task, split, teacher): Cell(**cell) for task, split, teacher, cell in json.loads(path.read_text())}

    def parity(
        self, before: Mapping[tuple[str, str, str], Cell], line: ProgressLine, *, name: str | None = "parity"
    ) -> list[ParityRow]:
        """Measure the student and each teacher on its own prompts, and show the table.

        name: of the two files in the run folder that it is written to, without their endings; None: it is not written.
        """
        if not self._config.evaluation.num_prompts:
            return []
        line.say("evaluating the student and its teachers")
        after = self._student_cells(self._config.evaluation.num_prompts)
        rows = []
        for (task, split, teacher), cell in after.items():
            expert = None
            alone = self._backend.standalone_sampler(teacher)
            if alone is not None:
                judge = self._task_data.judge(self._config, alone.tokenizer)
                try:
                    expert = evaluate(alone.sampler, self._evaluation_set(task, split, teacher), judge)
                except DataError as error:  # its own chat template may refuse what the student's takes
                    line.say(f"teacher '{teacher}' alone is not measured on {task} {split}: {error}")
            rows.append(ParityRow(task, split, teacher, before.get((task, split, teacher)), expert, cell))
        text = parity_text(rows)
        line.say(text)
        if name is not None:
            self._folder.write_text(f"{name}.json", json.dumps(parity_json(rows), indent=1) + "\n")
            self._folder.write_text(f"{name}.md", text + "\n")
        return rows

    def _student_cells(self, count: int) -> CellTable:
        sampler, teachers = self._backend.sampler(), self._backend.teachers(keep_hidden=True)
        return {
            key: evaluate(
                sampler,
                self._evaluation_set(*key)[:count],
                self._components.judge,
                teachers=teachers,
                reverse_kl=self._reverse_kl,
                logprob_floor=self._config.objective.teacher_logprob_floor,
            )
            for key in by_task(self._task_data.prompts)
        }

    def _reverse_kl(self, scored: Sequence[ScoredRollout]) -> list[np.ndarray]:
        """KL(student, teacher) at every action of every rollout, one [actions] array each."""
        batch, _ = pack(scored, logprob_floor=self._config.objective.teacher_logprob_floor)
        kl = self._components.learner.score_student(batch).reverse_kl
        assert kl is not None
        return [kl[a:b][batch.loss_mask[a:b]].double().numpy() for a, b in pairwise(batch.offsets)]

    def _evaluation_set(self, task: str, split: str, teacher: str) -> list[Prompt]:
        mine = [p for p in self._task_data.prompts[task][split] if p.teacher == teacher]
        # The same prompts whatever the run's seed, so that runs can be compared.
        return pick(mine, self._config.evaluation.num_prompts, seed=0)
