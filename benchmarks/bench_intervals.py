"""Do the intervals of `constrained_dpo.estimates.intervals` hold? Markdown tables on stdout.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_intervals > docs/measurements/intervals.md

Laws of the prompts' slack whose true mean is 0. False satisfied: the lower end of the interval at
confidence 0.90, a one-sided bound at 5 %, is above 0. Coverage and width are of the interval at
confidence 0.95. "Before" is the rule of `constrained_dpo.dual.confidence_bound`: Student's t with
Hall's correction for the sample's skewness, whatever the range.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from constrained_dpo.estimates.intervals import mean_interval, spent_confidence

Array = NDArray[np.float64]
Draw = Callable[[np.random.Generator, tuple[int, int]], Array]

PROMPTS = (8, 16, 24, 40, 96, 300)
FALSE, COVERAGE = 0.05, 0.93  # what is required, beside the laws' own
LOGNORMAL_MEAN = float(np.exp(0.5))
CLIP = 6.0
CLIPPED_MEAN = float(
    LOGNORMAL_MEAN * special.ndtr(np.log(CLIP) - 1) + CLIP * special.ndtr(-np.log(CLIP))
)
OPEN = (-np.inf, np.inf)


@dataclass(frozen=True)
class Law:
    """A law with mean 0: draw gives (repetitions, num_prompts); bounds are those the rule gets."""

    name: str
    draw: Draw
    bounds: tuple[float, float] = OPEN
    false: float = FALSE


def indicator(level: float, responses: int, pull: float | None = None) -> Draw:
    """Share of accepted responses minus the level; pull: prompts differ, by Beta(level, 1 - level)
    times `pull`."""

    def draw(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
        probability = level if pull is None else rng.beta(pull * level, pull * (1 - level), shape)
        return rng.binomial(responses, probability, shape) / responses - level

    return draw


def table(values: list[float], probabilities: list[float]) -> Draw:
    """Values of a table, less their mean."""
    mean = float(np.dot(values, probabilities))

    def draw(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
        return (np.array(values) - mean)[rng.choice(len(values), shape, p=probabilities)]

    return draw


def likert(probabilities: list[float], margin: float = 0.0) -> tuple[Draw, tuple[float, float]]:
    values = [0.0, 1.0, 2.0, 3.0, 4.0]
    mean = float(np.dot(values, probabilities))
    return table(values, probabilities), (-mean - margin, 4 - mean + margin)


def laws() -> list[Law]:
    rare4, rare0 = [0.50, 0.30, 0.15, 0.03, 0.02], [0.02, 0.03, 0.15, 0.30, 0.50]
    gap = 10 * 0.05 / 0.95
    disaster = table([-10.0, gap], [0.05, 0.95])
    skewed_bounds = (CLIPPED_MEAN - CLIP, CLIPPED_MEAN)
    bounded = [
        Law(f"indicator, level {level}, K = 1", indicator(level, 1), (-level, 1 - level))
        for level in (0.9, 0.97)
    ]
    for responses in (4, 8):
        for pull, text in ((None, "same prompts"), (2.0, "prompts differ")):
            name = f"indicator, level 0.9, K = {responses}, {text}"
            bounded.append(Law(name, indicator(0.9, responses, pull), (-0.9, 0.1)))
    bounded += [
        Law("indicator, level 0.97, K = 8, prompts differ", indicator(0.97, 8, 2.0), (-0.97, 0.03)),
        Law("5 % of prompts at -10", disaster, (-10, gap)),
        Law("Likert, a rare 4", *likert(rare4)),
        Law("Likert, a rare 0", *likert(rare0)),
        Law("clipped lognormal, lower tail", clipped_lognormal, skewed_bounds),
        Law("normal, clipped at 4 sd", clipped_normal(4), (-4, 4)),
        Law("normal, clipped at 3 sd", clipped_normal(3), (-3, 3)),
    ]
    wider = [
        Law("indicator, level 0.9, K = 1; wider range", indicator(0.9, 1), (-1.5, 0.5)),
        Law(
            "indicator, level 0.9, K = 4, prompts differ; wider range",
            indicator(0.9, 4, 2.0),
            (-1.5, 0.5),
        ),
        Law("5 % of prompts at -10; wider range", disaster, (-15, 5)),
        Law("5 % of prompts at -10; low end only", disaster, (-10, np.inf)),
        Law("Likert, a rare 0; wider range", *likert(rare0, 1.0)),
    ]
    unbounded = [
        Law("normal", lambda rng, shape: rng.normal(size=shape)),
        Law("Student t, 3 df", lambda rng, shape: rng.standard_t(3, shape)),
        Law(
            "exponential, lower tail", lambda rng, shape: 1 - rng.exponential(size=shape), false=0.1
        ),
        Law(
            "lognormal, lower tail",
            lambda rng, shape: LOGNORMAL_MEAN - rng.lognormal(0, 1, shape),
            false=0.1,
        ),
        Law(
            "lognormal, upper tail", lambda rng, shape: rng.lognormal(0, 1, shape) - LOGNORMAL_MEAN
        ),
    ]
    return bounded + wider + unbounded


def clipped_lognormal(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
    return CLIPPED_MEAN - np.minimum(rng.lognormal(0, 1, shape), CLIP)


def clipped_normal(at: float) -> Draw:
    return lambda rng, shape: np.clip(rng.normal(size=shape), -at, at)


def before(samples: Array, confidence: float) -> Array:
    """The former rule's interval, (repetitions, 2); without any spread it is the mean."""
    count = samples.shape[1]
    mean, error = samples.mean(axis=1), samples.std(axis=1, ddof=1) / np.sqrt(count)
    centred = samples - mean[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        skew = (centred**3).mean(axis=1) / (centred**2).mean(axis=1) ** 1.5
    skew = np.nan_to_num(skew * np.sqrt(count * (count - 1)) / (count - 2))
    ends = []
    for probability in ((1 - confidence) / 2, (1 + confidence) / 2):
        quantile = stats.t.ppf(1 - probability, count - 1)
        safe = np.where(np.abs(skew) > 1e-6, skew, 1.0)
        inner = 1 + safe * (quantile / np.sqrt(count) - safe / (6 * count))
        corrected = 3 / safe * (np.cbrt(inner) - 1) * np.sqrt(count)
        ends.append(mean - error * np.where(np.abs(skew) > 1e-6, corrected, quantile))
    return np.stack(ends, axis=1)


def after(samples: Array, confidence: float, bounds: tuple[float, float], looks: int = 1) -> Array:
    """The new rule's interval, (repetitions, 2); equal samples are computed once."""
    unique, which = np.unique(np.sort(samples, axis=1), axis=0, return_inverse=True)
    ends = np.array([mean_interval(row, confidence, bounds, looks) for row in unique])
    return ends[which.ravel()]


def t_width(samples: Array, confidence: float) -> float:
    count = samples.shape[1]
    error = samples.std(axis=1, ddof=1) / np.sqrt(count)
    return float(2 * special.stdtrit(count - 1, (1 + confidence) / 2) * error.mean())


def header(*columns: str) -> None:
    print("\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|", flush=True)


def percent(share: float, miss: bool = False) -> str:
    return f"**{100 * share:.1f} %**" if miss else f"{100 * share:.1f} %"


def beyond(share: float, limit: float, repetitions: int, sign: int = 1) -> bool:
    """Whether a share is worse than its limit by more than 2 standard errors."""
    return sign * (share - limit) > 2 * np.sqrt(limit * (1 - limit) / repetitions)


def main_table(repetitions: int) -> None:
    columns = ("false satisfied", "covered", "width / t's")
    heads = [f"{column}, {when}" for column in columns for when in ("before", "after")]
    header("law", "N", *heads)
    for place, law in enumerate(laws()):
        for count in PROMPTS:
            rng = np.random.default_rng([place, count])
            samples = law.draw(rng, (repetitions, count))
            old = judged(law, samples, before(samples, 0.9), before(samples, 0.95))
            new = judged(
                law, samples, after(samples, 0.9, law.bounds), after(samples, 0.95, law.bounds)
            )
            cells = [cell for pair in zip(old, new, strict=True) for cell in pair]
            print(f"| {law.name} | {count} | " + " | ".join(cells) + " |", flush=True)


def judged(law: Law, samples: Array, at90: Array, at95: Array) -> tuple[str, str, str]:
    """False satisfied, coverage and width of a rule's intervals at two confidences."""
    false = float((at90[:, 0] > 0).mean())
    low, high = at95.T
    covered = float(((low <= 0) & (high >= 0)).mean())
    width = float((high - low).mean()) / t_width(samples, 0.95)
    return (
        percent(false, beyond(false, law.false, len(samples))),
        percent(covered, beyond(covered, COVERAGE, len(samples), -1)),
        f"{width:.2f}" if np.isfinite(width) else "inf",
    )


def power_table(repetitions: int) -> None:
    """Satisfied in truth, by sum over the numbers of accepted prompts (K = 1) or by simulation.

    The limit: let a share 1 - level / rate of the prompts always fail and the others follow the
    true law. Then the mean is the level, and with probability (level / rate)^N no sample shows a
    failing prompt. A rule with at most 5 % false satisfied under this law, too, is satisfied in at
    most 0.05 / (level / rate)^N of the true law's samples.
    """
    cells = ("satisfied, before", "satisfied, after", "exact binomial", "limit of any rule")
    header("level", "true rate", "N", "K", *cells)
    pairs = ((0.95, 0.99), (0.9, 0.97), (0.9, 0.95))
    for level, rate in pairs:
        for count in (40, 96, 300):
            kept = np.arange(count + 1)
            samples = (np.arange(count) < kept[:, None]) - level
            weight = stats.binom.pmf(kept, count, rate)
            exact = percent(weight @ (stats.binom.sf(kept - 1, count, level) < 0.05))
            power_row(level, rate, "1", samples, weight, exact)
    for level, rate in pairs:
        for count in (40, 96):
            for responses, pull in ((4, 2.0), (4, None), (8, None)):
                rng = np.random.default_rng(count)
                p = (
                    rate
                    if pull is None
                    else rng.beta(pull * rate, pull * (1 - rate), size=(repetitions, count))
                )
                samples = rng.binomial(responses, p, (repetitions, count)) / responses - level
                text = f"{responses}, {'same prompts' if pull is None else 'prompts differ'}"
                power_row(level, rate, text, samples, np.full(repetitions, 1 / repetitions), "")


def power_row(
    level: float, rate: float, responses: str, samples: Array, weight: Array, exact: str
) -> None:
    """weight: the probability of each row of samples."""
    count = samples.shape[1]
    old = percent(weight @ (before(samples, 0.9)[:, 0] > 0))
    new = percent(weight @ (after(samples, 0.9, (-level, 1 - level))[:, 0] > 0))
    limit = percent(min(1.0, 0.05 / (level / rate) ** count))
    print(f"| {level} | {rate} | {count} | {responses} | {old} | {new} | {exact} | {limit} |")


def rounds_table(repetitions: int) -> None:
    """A policy at the boundary in every round: false "satisfied" in one round or more."""
    header("law", "N", "prompts", "rounds", "looks = 1", "spent_confidence")
    count = 96
    for name, bounds in (("normal, no range", OPEN), ("indicator, level 0.9, K = 1", (-0.9, 0.1))):
        for prompts, share in (("new in every round", 0.0), ("the same, correlation 0.5", 0.5)):
            rng = np.random.default_rng(count)
            fixed = rng.normal(size=(repetitions, count))
            plain, spent = np.zeros((2, repetitions), dtype=bool)
            for look in range(1, 25):
                fresh = rng.normal(size=(repetitions, count))
                samples = np.sqrt(share) * fixed + np.sqrt(1 - share) * fresh
                if bounds != OPEN:
                    samples = (samples < special.ndtri(0.9)) - 0.9
                plain |= after(samples, 0.9, bounds)[:, 0] > 0
                spent |= after(samples, spent_confidence(0.9, look), bounds)[:, 0] > 0
                if look in (6, 24):
                    cells = f"{percent(plain.mean())} | {percent(spent.mean())}"
                    print(f"| {name} | {count} | {prompts} | {look} | {cells} |", flush=True)


def time_table() -> None:
    header("N", "with a range, ms", "without, ms")
    for count in (8, 40, 300, 1000, 10_000):
        values = np.clip(np.random.default_rng(count).normal(size=count), -4, 4)
        cells = []
        for bounds in ((-4.0, 4.0), None):
            times = []
            for _ in range(20):
                start = time.perf_counter()
                mean_interval(values, 0.95, bounds)
                times.append(time.perf_counter() - start)
            cells.append(f"{1000 * float(np.median(times)):.2f}")
        print(f"| {count} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=10_000, help="samples of each law and N")
    repetitions, start = parser.parse_args().repetitions, time.perf_counter()
    print("# Confidence intervals of a mean over prompts: before and after\n")
    print("By `benchmarks/bench_intervals.py`; the laws' true mean is 0, seeds are fixed.")
    print(f"{repetitions:,} samples a row: one standard error of 5 % is", end=" ")
    print(f"{percent(np.sqrt(0.05 * 0.95 / repetitions))}.")
    print("Bold: more than 2 standard errors worse than 5 % (10 % for lognormal and exponential")
    print("lower tails) or than 93 % covered. The first laws have their own range as bounds.")
    main_table(repetitions)
    print("\n## Power: satisfied in truth (confidence 0.90, lower end above 0)\n")
    print("Limit: of any rule that also holds when a share 1 - level / true rate of the prompts")
    print("always fails and the others follow the true law, 0.05 / (level / true rate)^N.")
    power_table(repetitions)
    print("\n## Rounds: false satisfied in one round or more (confidence 0.90, 5 % one-sided)")
    rounds_table(repetitions // 2)
    print("\n## Time of one interval, both ends (median of 20)")
    time_table()
    print(f"\nOne core, {(time.perf_counter() - start) / 60:.0f} minutes.")


if __name__ == "__main__":
    main()
