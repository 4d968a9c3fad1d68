"""[objective], [mask] and [reward]: the loss of the student (docs/concepts/objectives.md)."""

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
    """Importance weights for samples of a policy that differs a little from the student: of an older version, or of an engine
    with other rounding.

    type: "truncate" limits a weight to `cap`; "reject" leaves out tokens whose weight is outside [`low`, `high`], from the
    normaliser too. level: a weight of each token, of the geometric mean of a sequence, or of a whole sequence.
    """

    type: Literal["none", "truncate", "reject"] = "none"
    level: Literal["token", "geometric", "sequence"] = "token"
    cap: Annotated[float, Field(ge=1)] = 2.0
    low: Annotated[float, Field(gt=0, le=1)] = 0.5
    high: Annotated[float, Field(ge=1)] = 2.0

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> "CorrectionConfig":
        reject, either = ("type", ("reject",)), ("type", ("truncate", "reject"))
        self.require_owners({"cap": ("type", ("truncate",)), "low": reject, "high": reject, "level": either})
        return self


class ObjectiveConfig(Node):
    """The distillation term, multiplied by `coef`.

    teacher_logprob_floor: nats; lower log-probabilities of a teacher are raised to it, so that one token has a bounded cost.
    Metrics count the tokens that were raised.
    """

    coef: Annotated[float, Field(ge=0)] = 1.0
    type: Literal["exact", "exact_to_go", "top_k", "immediate", "to_go", "kl_to_go"] = "exact"
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"
    jsd_beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    top_k: Positive = 32
    top_k_tail: Literal["bucket"] = "bucket"
    tail_residual: bool = False
    discount: Annotated[float, Field(ge=0, le=1)] | None = None
    baseline: Literal["none", "leave_one_out", "kl", "score_weighted"] = "none"
    extrapolation: Annotated[float, Field(gt=0)] = 1.0
    reference: str | None = None
    loss: Literal["reinforce", "ppo"] = "reinforce"
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    clip_high: Annotated[float, Field(gt=0)] = 0.2
    clip_dual: Annotated[float, Field(gt=1)] | None = None
    epochs: Positive = 1
    correction: CorrectionConfig = CorrectionConfig()
    normalizer: Literal["trajectory", "token", "constant"] = "trajectory"
    constant: Annotated[float, Field(gt=0)] | None = None
    teacher_logprob_floor: Annotated[float, Field(lt=0)] = -50.0

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
                "corrections and epochs > 1 do not weigh the sampled term of tail_residual: its mean would differ from the reverse "
                "KL; drop one"
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
    """The tokens that the distillation term leaves out of an episode with a format error (`tasks.NAME.checks`).

    format_errors: "trajectory": all tokens; "suffix": all from the first error on; "turn": all of each turn with an error; "span":
    the tokens of the errors. The reward still acts on all tokens.
    """

    format_errors: Literal["off", "trajectory", "suffix", "turn", "span"] = "off"


class RewardConfig(Node):
    """A policy gradient from the reward, added to the distillation advantage. It acts on every episode, masked ones too.

    format_error: the reward of every episode with a format error, in place of its own. Verifiers give at least 0; a value below 0
    makes an error cost something.
    """

    coef: Annotated[float, Field(ge=0)] = 0.0
    format_error: Annotated[float, Field(le=0)] = -1.0
    baseline: Literal["leave_one_out", "group_mean", "grpo", "none"] = "leave_one_out"
