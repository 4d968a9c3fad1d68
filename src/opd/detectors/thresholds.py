"""The detectors of a fraction that must stay low: one class each, which names the metric and says what to do."""

from opd.config.detectors import ThresholdConfig
from opd.detectors.statistics import Detector, Measurement, Measurements, Tracked, above, began


class Threshold(Detector[ThresholdConfig]):
    """A fraction that has risen above its threshold, or has stayed there for long. Value: its moving average.

    reads: the metric, and a metric that is subtracted from it, if any; symptom, advice: for the message.
    """

    symptom: str
    advice: str

    def __init__(self, config: ThresholdConfig) -> None:
        super().__init__(config)
        self._fraction = Tracked(config.memory, lowest=True)
        self._since: int | None = None
        self._steps = 0

    def measure(self, step: int, *found: float) -> Measurements:
        threshold, low = self.config.threshold, self._fraction.add(found[0] - sum(found[1:]), step)
        now = self._fraction.now
        over = low is not None and now.mean > threshold
        self._since, self._steps = began(self._since, step, over), self._steps + 1 if over else 0
        message = None
        if low is not None and over:
            risen = above(now, low.stream, threshold / 2.0)
            if risen or self._steps >= self.config.patience:
                before = f" ({low.mean:.1%} at step {low.step})" if risen else ""
                level = f"{now.mean:.1%} (threshold {threshold:.0%}) since step {self._since}{before}"
                message = f"{self.symptom}: {level}; {self.advice}"
        return {"": Measurement(now.mean, message)}


class Repetition(Threshold):
    """4: responses that are loops."""

    reads = ("detectors/looping/mean",)
    symptom = "responses that are loops"
    advice = "read them; lower objective.discount, or set reward.coef > 0 and the check 'repetition'"


class Truncation(Threshold):
    """5: responses that are cut."""

    reads = ("response/truncated/mean",)
    symptom = "responses cut at a limit of tokens"
    advice = "raise sampling.max_new_tokens, or set reward.coef > 0 and the check 'truncated'"


class LowKl(Threshold):
    """6: long responses with a passage in which the teacher is much closer to the student than elsewhere."""

    reads = ("detectors/low_kl/mean",)
    symptom = "long responses with 256 tokens on which the teacher is five times nearer to the student than on the rest"
    advice = "read them: the student may hide in passages of which the teacher is sure"


class SpecialTokens(Threshold):
    """8: special tokens on which student and teacher differ extremely."""

    reads = ("detectors/special_tokens/mean",)
    symptom = "special tokens with a log ratio beyond 15 nats"
    advice = (
        "where responses are whole, compare the tokenizers and chat templates (opd align); where they end early, lower "
        "objective.discount"
    )


class CommonTokens(Threshold):
    """9: the fraction of the positive advantage on the five most common tokens, above their fraction of the tokens."""

    reads = ("detectors/common_gain/mean", "detectors/common_actions/mean")
    symptom = "positive advantage on the five most common tokens, above their fraction of the tokens"
    advice = "read the responses: a style may be learned instead of answers"
