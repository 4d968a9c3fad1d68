"""Whose score a kept one is: all that it depends on beside the response, and what shows a teacher to be the one that it was."""

from collections.abc import Collection
from typing import Any

import numpy as np

from opd.config import Config
from opd.records import FailedScore, Prompt, Rollout, Turn
from opd.roles import INITIAL_STUDENT, Backend, Teacher
from opd.score_cache.files import Probe
from opd.text.tokenizer import PROBE

_LOWEST = -50.0  # a probability of 0 has no distance


def identities(config: Config, backend: Backend) -> dict[str, dict[str, Any]]:
    """Of each teacher that prompts may name: plain values that differ wherever its scores may.

    Left out is what moves scores by rounding alone (the device, the packing), and what they do not depend on, such as seeds and the
    optimizer.
    """
    facts = backend.facts()
    found: dict[str, dict[str, Any]] = {}
    for name, teacher in config.teachers.items():
        identity: dict[str, Any] = {"name": name, "temperature": config.temperature}
        if teacher.remote:
            # nothing else is known of its weights but what the probe says
            identity["model"] = backend.identities[f"teacher '{name}'"]
            identity["named"] = config.objective.top_k if config.objective.type == "top_k" else 0
            if teacher.engines is not None:
                identity["engine"] = [config.compute.dtype, teacher.engine_args]
            found[name] = identity
            continue
        weights = teacher.weights or {name: 1.0}
        identity["models"] = {
            part: [weight, backend.identities[f"teacher '{part}'"]] for part, weight in weights.items()
        }
        # whose own chat template, and which clock it reads, renders what they are shown
        tokenizers = {part: backend.identities.get(f"the tokenizer of teacher '{part}'") for part in weights}
        if name not in facts.cross_tokenizer and any(tokenizers.values()):
            identity["prompts"] = tokenizers
        identity["states"] = config.objective.needs_distributions
        identity["dtype"] = "mixed" if config.cluster.mixed_precision else config.compute.dtype
        if name in facts.cross_tokenizer:
            found[name] = identity | _reading(config, backend, name)
            continue
        identity["vocab_size"] = facts.vocab_size  # what is behind it has no probability
        if (reference := config.objective.reference) is not None:
            who = INITIAL_STUDENT if reference == "student" else reference
            identity["reference"] = [reference, config.objective.extrapolation, backend.identities[f"teacher '{who}'"]]
            if own := backend.identities.get(f"the tokenizer of teacher '{who}'"):
                identity["reference"].append(own)
        found[name] = identity
    return found


def _reading(config: Config, backend: Backend, name: str) -> dict[str, Any]:
    """How a teacher of another tokenizer reads what the student wrote."""
    return {
        "student": config.student,  # its tokens and what it declares as their end
        "ends": "as templates write them",
        "tokenizers": [
            backend.identities["the student's tokenizer"],
            backend.identities[f"the tokenizer of teacher '{name}'"],
        ],
        "cells": config.objective.type == "top_k",
        "floor": config.objective.teacher_logprob_floor,
        "non_canonical": config.alignment.non_canonical,
        "tool_calls": [config.alignment.tool_calls, config.episodes.tool_syntax],
        "vocab_size": backend.facts().cross_tokenizer[name],
    }


def probe(teacher: Teacher, names: Collection[str], *, known: Collection[str], tokenizer: Any) -> dict[str, Probe]:
    """What each teacher says of a probe text [tokens - 1], nats, or why it does not; of those `known` by their weights nothing.

    A server may hold other weights tomorrow under the name of today.
    """
    token_ids = np.array(tokenizer(PROBE, add_special_tokens=False).input_ids, dtype=np.int32)
    found: dict[str, Probe] = {name: np.zeros(0, dtype=np.float32) for name in names}
    asked = [_probe_of(name, token_ids) for name in names if name not in known]
    for item in teacher.score(asked) if asked else []:
        name = item.rollout.prompt.teacher
        if isinstance(item.score, FailedScore):
            found[name] = item.score.reason
        else:
            found[name] = np.maximum(item.score.logprobs[1:], np.float32(_LOWEST))
    return found


def _probe_of(teacher: str, token_ids: np.ndarray) -> Rollout:
    """The probe text, all but its first token written by the student."""
    messages = ({"role": "user", "content": ""}, {"role": "assistant", "content": PROBE})
    size = len(token_ids)
    return Rollout(
        prompt=Prompt(f"probe of {teacher}", messages[:1], teacher=teacher, task="probe"),
        sample=0,
        token_ids=token_ids,
        loss_mask=np.arange(size) >= 1,
        rollout_logprobs=np.zeros(size, dtype=np.float32),
        turns=(Turn("prompt", 0, 1), Turn("student", 1, size)),
        messages=messages,
        finish="end",
        policy_version=0,
    )
