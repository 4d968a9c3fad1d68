"""What a run measures of its student: held-out rewards on the way, and the parity table at its end."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise

import numpy as np

from opd.batch import pack
from opd.config import Config
from opd.errors import DataError
from opd.evaluate import Cell, ParityRow, by_task, evaluate, parity_json, parity_text, pick
from opd.logging.console import ProgressLine
from opd.logging.run_folder import RunFolder
from opd.loop import Parts
from opd.metrics import Mean, Metrics, merge, values
from opd.records import Prompt, ScoredRollout
from opd.roles import Backend
from opd.startup import TaskData

_BEFORE = "before.json"
SharedVocabulary = dict[tuple[str, str, str], Cell]
"""By task, split and teacher."""


class Measuring:
    """Evaluates a run's student as it is now, and its teachers, on the recipe's prompts."""

    def __init__(self, config: Config, folder: RunFolder, backend: Backend, parts: Parts, task_data: TaskData) -> None:
        self._config = config
        self._folder = folder
        self._backend = backend
        self._parts = parts
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
        return values(merge(found))

    def before(self, line: ProgressLine, *, restored: bool) -> SharedVocabulary:
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

    def kept(self) -> SharedVocabulary:
        """What `before` kept; nothing where it measured nothing."""
        path = self._folder.path / _BEFORE
        if not path.exists():
            return {}
        return {(task, split, teacher): Cell(**cell) for task, split, teacher, cell in json.loads(path.read_text())}

    def parity(self, before: Mapping[tuple[str, str, str], Cell], line: ProgressLine) -> list[ParityRow]:
        """Measure the student and each teacher on its own prompts; write and show the table."""
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
        self._folder.write_text("parity.json", json.dumps(parity_json(rows), indent=1) + "\n")
        self._folder.write_text("parity.md", text + "\n")
        line.say(text)
        return rows

    def _student_cells(self, count: int) -> SharedVocabulary:
        sampler, teachers = self._backend.sampler(), self._backend.teachers(keep_hidden=True)
        return {
            key: evaluate(
                sampler,
                self._evaluation_set(*key)[:count],
                self._parts.judge,
                teachers=teachers,
                reverse_kl=self._reverse_kl,
                logprob_floor=self._config.objective.teacher_logprob_floor,
            )
            for key in by_task(self._task_data.prompts)
        }

    def _reverse_kl(self, scored: Sequence[ScoredRollout]) -> list[np.ndarray]:
        """KL(student, teacher) at every action of every rollout, one [actions] array each."""
        batch, _ = pack(scored, logprob_floor=self._config.objective.teacher_logprob_floor)
        kl = self._parts.learner.score_student(batch).reverse_kl
        assert kl is not None
        return [kl[a:b][batch.loss_mask[a:b]].double().numpy() for a, b in pairwise(batch.offsets)]

    def _evaluation_set(self, task: str, split: str, teacher: str) -> list[Prompt]:
        mine = [p for p in self._task_data.prompts[task][split] if p.teacher == teacher]
        # The same prompts whatever the run's seed, so that runs can be compared.
        return pick(mine, self._config.evaluation.num_prompts, seed=0)
