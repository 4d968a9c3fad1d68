"""What each claim of the theory has to notice: replacements of the objects that it names, by something wrong.

A sabotage takes the place of an object wherever `opd` or `opd_theory` refers to it. Add one for each object that a claim names.
"""

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

import pytest
import torch

from opd.objectives import advantages, divergences, vocabulary
from opd.objectives.reduce import masked
from opd.text import chunks as alignment
from opd_theory import estimators, top_k_claims

Make: TypeAlias = Callable[[Any], Callable[..., Any]]  # the original -> what takes its place


@dataclass
class Sabotage:
    """`target` is "module:name" or "module:Class.name", in `opd` unless it names `opd_theory`; `calls` counts its calls."""

    target: str
    make: Make
    calls: int = field(default=0, init=False)

    def apply(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        module, name = self.target.split(":")
        owner: Any = importlib.import_module(f"opd.{module}" if not module.startswith("opd_theory.") else module)
        *outer, name = name.split(".")
        for part in outer:
            owner = getattr(owner, part)
        original = vars(owner)[name]
        if isinstance(original, cached_property):
            wrong: Any = cached_property(self._counted(original.func))
            wrong.__set_name__(owner, name)
        else:
            wrong = self._counted(original)
        monkeypatch.setattr(owner, name, wrong)
        for other in [m for key, m in sys.modules.items() if key.partition(".")[0] in ("opd", "opd_theory")]:
            for alias, value in list(vars(other).items()):
                if value is original:
                    monkeypatch.setattr(other, alias, wrong)

    def _counted(self, original: Callable[..., Any]) -> Callable[..., Any]:
        made = self.make(original)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return made(*args, **kwargs)

        return call


def scaled(factor: float) -> Make:
    return lambda f: lambda *args, **kwargs: factor * f(*args, **kwargs)


def instead(other: Callable[..., Any]) -> Make:
    """Another function with the same arguments."""
    return lambda f: other


def adding(extra: Callable[..., Any]) -> Make:
    return lambda f: lambda *args, **kwargs: f(*args, **kwargs) + extra(*args, **kwargs)


def first_arguments(count: int) -> Make:
    """Without the arguments behind the first ones, as if it did not know of them."""
    return lambda f: lambda *args, **kwargs: f(*args[:count])


# The originals: what a sabotage is made of must not be replaced with it.
_IMMEDIATE, _TO_GO, _LATER_KL = advantages.immediate, advantages.log_ratio_to_go, advantages.future_kl
_FULL, _VOCABULARY, _ALIGN = advantages.full_trajectory, vocabulary.vocabulary_loss, alignment.align
_FORWARD, _REVERSE = divergences.forward_kl, divergences.reverse_kl


def with_its_own_sample(values, mask, group_ids, *, per="step"):
    """The mean of the whole group at each step."""
    _, group = torch.unique(group_ids, return_inverse=True)
    zeros = values.new_zeros(int(group.max()) + 1, values.shape[1])
    total = zeros.index_add(0, group, masked(values, mask))
    count = zeros.index_add(0, group, mask.to(values.dtype))
    return masked((total / count.clamp(min=1))[group], mask)


def how_changed(**changes: Any) -> Make:
    """`vocabulary_loss` under another `VocabularyLoss`."""
    return lambda f: lambda s, head, t, w, how, **kw: f(s, head, t, w, replace(how, **changes), **kw)


def loss_scaled(factor: float) -> Make:
    def make(f: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            loss, stats = f(*args, **kwargs)
            return factor * loss, stats

        return call

    return make


def teachers_changed(change: Callable[[Any], Any]) -> Make:
    return lambda f: lambda s, head, teachers, *rest, **kw: f(s, head, [change(t) for t in teachers], *rest, **kw)


def entropies_scaled(factor: float) -> Make:
    def make(f: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            found = f(*args, **kwargs)
            return found._replace(entropy=factor * found.entropy)

        return call

    return make


def one_chunk(ours, theirs):
    found = _ALIGN(ours, theirs)
    return alignment.Chunks(0 * found.student, 0 * found.teacher, found.ends[-1:])


ADV, BASE, TREE, EST = (
    "objectives.advantages:",
    "objectives.baselines:",
    "opd_theory.tree:Policy.",
    "opd_theory.estimators:",
)
VOCABULARY_LOSS = "objectives.vocabulary:vocabulary_loss"

TO_GO_DOUBLED = Sabotage(ADV + "log_ratio_to_go", scaled(2.0))
TO_GO_HALVED = Sabotage(ADV + "log_ratio_to_go", scaled(0.5))
TO_GO_WITHOUT_LATER = Sabotage(ADV + "log_ratio_to_go", instead(lambda r, m, *rest: masked(r, m)))
IMMEDIATE_HALVED = Sabotage(ADV + "immediate", scaled(0.5))
KL_TO_GO_IS_IMMEDIATE = Sabotage(ADV + "kl_to_go", instead(lambda r, kl, m, *rest: _IMMEDIATE(r, m)))
KL_TO_GO_REWARDS = Sabotage(
    ADV + "kl_to_go", instead(lambda r, kl, m, *rest: _IMMEDIATE(r, m) - _LATER_KL(kl, m, *rest))
)
FUTURE_OF_WRONG_SIGN = Sabotage(ADV + "future_kl", scaled(-1.0))
OWN_SAMPLE = Sabotage(BASE + "leave_one_out", instead(with_its_own_sample))
EXACT_HALVED = Sabotage(EST + "exact_gradients", scaled(0.5))
REWARD_HALVED = Sabotage(ADV + "reward_advantages", scaled(0.5))
NEGATIVE_REINFORCE = Sabotage("objectives.losses:reinforce", scaled(-1.0))

SABOTAGES: Mapping[str, Mapping[str, Sabotage]] = {
    "theorem_1": {
        "(i) is (ii)": Sabotage(ADV + "full_trajectory", instead(lambda r, m: _TO_GO(r, m))),
        "a to-go of half the scale": TO_GO_HALVED,
        "a to-go that begins a step late": Sabotage(
            ADV + "log_ratio_to_go", instead(lambda r, m, *rest: _TO_GO(r, m, *rest) - masked(r, m))
        ),
        "KL-to-go without its future": KL_TO_GO_IS_IMMEDIATE,
        "KL-to-go that counts its own state": Sabotage(
            ADV + "kl_to_go", adding(lambda r, kl, m, *rest: -masked(kl, m))
        ),
        "the future KL of the wrong sign": FUTURE_OF_WRONG_SIGN,
        "half of V(s) as the baseline": Sabotage(TREE + "state_value", scaled(0.5)),
        "half of the exact term": EXACT_HALVED,
        "a descent that climbs": NEGATIVE_REINFORCE,
        "half of V": Sabotage(TREE + "value", scaled(0.5)),
    },
    "objective_forms": {
        "half of the entropy": Sabotage("objectives.vocabulary:state_statistics", entropies_scaled(0.5)),
        "the forward KL": Sabotage("objectives.divergences:reverse_kl", instead(_FORWARD)),
        "an occupancy that sums to one": Sabotage(
            TREE + "occupancy", lambda f: lambda p: f(p) / f(p).sum()
        ),
        "a to-go without what comes later": TO_GO_WITHOUT_LATER,
        "log ratios of the wrong sign": Sabotage(TREE + "log_ratio", scaled(-1.0)),
        "half of V": Sabotage(TREE + "value", scaled(0.5)),
    },
    "theorem_2": {
        "nonsense for the future KL": Sabotage(ADV + "future_kl", instead(lambda kl, m, *rest: m.to(kl.dtype))),
        "nonsense for KL-to-go": Sabotage(ADV + "kl_to_go", instead(lambda r, kl, m, *rest: masked(r * kl, m))),
        "nonsense for the log-ratio-to-go": Sabotage(
            ADV + "log_ratio_to_go", instead(lambda r, m, *rest: masked(r * r, m))
        ),
        "a to-go that counts the past": Sabotage(ADV + "log_ratio_to_go", instead(lambda r, m, *rest: _FULL(r, m))),
        "an occupancy of twice the size": Sabotage(TREE + "occupancy", scaled(2.0)),
        "g1 and g2 in one": Sabotage(TREE + "g1", lambda f: lambda p: p.gradient()),
        "g2 of the wrong sign": Sabotage(TREE + "g2", scaled(-1.0)),
        "twice b*": Sabotage(BASE + "score_weighted", scaled(2.0)),
        "the KL as a baseline of the wrong sign": Sabotage(BASE + "negative_kl", scaled(-1.0)),
    },
    "variance_order": {
        "a to-go of wrong scale": TO_GO_DOUBLED,
        "a leave-one-out that contains its own sample": OWN_SAMPLE,
        "a full trajectory of wrong scale": Sabotage(ADV + "full_trajectory", scaled(1.5)),
        "KL-to-go without its future": KL_TO_GO_IS_IMMEDIATE,
        "nine tenths of the exact term": Sabotage(EST + "exact_gradients", scaled(0.9)),
        "the wrong V(s)": Sabotage(TREE + "state_value", scaled(0.0)),
    },
    "crossover_claim": {
        "a leave-one-out that contains its own sample": OWN_SAMPLE,
        "a future KL without its discount": Sabotage(ADV + "future_kl", first_arguments(2)),
        "half of the immediate log ratio": IMMEDIATE_HALVED,
        "a number a prompt for a number a step": Sabotage(
            BASE + "leave_one_out", lambda f: lambda *args, per="step": f(*args, per="prompt")
        ),
        "the true value of a step later": Sabotage(
            "opd_theory.horizon:Chain.future", lambda f: lambda *args: f(*args).roll(-1, 0)
        ),
    },
    "reversal": {
        "a to-go of wrong scale": TO_GO_DOUBLED,
        "a to-go without what comes later": TO_GO_WITHOUT_LATER,
        "half of the immediate log ratio": IMMEDIATE_HALVED,
        "KL-to-go with the log ratios to come": Sabotage(
            ADV + "kl_to_go", instead(lambda r, kl, m, *rest: _TO_GO(r, m))
        ),
        "the future KL of the wrong sign": FUTURE_OF_WRONG_SIGN,
    },
    "growth": {
        "half of the full trajectory": Sabotage(ADV + "full_trajectory", scaled(0.5)),
        "a to-go without what comes later": TO_GO_WITHOUT_LATER,
        "twice the immediate log ratio": Sabotage(ADV + "immediate", scaled(2.0)),
        "an exact term that is sampled": Sabotage(
            EST + "exact_gradients", instead(lambda p: estimators.trajectory_gradients(p, p.log_ratio))
        ),
    },
    "kl_baseline": {
        "twice b*": Sabotage(BASE + "score_weighted", scaled(2.0)),
        "b* without the scores' weights": Sabotage(BASE + "score_weighted", lambda f: lambda p, q: -_REVERSE(p, q)),
        "b* of the costs": Sabotage(BASE + "score_weighted", scaled(-1.0)),
        "the KL of the wrong sign": Sabotage(BASE + "negative_kl", scaled(-1.0)),
        "half of the KL": Sabotage(BASE + "negative_kl", scaled(0.5)),
    },
    "convergence": {
        "a to-go of wrong scale": TO_GO_DOUBLED,
        "a leave-one-out that contains its own sample": OWN_SAMPLE,
        "half of the immediate log ratio": IMMEDIATE_HALVED,
        "a future KL without its last state": Sabotage(
            ADV + "future_kl", lambda f: lambda kl, m, *rest: f(torch.cat([kl[:, :-1], 0 * kl[:, -1:]], 1), m, *rest)
        ),
        "samples of another student": Sabotage(
            "opd_theory.training_claims:Students.sample",
            lambda f: lambda self, *rest: f(replace(self, tables=0 * self.tables), *rest),
        ),
    },
    "theorem_3": {
        "the immediate log ratio is the to-go": Sabotage(ADV + "immediate", instead(lambda r, m, *rest: _TO_GO(r, m))),
        "no negative log ratios": Sabotage(ADV + "immediate", lambda f: lambda *args: f(*args).clamp(min=0)),
        "a to-go of wrong scale": TO_GO_HALVED,
        "a to-go without its discount": Sabotage(ADV + "log_ratio_to_go", first_arguments(2)),
        "a to-go without what comes later": TO_GO_WITHOUT_LATER,
    },
    "branch_law": {
        "KL-to-go without its future": KL_TO_GO_IS_IMMEDIATE,
        "a future that is rewarded": KL_TO_GO_REWARDS,
        "KL-to-go without its discount": Sabotage(ADV + "kl_to_go", first_arguments(3)),
        "a to-go without its discount": Sabotage(ADV + "log_ratio_to_go", first_arguments(2)),
        "a to-go without what comes later": TO_GO_WITHOUT_LATER,
    },
    "top_k_tails": {
        "twice the loss": Sabotage(VOCABULARY_LOSS, loss_scaled(2.0)),
        "half of the tokens": Sabotage(
            VOCABULARY_LOSS, lambda f: lambda s, h, t, w, how, **kw: f(s, h, t, w, replace(how, top_k=how.top_k // 2), **kw)
        ),
        "no support": Sabotage(VOCABULARY_LOSS, how_changed(top_k=None)),
        "the forward KL": Sabotage("objectives.divergences:reverse_kl", instead(_FORWARD)),
    },
    "biased_head": {
        "a tail with the + 1": Sabotage(
            "opd_theory.top_k_claims:sampled_tail", instead(top_k_claims.head_by_autodiff)
        ),
        "half of the tail": Sabotage("opd_theory.top_k_claims:sampled_tail", scaled(0.5)),
        "a head without the + 1": Sabotage(
            "opd_theory.top_k_claims:head_by_autodiff", instead(top_k_claims.sampled_tail)
        ),
        "no residual": Sabotage(VOCABULARY_LOSS, how_changed(tail_residual=False)),
    },
    "k_estimators": {
        "k1 is k2": Sabotage("opd_theory.top_k_claims:k1", instead(top_k_claims.k2)),
        "k2 without its half": Sabotage("opd_theory.top_k_claims:k2", scaled(2.0)),
        "k3 of the inverse ratio": Sabotage("opd_theory.top_k_claims:k3", lambda f: lambda r: f(-r)),
        "the reverse KL is the forward one": Sabotage("objectives.divergences:reverse_kl", instead(_FORWARD)),
        "the forward KL is the reverse one": Sabotage("objectives.divergences:forward_kl", instead(_REVERSE)),
    },
    "mask_law": {
        "half of the immediate log ratio": IMMEDIATE_HALVED,
        "half of the reward": REWARD_HALVED,
        "the KL baseline of the wrong sign": Sabotage(BASE + "negative_kl", scaled(-1.0)),
    },
    "tilt_law": {
        "half of the reward": REWARD_HALVED,
        "half of the immediate log ratio": IMMEDIATE_HALVED,
        "a reward that is not counted": Sabotage(ADV + "reward_advantages", scaled(0.0)),
    },
    "several_teachers": {
        "teachers of equal weight": Sabotage(VOCABULARY_LOSS, teachers_changed(lambda t: t._replace(weight=0.5))),
        "the forward KL": Sabotage(VOCABULARY_LOSS, how_changed(divergence="forward_kl")),
        "another temperature": Sabotage(VOCABULARY_LOSS, how_changed(temperature=2.0)),
        "half of grad V": Sabotage(TREE + "gradient", scaled(0.5)),
    },
    "extrapolation": {
        "a reference that attracts": Sabotage(VOCABULARY_LOSS, teachers_changed(lambda t: t._replace(weight=abs(t.weight)))),
        "no reference": Sabotage(
            VOCABULARY_LOSS, lambda f: lambda s, h, teachers, *rest, **kw: f(s, h, teachers[:1], *rest, **kw)
        ),
        "a floor in the way": Sabotage(VOCABULARY_LOSS, how_changed(logprob_floor=-1.0)),
        "half of the loss": Sabotage(VOCABULARY_LOSS, loss_scaled(0.5)),
    },
    "staleness": {
        "importance weights of 1": Sabotage(
            "objectives.corrections:importance_weights", instead(lambda s, r, m, *rest: m.to(s.dtype))
        ),
        "inverse importance weights": Sabotage(
            "objectives.corrections:importance_weights",
            lambda f: lambda s, r, *rest: f(r, s, *rest),
        ),
        "weights of whole responses": Sabotage(
            "objectives.corrections:importance_weights", lambda f: lambda s, r, m: f(s, r, m, "sequence")
        ),
        "half of the immediate log ratio": IMMEDIATE_HALVED,
        "an exact term of half the size": Sabotage(
            "opd_theory.training_claims:Students.ascend",
            lambda f: lambda self, walks, a, rates, *, exact: f(self, walks, a, rates * (0.5 if exact else 1.0), exact=exact),
        ),
    },
    "reading": {
        "an encoding in letters": Sabotage("opd_theory.byte_claims:ToyTokenizer.encode", lambda f: lambda self, text: list(text)),
        "a marginal of one tokenisation": Sabotage(
            "opd_theory.byte_claims:TokenModel._covers", lambda f: lambda self, text: iter([tuple(text)])
        ),
        "a prefix that ends with a token": Sabotage(
            "opd_theory.byte_claims:TokenModel.prefix_marginal",
            lambda f: lambda self, text: self.logprob(self.tokenizer.encode(text)),
        ),
        "conversion by the teacher's own encoding": Sabotage(
            "opd_theory.byte_claims:converted", instead(lambda text, student, teacher: teacher.encode(text))
        ),
    },
    "credit": {
        "all in one chunk": Sabotage("text.chunks:align", instead(one_chunk)),
        "a to-go of wrong scale": TO_GO_HALVED,
        "a to-go without what comes later": TO_GO_WITHOUT_LATER,
        "all of log q less all of log pi": Sabotage(
            "opd_theory.byte_claims:whole_teacher", instead(lambda path: path.log_ratio.sum().expand(len(path.chunks)))
        ),
        "half of what is shared evenly": Sabotage("opd_theory.byte_claims:shared_evenly", scaled(0.5)),
    },
    "comparison": {
        "a cell for each token": Sabotage(
            "text.tokenizer:shared_vocabulary",
            lambda f: lambda *args: replace(f(*args), student=f(*args).student[::-1].copy()),
        ),
        "all in one chunk": Sabotage("text.chunks:align", instead(one_chunk)),
        "no chunks": Sabotage(ADV + "log_ratio_to_go", first_arguments(3)),
        "half of the comparison": Sabotage(VOCABULARY_LOSS, loss_scaled(0.5)),
    },
    **{
        hack: {
            "a to-go without what comes later": TO_GO_WITHOUT_LATER,
            "KL-to-go without its future": KL_TO_GO_IS_IMMEDIATE,
            "half of the reward": REWARD_HALVED,
        }
        for hack in ("quick_answer", "attractor", "loop", "early_end", "parser_exploit")
    },
}  # fmt: skip
