"""[objective], [mask] and [reward]: the loss of the student."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from opd.config.node import Node, Positive

_INTEGRATED = ("exact", "top_k")
_FUTURE = ("to_go", "kl_to_go", "exact_to_go")
_REFUSED_TYPES = {
    "k1": "backpropagating k1 = log pi - log q through the sampled token has an expected gradient of zero; as an advantage it "
    "is type = 'immediate'",
    "k2": "half the squared log ratio has the gradient of type = 'immediate', sample by sample; write 'immediate'",
    "k3": "backpropagating k3 = exp(r) - 1 - r follows the forward KL's direction under the reverse KL's name; write "
    "'immediate', or type = 'exact' with divergence = 'forward_kl'",
}
_REFUSED_TAILS = {
    "renormalize": "a KL renormalised over the top k ignores the student's mass outside them (it ends at 0.18 nats where the "
    "bucket ends at 0.05, k = 32; opd theory, claim 9)",
    "drop": "a sum over the top k without a tail pushes mass out of the top k (it ends at 2.7 nats, above its start; opd "
    "theory, claim 9)",
}


class CorrectionConfig(Node):
    """Importance weights for samples of a policy that differs from the student: an older version, or an engine with other
    rounding."""

    type: Literal["none", "truncate", "reject"] = "none"
    """The correction. "truncate" limits weights to `cap`; "reject" leaves out tokens with a weight outside [`low`, `high`], from
    the normaliser too. "none", because by default the student samples for itself."""
    level: Literal["token", "geometric", "sequence"] = "token"
    """The unit that has a weight. "geometric" is the mean over an episode, "sequence" the product over it."""
    cap: Annotated[float, Field(ge=1)] = 2.0
    """With "truncate": the largest weight."""
    low: Annotated[float, Field(gt=0, le=1)] = 0.5
    """With "reject": the smallest weight that trains."""
    high: Annotated[float, Field(ge=1)] = 2.0
    """With "reject": the largest weight that trains."""

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> "CorrectionConfig":
        reject, either = ("type", ("reject",)), ("type", ("truncate", "reject"))
        self.require_owners({"cap": ("type", ("truncate",)), "low": reject, "high": reject, "level": either})
        return self


class ObjectiveConfig(Node):
    """The distillation term of the loss. [Objectives](../concepts/objectives.md) says when to use which."""

    coef: Annotated[float, Field(ge=0)] = 1.0
    """The weight of the distillation term. At 0 the reward alone trains."""
    type: Literal["exact", "exact_to_go", "top_k", "immediate", "to_go", "kl_to_go"] = "exact"
    """The estimator of the gradient. "exact" has the least variance and needs no group of samples, but whole distributions of the
    teacher. For a teacher behind a server write "top_k", "immediate" or "to_go"."""
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"
    """With "exact": the divergence of student and teacher. The others are other objectives, not other estimators."""
    jsd_beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """With divergence "jsd": the weight of the teacher in the mixture, as GKD's beta."""
    top_k: Positive = 32
    """With "top_k": the number of likeliest tokens of each model that are compared. 32 left 0.046 nats on one state of 512
    tokens, where 8 left 0.127 and the whole vocabulary 0.009 (`opd theory`, claim 9). A vLLM server gives at most 20 by default."""
    top_k_tail: Literal["bucket"] = "bucket"
    """With "top_k": the treatment of all other tokens. One bucket is the only safe one, and opd refuses others with the reason."""
    tail_residual: bool = False
    """With "top_k": adds a sampled term that takes away the bias of the bucket. Off, because it adds variance and needs whole
    distributions."""
    discount: Annotated[float, Field(ge=0, le=1)] | None = None
    """The discount of later tokens, required by the three types that end in "to_go". 0 is the immediate term, 1 the unbiased sum.
    opd warns above 0.9: there the student learns to end early or to enter easy branches."""
    baseline: Literal["none", "leave_one_out", "kl", "score_weighted"] = "none"
    """The baseline of a sampled advantage. "exact_to_go" requires "leave_one_out", which needs `sampling.group_size` of 2 or more.
    "none", because "exact" has no sampled advantage."""
    extrapolation: Annotated[float, Field(gt=0)] = 1.0
    """The factor of the step from the reference to the teacher. Above 1 the student goes past the teacher."""
    reference: str | None = None
    """The model from which to extrapolate: "student" (as it was before the first step) or the name of a teacher."""
    loss: Literal["reinforce", "ppo"] = "reinforce"
    """The loss of sampled advantages. "ppo" clips them and allows several epochs; in the first epoch on fresh samples there is
    nothing to clip."""
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """With "ppo": ratios below 1 - `clip_low` are clipped. 0.2 is the value of the PPO paper."""
    clip_high: Annotated[float, Field(gt=0)] = 0.2
    """With "ppo": ratios above 1 + `clip_high` are clipped. 0.2 is the value of the PPO paper."""
    clip_dual: Annotated[float, Field(gt=1)] | None = None
    """With "ppo": the largest ratio that counts for a negative advantage."""
    epochs: Positive = 1
    """The updates on each batch. More than 1 needs "ppo", because REINFORCE has no ratio for a student that has changed."""
    correction: CorrectionConfig = CorrectionConfig()
    normalizer: Literal["trajectory", "token", "constant"] = "trajectory"
    """The divisor of the loss: episodes, tokens, or `constant`. "trajectory" estimates the gradient of the objective; "token" does
    not, because long and short responses then weigh the same per token. Use "constant" with a mask on a sampled advantage."""
    constant: Annotated[float, Field(gt=0)] | None = None
    """With normalizer "constant": the divisor, such as `prompts_per_step` times `group_size`."""
    teacher_logprob_floor: Annotated[float, Field(lt=0)] = -50.0
    """The lowest log-probability of each model of a teacher, in nats. Lower ones are raised to it, so that one token has a bounded
    cost; `batch/floored/sum` counts them."""

    @property
    def integrated(self) -> bool:
        """Whether the immediate part is a sum over the vocabulary instead of the value of the sampled token."""
        return self.type in (*_INTEGRATED, "exact_to_go")

    @property
    def needs_distributions(self) -> bool:
        """Whether teachers must give whole distributions."""
        return self.integrated or self.type == "kl_to_go" or self.baseline in ("kl", "score_weighted")

    @property
    def needs_student_scores(self) -> bool:
        """Whether the advantages need the student's own distributions at every action, before the update."""
        from_kl = self.type in ("kl_to_go", "exact_to_go") or self.baseline in ("kl", "score_weighted")
        return from_kl or self.correction.type != "none"

    @property
    def centred(self) -> bool:
        """Whether a trajectory that the distillation term leaves out is neither rewarded nor punished on average. Leave-one-out
        fulfils this approximately.

        A KL baseline is the mean of the immediate log ratio alone; the later part keeps its mean.
        """
        return self.exactly_centred or self.baseline == "leave_one_out"

    @property
    def exactly_centred(self) -> bool:
        """Whether such a trajectory is neither rewarded nor punished at all."""
        integrated = self.type in _INTEGRATED and not self.tail_residual
        return integrated or (self.type == "immediate" and self.baseline == "kl")

    @field_validator("type", mode="before")
    @classmethod
    def _no_wrong_estimator(cls, value: object) -> object:
        if isinstance(value, str) and value in _REFUSED_TYPES:
            raise ValueError(_REFUSED_TYPES[value])
        return value

    @field_validator("top_k_tail", mode="before")
    @classmethod
    def _no_wrong_tail(cls, value: object) -> object:
        if isinstance(value, str) and value in _REFUSED_TAILS:
            raise ValueError(f"{_REFUSED_TAILS[value]}; leave top_k_tail = 'bucket'")
        return value

    @model_validator(mode="after")
    def _fits_the_type(self) -> "ObjectiveConfig":
        kind = self.type
        if kind in _FUTURE and self.discount is None:
            raise ValueError(
                f"type = '{kind}' needs a discount: 0 is the immediate term, 1 the unbiased sum (docs/concepts/objectives.md)"
            )
        if self.discount is not None and kind not in _FUTURE:
            other = "exact_to_go" if kind in _INTEGRATED else "to_go"
            raise ValueError(f"type = '{kind}' has no future part to discount; drop discount or write type = '{other}'")
        if kind == "exact_to_go" and self.baseline != "leave_one_out":
            raise ValueError(
                f"type = 'exact_to_go' needs baseline = 'leave_one_out', got '{self.baseline}': the future KL is never "
                "positive, and without one every response is pushed down by its length"
            )
        if kind in _INTEGRATED and self.baseline != "none":
            raise ValueError(f"type = '{kind}' has no sampled advantage: drop baseline, or write type = 'exact_to_go'")
        return self

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> "ObjectiveConfig":
        top_k, ppo = ("type", ("top_k",)), ("loss", ("ppo",))
        self.require_owners(
            {
                "divergence": ("type", ("exact",)),
                "jsd_beta": ("divergence", ("jsd",)),
                "top_k": top_k,
                "tail_residual": top_k,
            }
            | dict.fromkeys(("clip_low", "clip_high", "clip_dual"), ppo)
        )
        if self.tail_residual and (self.correction.type != "none" or self.epochs > 1):
            raise ValueError(
                "corrections and epochs > 1 do not reweight the sampled term of tail_residual, so its mean would differ from the "
                "reverse KL; remove tail_residual, or set correction.type = 'none' and epochs = 1"
            )
        return self

    @model_validator(mode="after")
    def _combinations(self) -> "ObjectiveConfig":
        if (self.constant is not None) != (self.normalizer == "constant"):
            raise ValueError("normalizer = 'constant' and a value for 'constant' go together")
        if self.epochs > 1 and self.loss != "ppo":
            raise ValueError(
                "epochs > 1 needs loss = 'ppo': REINFORCE has no ratio for a student that has changed since it sampled"
            )
        if self.extrapolation != 1.0 and self.discount:
            raise ValueError(
                f"extrapolation with discount = {self.discount:g}: the extrapolated target is not normalised, so the future part "
                "would reward length; write discount = 0 or a type without one"
            )
        if (self.extrapolation != 1.0) != (self.reference is not None):
            raise ValueError(
                "extrapolation other than 1 and 'reference' go together: the target moves away from the reference, which is "
                "'student' (as it was before the first step) or a name of [teachers]"
            )
        return self


class MaskConfig(Node):
    """The tokens that the distillation term leaves out of an episode with a format error (`tasks.NAME.checks`)."""

    format_errors: Literal["off", "trajectory", "suffix", "turn", "span"] = "off"
    """The tokens that are left out. "trajectory": all; "suffix": all from the first error on; "turn": those of each turn with an
    error; "span": those of the errors alone. The reward still acts on all tokens."""


class RewardConfig(Node):
    """A policy gradient from the reward, added to the distillation advantage. It acts on every episode, masked ones too."""

    coef: Annotated[float, Field(ge=0)] = 0.0
    """The weight of the reward. At 0 opd measures the reward and does not train on it."""
    format_error: Annotated[float, Field(le=0)] = -1.0
    """The reward of every episode with a format error, in place of its own. Verifiers give at least 0, so a value below 0 makes
    an error cost something; with 0 beside a mask errors would pay."""
    baseline: Literal["leave_one_out", "group_mean", "grpo", "none"] = "leave_one_out"
    """The baseline among the samples of one prompt. "leave_one_out" is unbiased; "grpo" also divides by the standard deviation of
    the group. All but "none" need `sampling.group_size` of 2 or more."""
