"""A short supervised warm-up on responses of the teachers, for a student that is far from them.

A student that cannot yet take a turn learns little on its own states: its teachers find all of its attempts improbable. Some
steps on the teachers' own responses bring it to where on-policy distillation works.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence

from opd.config import ObjectiveConfig, OptimizerConfig
from opd.data.tasks import PromptStream
from opd.episodes.player import Demonstrator, Replay, recorded_turn
from opd.errors import DataError
from opd.local.backend import LocalBackend
from opd.local.learner import LocalLearner, imitation_batch
from opd.local.sampler import chat_of, episode_player
from opd.metrics import values
from opd.records import Prompt, Rollout
from opd.roles import generator_of
from opd.text.chat import Chat


def warm_up(backend: LocalBackend, prompts: Mapping[str, Sequence[Prompt]], say: Callable[[str], None]) -> None:
    """Fine-tune the student on its teachers' responses to training prompts, `warmup.steps` times a batch of
    `sampling.prompts_per_step`; `say` gets a line for each step with its loss and how many responses were left out.

    Left out are prompts that the teacher's template refuses, and episodes that failed or are longer than the student's context. Of
    a teacher with another tokenizer or template, so are truncated and empty responses: rewritten, they would seem to end there.
    """
    config = backend.config
    rate = config.warmup.lr or config.optimizer.lr
    learner = LocalLearner(
        backend.student.network,
        adapter=backend.student.adapter,
        objective=ObjectiveConfig(type="immediate", normalizer="token"),
        optimizer=OptimizerConfig(lr=rate, schedule="constant", warmup_steps=min(3, config.warmup.steps - 1)),
        steps=config.warmup.steps,
        heads={},
        temperature=config.temperature,
        max_tokens=config.compute.max_tokens,
    )
    weights = {name: task.weight for name, task in config.tasks.items()}
    seed = generator_of(config.seed, "warm-up").initial_seed()  # prompts in another order than training will have them
    stream = PromptStream(prompts, weights, seed=seed)
    for step in range(1, config.warmup.steps + 1):
        chosen = stream.next(config.sampling.prompts_per_step)
        rollouts = _demonstrations(backend, chosen, step)
        missing = len(chosen) - sum(r.part == 0 for r in rollouts)
        left_out = f", {missing} responses left out" if missing else ""
        if not rollouts:
            say(f"warm-up {step}/{config.warmup.steps}: nothing to learn from{left_out}")
            continue
        metrics = learner.forward_backward(imitation_batch(rollouts)) | learner.optim_step()
        say(f"warm-up {step}/{config.warmup.steps}: nll/token {values(metrics)['student/nll/mean']:.4f}{left_out}")


def _demonstrations(backend: LocalBackend, prompts: Sequence[Prompt], step: int) -> list[Rollout]:
    """Each prompt's own teacher's response, in the student's tokens, where it can be learnt from."""
    found: list[Rollout] = []
    limit = backend.student.network.max_context
    for teacher in dict.fromkeys(p.teacher for p in prompts):
        mine = [p for p in prompts if p.teacher == teacher]
        seed = (backend.config.seed, "warm-up", teacher, step)
        policy = backend.policies[teacher]
        chat = chat_of(backend.chat_network(policy))
        rollouts = backend.sampler(policy).sample([p for p in mine if _accepts(chat, p)], num_samples=1, seed=seed)
        rollouts = [r for r in rollouts if r.failure is None and r.num_actions]
        # the student never reads text in the teacher's own template
        found += rollouts if policy.prompts is None else _rewritten(backend, rollouts)
    # a teacher's context may be longer than the student's
    long = {(r.prompt.id, r.sample) for r in found if limit is not None and len(r.token_ids) > limit}
    return [r for r in found if r.failure is None and r.num_actions and (r.prompt.id, r.sample) not in long]


def _accepts(chat: Chat, prompt: Prompt) -> bool:
    """Whether a chat template accepts a prompt; start-up checks that the student's accepts all."""
    with contextlib.suppress(DataError):
        return bool(chat.encode_prompt(prompt))
    return False


def _rewritten(backend: LocalBackend, rollouts: Sequence[Rollout]) -> list[Rollout]:
    """The same episodes as the student's tokenizer and template write them."""
    network = backend.student.network
    last = {(r.prompt.id, r.sample): r for r in rollouts}  # the part of an episode that holds all of its messages
    whole = [(r, last[r.prompt.id, r.sample].messages[len(r.prompt.messages) :]) for r in rollouts if r.part == 0]
    written = {
        id(r.prompt): messages for r, messages in whole if not r.truncated and all(m["content"] for m in messages)
    }
    usable = [r for r, _ in whole if id(r.prompt) in written]

    def turn(prompt: Prompt, messages: Sequence[Mapping[str, str]]) -> str | None:
        return recorded_turn(written[id(prompt)], len(messages) - len(prompt.messages))

    player = episode_player(network, backend.config.episodes, lambda prompt: Replay(written[id(prompt)]))
    demonstrator = Demonstrator(player.chat, turn)
    return player.play([(r.prompt, r.sample) for r in usable], demonstrator.take_turns, version=0)
