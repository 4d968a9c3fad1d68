"""Warnings at the start about masks that reward the errors that they hide (docs/safeguards.md)."""

from opd.config import Config
from opd.objectives.mask_law import largest_kl

_GROUP_MASK = (
    "warning: mask.format_errors with baseline = 'leave_one_out' and no reward: other samples centre an advantage only where they "
    "still go on, so errors keep a part of their reward (P 0.45 in pairs, 0.21 in groups of 4, where the teacher has 0.10; opd "
    "theory, H-d); set reward.coef > 0, or type = 'exact', or with type = 'immediate' baseline = 'kl'"
)


def mask_warning(config: Config) -> str | None:
    """One line where the mask of a recipe can reward errors, with the bounds that its own numbers give; else None."""
    objective = config.objective
    if config.mask.format_errors == "off" or objective.coef == 0:
        return None
    if not objective.centred:
        return _outweighed(config)
    return _GROUP_MASK if objective.baseline == "leave_one_out" and not config.reward.coef else None


def _outweighed(config: Config) -> str:
    """How much KL the reward outweighs: a bound for every start, and one for a start without errors."""
    objective, reward = config.objective, config.reward
    coef = reward.coef / objective.coef
    # "grpo" divides by what the rewards of a group differ by
    weight = coef if reward.baseline == "grpo" else coef * (1.0 - reward.format_error)
    everywhere, best = largest_kl(
        weight, objective.normalizer, baseline=reward.baseline, group_size=config.sampling.group_size
    )
    text = (
        "warning: mask.format_errors with an uncentred advantage rewards errors unless the reward outweighs the KL that a response"
        f" without errors pays. At reward 1, errors fade from every start below {everywhere:.3g} nats a response"
    )
    if best - everywhere < 0.01 * best:
        return f"{text}, and grow above it (docs/safeguards.md)"
    episodes = config.sampling.prompts_per_step * config.sampling.group_size
    longer = ", less where errors are longer than other responses" if objective.normalizer == "token" else ""
    other = f", or set objective.normalizer = 'constant' with objective.constant = {episodes}"
    return (
        f"{text}{longer}; from {everywhere:.3g} to {best:.3g} nats they fade only from a start with few of them. Raise reward.coef"
        f"{other if objective.normalizer != 'constant' else ''} (docs/safeguards.md)"
    )
