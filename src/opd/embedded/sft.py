"""Supervised fine-tuning as a special case of the learner: every advantage is 1, the tokens are the answer's."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from opd.batch import Batch
from opd.errors import DataError
from opd.records import Prompt
from opd.text.chat import encode_prompt


def answer_batch(tokenizer: Any, prompts: Sequence[Prompt]) -> Batch:
    """A Batch whose actions are the tokens of the reference answers and the end token.

    The policy-gradient loss of unit advantages is the negative log-likelihood. Raises DataError naming a prompt without
    an answer.
    """
    ids: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    for prompt in prompts:
        if not prompt.answer:
            raise DataError(f"prompt '{prompt.id}' has no answer to learn from; add \"answer\" to the record")
        head = encode_prompt(tokenizer, prompt)
        tail = [*tokenizer(prompt.answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        ids.append(np.array([*head, *tail], dtype=np.int64))
        masks.append(np.arange(len(ids[-1])) >= len(head))
    flat = torch.from_numpy(np.concatenate(masks))
    return Batch(
        rollout_ids=tuple(p.id for p in prompts),
        teachers=tuple(p.teacher for p in prompts),
        lengths=torch.tensor([len(i) for i in ids]),
        group_ids=torch.arange(len(prompts)),
        rewards=torch.full((len(prompts),), float("nan")),
        token_ids=torch.from_numpy(np.concatenate(ids)),
        truncated=torch.zeros(len(prompts), dtype=torch.bool),
        loss_mask=flat,
        train_mask=flat,
        distill_mask=flat,
        rollout_logprobs=torch.zeros(len(flat)),
        teacher_logprobs=torch.zeros(len(flat)),
        advantages=flat.float(),
    )
