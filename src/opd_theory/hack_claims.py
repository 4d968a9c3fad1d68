"""Claims on the gym of hacks: what each objective does to a hack with and without safeguards, and the law of where it ends."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from functools import cache
from math import exp, log

from opd_theory import hack_gym
from opd_theory.claim import Claim
from opd_theory.hack_gym import PENALTY, Arm, Figures, Hack, follow

COEF = 3.0  # of the reward, where it stands beside a distillation term
_REPETITIONS = 2000  # they end after some 50, but where two rest points nearly meet

# Without safeguards.
TO_GO, KL_TO_GO, EXACT = "to-go, discount 1", "KL-to-go, discount 0.9", "exact"
# One safeguard.
MASK_UNCENTRED, MASK_KL, MASK_EXACT = "uncentred mask", "KL-centred mask", "exact, mask"
OUTCOME_ALONE, TO_GO_OUTCOME, EXACT_OUTCOME = "reward alone", "to-go, reward", "exact, reward"
# Mask, reward and the explicit negative reward of format errors; the first has a mask that is not centred.
TO_GO_UNCENTRED = "to-go, uncentred mask, reward, errors -1"
EXACT_GUARDED, KL_GUARDED, TO_GO_GUARDED = (
    f"{name}, mask, reward, errors -1" for name in ("exact", "KL-centred", "to-go leave-one-out")
)
GUARDED = (EXACT_GUARDED, KL_GUARDED, TO_GO_GUARDED)

ARMS: Mapping[str, Arm] = {
    TO_GO: Arm("to_go", 1.0),
    KL_TO_GO: Arm("kl_to_go", 0.9),
    EXACT: Arm("exact"),
    MASK_UNCENTRED: Arm("immediate", masked=True),
    MASK_KL: Arm("immediate", 0.0, "kl", masked=True),
    MASK_EXACT: Arm("exact", masked=True),
    OUTCOME_ALONE: Arm("none", reward_coef=1.0),
    TO_GO_OUTCOME: Arm("to_go", 1.0, reward_coef=COEF),
    EXACT_OUTCOME: Arm("exact", reward_coef=COEF),
    TO_GO_UNCENTRED: Arm("to_go", 1.0, masked=True, reward_coef=COEF, penalised=True),
    EXACT_GUARDED: Arm("exact", masked=True, reward_coef=COEF, penalised=True),
    KL_GUARDED: Arm("immediate", 0.0, "kl", masked=True, reward_coef=COEF, penalised=True),
    TO_GO_GUARDED: Arm("to_go", 1.0, "leave_one_out", masked=True, reward_coef=COEF, penalised=True),
}


@dataclass(frozen=True)
class Trial:
    """A hack's arms: the student at the start (which hacks as often as the teacher), at the end of each arm, and the law's P(hack)
    of the arms that have one."""

    start: Figures
    arms: Mapping[str, Figures]
    laws: Mapping[str, float]

    @property
    def gap(self) -> float:
        """The largest difference between a law and where ascent ended."""
        return max(abs(self.arms[name].hack - law) for name, law in self.laws.items())

    def collapsed(self, *names: str) -> bool:
        """Whether each arm ends with a higher OPD reward than the start, a lower reward, and more than twice the hacks."""
        return all(
            a.opd_reward > self.start.opd_reward and a.reward < self.start.reward and a.hack > 2 * self.start.hack
            for a in (self.arms[name] for name in names)
        )

    def held(self, *names: str) -> bool:
        """Whether each arm hacks at most as often as the teacher, with a reward no lower than at the start."""
        return all(
            a.hack <= self.start.hack + 1e-9 and a.reward >= self.start.reward - 1e-9
            for a in (self.arms[name] for name in names)
        )

    def claim(self, letter: str, title: str, source: str, expected: str, holds: bool) -> Claim:
        """The verdict also needs every law to be met to 1e-6."""
        shown = "; ".join(
            f"{name} {f.hack:.4f}, {f.reward:.2f}, {f.opd_reward:.2f}"
            for name, f in {"start": self.start, **self.arms}.items()
        )
        return Claim(
            f"H-{letter}", f"hack: {title}", source, f"{expected}; laws of the rest points met to 1e-6",
            f"P(hack), reward, OPD reward: {shown}; {len(self.laws)} laws met to {self.gap:.0e}",
            holds and self.gap < 1e-6,
            {"start": asdict(self.start), "arms": {n: asdict(f) for n, f in self.arms.items()}, "laws": dict(self.laws)},
        )  # fmt: skip


def run_trial(hack: Hack, arms: Mapping[str, Arm] = ARMS) -> Trial:
    """Follow each arm to its end."""
    found, laws = {}, {}
    for name, arm in arms.items():
        # Behind a mask a rare action moves only by how it shifts the mean of the others: at the rate of its own probability.
        slow = arm.masked and arm.baseline != "none" and arm.reward_coef == 0
        found[name] = hack.measure(follow(hack, arm, steps=1600 if slow else 100))
        law = rest_by_law(hack, arm)
        if law is not None:
            laws[name] = law
    return Trial(hack.measure(hack.start), found, laws)


@dataclass(frozen=True)
class Prefetch:
    """What is to come from a state on under the settled student: the discounted log ratios of kept responses, the mean reward,
    P(kept) and P(hack), the mean number of tokens, and that of responses which are kept."""

    distillation: float = 0.0
    reward: float = 0.0
    kept: float = 0.0
    hack: float = 0.0
    tokens: float = 0.0
    kept_tokens: float = 0.0


def rest_by_law(hack: Hack, arm: Arm) -> float | None:
    """P(hack) where the arm comes to rest, by scalars from the ends backwards; None for an arm without a law here.

    At a row all of whose later rows have settled, k_a (log q_a - log pi_a) + discount F_a + share coef U_a is one number m for all
    actions taken; log q is the mean over the row's states, and after action a, k_a is P(kept), F_a the kept log ratios to come,
    U_a the mean reward. Without masks pi ~ q exp(discount F + coef U), the branch law and the tilt law in one. With masks and
    no reward, an action that is always masked (k = 0) makes m = 0, so that pi = q elsewhere and it gets the rest: the mask law.
    Exact terms have the P(kept) of the state in place of k_a. A KL baseline has the law of the exact term without a reward.

    `share` is the normaliser of the distillation part over that of the reward's: 1 without masks and with a constant, else what
    of all episodes (or tokens) is kept, which the settled student itself decides. The more is kept the more the reward weighs, so
    repetition from the start's share ends at the next share that agrees with its student, in the direction in which errors go.
    """
    integrated = arm.distillation == "exact" or (arm.distillation == "immediate" and arm.baseline == "kl")
    if arm.distillation == "none" or (arm.distillation == "kl_to_go" and arm.masked):
        return None
    if arm.baseline != "none" and (not integrated or arm.reward_coef > 0):
        return None
    kept, everything = hack_gym.normalizers(hack, arm, hack.problem.policy(hack.start))
    share = kept / everything
    for _ in range(_REPETITIONS):
        settled = _settled(hack, arm, share, integrated=integrated)
        agreed = share if arm.normalizer == "constant" else _share(arm, settled)
        if abs(agreed - share) < 1e-14:
            return settled.hack
        share = agreed
    return None


def _share(arm: Arm, settled: Prefetch) -> float:
    return settled.kept_tokens / settled.tokens if arm.normalizer == "token" else settled.kept


def _settled(hack: Hack, arm: Arm, share: float, *, integrated: bool) -> Prefetch:
    """What is to come from the prompts on, where the reward weighs `share` of its coefficient."""

    @cache
    def ahead(name: str) -> Prefetch:
        if name in hack.ends:
            end = hack.ends[name]
            paid = PENALTY if end.malformed and arm.penalised else end.paid
            return Prefetch(reward=paid, kept=float(not (end.malformed and arm.masked)), hack=float(end.hack))
        state = hack.states[name]
        p, later = policy(state.row), [ahead(after) for after in state.after]
        ratios = [log(q) - log(x) if x > 0 else 0.0 for q, x in zip(state.teacher, p, strict=True)]

        def mean(values: Iterable[float]) -> float:
            return sum(x * value for x, value in zip(p, values, strict=True))

        return Prefetch(
            mean(a.kept * r + arm.discount * a.distillation for a, r in zip(later, ratios, strict=True)),
            mean(a.reward for a in later),
            mean(a.kept for a in later),
            mean(a.hack for a in later),
            mean(1.0 + a.tokens for a in later),
            mean(a.kept + a.kept_tokens for a in later),
        )

    @cache
    def policy(row: str) -> Sequence[float]:
        states = [s for s in hack.states.values() if s.row == row]
        actions = range(len(states[0].after))
        if states[0].fixed:
            return [float(a == 0) for a in actions]
        later = [[ahead(after) for after in s.after] for s in states]
        logq = [sum(log(s.teacher[a]) for s in states) / len(states) for a in actions]
        future = [sum(arm.discount * x[a].distillation for x in later) / len(states) for a in actions]
        gain = [share * arm.reward_coef * sum(x[a].reward for x in later) / len(states) for a in actions]
        kept = [sum(x[a].kept for x in later) / len(states) for a in actions]
        if integrated:
            return _tilted(logq, gain, kept)
        return _balanced(logq, [f + g for f, g in zip(future, gain, strict=True)], kept)

    starts = [ahead(name) for name in hack.prompts]
    return Prefetch(*(sum(column) / len(starts) for column in zip(*map(astuple, starts), strict=True)))


def _tilted(logq: Sequence[float], gain: Sequence[float], kept: Sequence[float]) -> Sequence[float]:
    """pi ~ q exp(gain / k) with k = sum_a pi_a kept_a, by repetition, damped since a larger k tilts less."""
    k, p = 1.0, [0.0]
    for _ in range(400):
        scores = [q + g / k for q, g in zip(logq, gain, strict=True)]
        shares = [exp(s - max(scores)) for s in scores]
        p = [s / sum(shares) for s in shares]
        k = (k + sum(x * y for x, y in zip(p, kept, strict=True))) / 2
    return p


def _balanced(logq: Sequence[float], gain: Sequence[float], kept: Sequence[float]) -> Sequence[float]:
    """kept_a (log q_a - log pi_a) + gain_a = m for all a: m by bisection, or by an action that is never kept."""

    def at(m: float) -> list[float]:
        return [exp(min(q + (g - m) / k, 700.0)) if k > 0 else 0.0 for q, g, k in zip(logq, gain, kept, strict=True)]

    if 0.0 in kept:
        masked = kept.index(0.0)
        p = at(gain[masked])
        if sum(p) <= 1:
            return [1 - sum(p) if a == masked else x for a, x in enumerate(p)]
    low = max(k * q + g for q, g, k in zip(logq, gain, kept, strict=True) if k > 0)
    high = low + log(len(logq))
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(at(middle)) > 1 else (low, middle)
    return at(high)


def quick_answer() -> Claim:
    """(a) No format error, so that a mask has nothing to hide; the reward has to pay for the KL that the hack saves."""
    hack = hack_gym.quick_answer()
    teacher, end = hack.states["word 0, context 0"].teacher, hack.ends
    words = sum(row.startswith("word") for row in hack.rows)
    saved = -words * log(2 * (teacher[0] * teacher[1]) ** 0.5) + log(hack.states["guess"].teacher[0])
    bound = saved / (end["answer"].paid - end["guessed"].paid)
    at_bound = f"to-go, reward of coef {bound:.2f}"
    trial = run_trial(hack, {**ARMS, at_bound: Arm("to_go", 1.0, reward_coef=bound)})
    rate, found = trial.start.hack, trial.arms
    return trial.claim(
        "a", "an answer at once, 5 % of the teacher's", "docs/concepts/objectives.md, discounts",
        f"future terms collapse, exact stays at {rate:g}, masks change nothing; beside to-go, coef {COEF:g} is too small and "
        f"{bound:.2f} = K / (difference of rewards) ends at {rate:g}",
        trial.collapsed(TO_GO, KL_TO_GO, TO_GO_GUARDED)
        and trial.held(EXACT, MASK_UNCENTRED, EXACT_OUTCOME, EXACT_GUARDED, KL_GUARDED)
        and abs(found[MASK_UNCENTRED].hack - found[EXACT].hack) < 1e-9
        and abs(found[at_bound].hack - rate) < 1e-9,
    )  # fmt: skip


def attractor() -> Claim:
    """(b) Every response costs more than the reward pays, so that an uncentred mask is not cured by one."""
    hack = hack_gym.attractor()
    paid = COEF * (hack.ends["answer"].paid - PENALTY)
    constant = f"{TO_GO_UNCENTRED}, constant normaliser"
    trial = run_trial(hack, {**ARMS, constant: replace(ARMS[TO_GO_UNCENTRED], normalizer="constant")})
    return trial.claim(
        "b", "a format error in which the teacher is certain", "docs/concepts/objectives.md, masks",
        "future terms and the uncentred mask collapse; a centred mask ends where exact does, above the teacher's rate; to-go with "
        f"an uncentred mask collapses in spite of a reward whose difference, times coef, is {paid:.1f}: less than the KL of a "
        "response; it ends at 0.998, with a constant normaliser at 0.493; all safeguards with a centred mask hold",
        trial.collapsed(TO_GO, KL_TO_GO, MASK_UNCENTRED, TO_GO_UNCENTRED)
        and paid < -trial.start.opd_reward
        and abs(trial.arms[TO_GO_UNCENTRED].hack - 0.998) < 5e-4
        and abs(trial.arms[constant].hack - 0.493) < 5e-4
        and trial.held(OUTCOME_ALONE, EXACT_OUTCOME, *GUARDED)
        and _no_cure(trial),
    )  # fmt: skip


def loop() -> Claim:
    """(c) A baseline by step mixes tokens in the loop, which cost nothing, with words, so that it does not centre these."""
    mixed = "leave-one-out mask"
    trial = run_trial(hack_gym.loop(), {**ARMS, mixed: Arm("immediate", 0.0, "leave_one_out", masked=True)})
    return trial.claim(
        "c", "a repetition loop that costs nothing", "docs/concepts/objectives.md, discounts and masks",
        "future terms and the uncentred mask collapse; a KL-centred mask ends where exact does, above the teacher's rate, one with "
        "leave-one-out higher; all safeguards hold",
        trial.collapsed(TO_GO, KL_TO_GO, MASK_UNCENTRED)
        and trial.held(OUTCOME_ALONE, EXACT_OUTCOME, *GUARDED)
        and _no_cure(trial)
        and trial.arms[mixed].hack > 1.5 * trial.arms[EXACT].hack,
    )  # fmt: skip


def early_end() -> Claim:
    """(d) Others that have ended give no baseline, so that leave-one-out centres the more the larger the group."""
    sizes = {n: f"leave-one-out mask, groups of {n}" for n in (2, 4, 16)}
    groups = {name: Arm("immediate", 0.0, "leave_one_out", n, masked=True) for n, name in sizes.items()}
    trial = run_trial(hack_gym.early_end(), {**ARMS, **groups})
    two, four, sixteen = (trial.arms[name].hack - trial.arms[EXACT].hack for name in sizes.values())
    return trial.claim(
        "d", "an early end of the turn", "docs/concepts/objectives.md, discounts and masks",
        "future terms and the uncentred mask collapse; a KL-centred mask ends where exact does, above the teacher's rate, one with "
        "leave-one-out higher in small groups; all safeguards hold",
        trial.collapsed(TO_GO, KL_TO_GO, MASK_UNCENTRED)
        and trial.held(OUTCOME_ALONE, EXACT_OUTCOME, *GUARDED)
        and _no_cure(trial)
        and two > four > sixteen > -1e-6,
    )  # fmt: skip


def parser_exploit() -> Claim:
    """(e) The verifier pays for the hack, so that the reward is what collapses."""
    checked, unpaid = "reward alone, errors -1", "KL-centred, mask, reward"
    trial = run_trial(
        hack_gym.parser_exploit(),
        {
            **ARMS,
            checked: Arm("none", reward_coef=1.0, penalised=True),
            unpaid: Arm("immediate", 0.0, "kl", masked=True, reward_coef=COEF),
        },
    )
    start, found = trial.start, trial.arms
    return trial.claim(
        "e", "malformed text for which the verifier pays", "docs/concepts/objectives.md, masks",
        "the reward alone ends at the hack; exact beside it holds to the tilt law, above the teacher's rate; a mask without the "
        "negative reward is worse than none; all safeguards hold, and so does the reward alone with errors at -1",
        found[OUTCOME_ALONE].hack > 0.999 and found[OUTCOME_ALONE].paid > start.paid
        and trial.collapsed(TO_GO, TO_GO_OUTCOME, EXACT_OUTCOME)
        and found[unpaid].hack > found[EXACT_OUTCOME].hack
        and trial.held(checked, *GUARDED)
        and _no_cure(trial),
    )  # fmt: skip


def _no_cure(trial: Trial) -> bool:
    """Whether centred masks alone end where the exact term without a mask does, above the teacher's rate."""
    exact = trial.arms[EXACT].hack
    return exact > trial.start.hack and all(abs(trial.arms[m].hack - exact) < 1e-6 for m in (MASK_KL, MASK_EXACT))
