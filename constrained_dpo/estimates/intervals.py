"""Confidence intervals: of a mean over prompts, of a proportion, of a mean over runs.

Every interval of the package is computed here. A prompt is one unit, however many its responses.

The mean of numbers with a range, one end at a time: Gaffke's bound (N. Gaffke, Three test
statistics for a nonparametric one-sided hypothesis on the mean of a nonnegative variable,
Mathematical Methods of Statistics 14, 2005; E. Learned-Miller and P. Thomas, A new confidence
interval for the mean of a bounded random variable, arXiv:1905.06208). It adds one observation at
the end of the range and takes a quantile of the mean under Dirichlet(1, ..., 1) weights. Of
two-valued numbers it is the bound of Clopper and Pearson, which holds for every N. That it holds
for every law on the range is conjectured, without a counterexample so far.

The mean of numbers without a range: Student's t, widened where the sample has a long tail.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special

from constrained_dpo.monte_carlo import standard_error
from data_prep.errors import UserError

Vector = NDArray[np.float64]
ComplexVector = NDArray[np.complex128]
Interval = tuple[float, float]

EVERYTHING: Interval = (float("-inf"), float("inf"))
ROUNDING = 1e-12  # a spread below this share of the numbers' size is rounding
OVERSHOOT = 1e-9  # so far beyond its bound, as a share of the numbers' size, is a value at it
NODE_SPACING = 0.1  # of the trapezoidal rule: 13 digits of a probability
NODES = NODE_SPACING * np.arange(600)  # enough for two numbers; 100 and more need 32
SINH, COSH = np.sinh(NODES), np.cosh(NODES)


def mean_interval(
    values: ArrayLike,
    confidence: float = 0.95,
    bounds: tuple[float, float] | None = None,
    looks: int = 1,
) -> Interval:
    """Compute a two-sided confidence interval for the mean of independent numbers.

    values: (num_prompts,), e.g. the slack of every prompt; score units, like the result. bounds:
    the (low, high) that these numbers can have; an end may be infinite, None means that both are.
    For a one-sided bound at level 1 - alpha give confidence = 1 - 2 alpha and take that end.

    An end whose bound is finite is Gaffke's (arXiv:1905.06208): it assumes nothing of the law but
    the bound. An end without a bound is the wider of Student's t and Hall's, see `_open_end`: it
    trusts the sample to show the law's tail. It is infinite for fewer than two values and for
    values without any spread: no spread in the sample is no knowledge of the spread. The interval
    lies inside the bounds.

    looks: 1 is the only look, with the whole error probability. t > 1 is the t-th look of a
    sequence of unknown length, with `spent_confidence(confidence, t)`; give that confidence to the
    first look of such a sequence too.

    Raises UserError for a value outside the bounds, ValueError for arguments of a wrong form.
    """
    numbers = _numbers(values)
    _require_confidence(confidence)
    tail = (1 - (confidence if looks == 1 else spent_confidence(confidence, looks))) / 2
    low, high = EVERYTHING if bounds is None else bounds
    _require_inside(numbers, low, high)
    lower, upper = _lower_end(numbers, low, tail), -_lower_end(-numbers, -high, tail)
    return float(max(lower, low)), float(min(upper, high))


def spent_confidence(confidence: float, look: int) -> float:
    """Compute the confidence of one look of a sequence, 1 - 6 alpha / (pi look)^2.

    look: 1, 2, ...; alpha = 1 - confidence. The sum of 1 / look^2 over all looks is pi^2 / 6
    (Euler), so by the union bound all intervals of a sequence, however long, hold at once with
    probability `confidence` or more. Raises ValueError for a look below 1.
    """
    _require_confidence(confidence)
    if look < 1:
        raise ValueError(f"looks are counted from 1, not {look}")
    return float(1 - 6 * (1 - confidence) / (np.pi * look) ** 2)


def proportion_interval(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Compute the Clopper-Pearson interval of a proportion, e.g. of prompts won.

    Without trials it is (0, 1). Source: C. Clopper and E. Pearson, Biometrika 26, 1934; quantiles
    of beta laws. Raises ValueError for counts that cannot be.
    """
    _require_confidence(confidence)
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes in {trials} trials cannot be")
    failures, tail = trials - successes, (1 - confidence) / 2
    low = special.betaincinv(successes, failures + 1, tail) if successes else 0.0
    high = special.betainccinv(successes + 1, failures, tail) if failures else 1.0
    return float(low), float(high)


def t_interval(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """Compute Student's interval for a mean over runs or seeds, in the values' units.

    values: (num_runs,), at least 2, else ValueError. It is (-inf, inf) for values without any
    spread, like `mean_interval`.
    """
    numbers = _numbers(values)
    _require_confidence(confidence)
    if len(numbers) < 2:
        raise ValueError("an interval over runs needs at least 2 runs")
    if not _has_spread(numbers):
        return EVERYTHING
    move = float(special.stdtrit(len(numbers) - 1, (1 + confidence) / 2)) * standard_error(numbers)
    return float(numbers.mean() - move), float(numbers.mean() + move)


def _numbers(values: ArrayLike) -> Vector:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or not np.isfinite(numbers).all():
        raise ValueError(f"one finite number per unit is needed; the shape is {numbers.shape}")
    return numbers


def _require_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}")


def _require_inside(numbers: Vector, low: float, high: float) -> None:
    """Raise UserError where a number lies outside the bounds by more than rounding."""
    if not low <= high:
        raise ValueError(f"bounds must be (low, high), not ({low}, {high})")
    ends = np.array([low, high])
    slip = OVERSHOOT * _size(np.append(numbers, ends[np.isfinite(ends)]))
    outside = numbers[(numbers < low - slip) | (numbers > high + slip)]
    if len(outside):
        raise UserError(
            f"a value of {outside[0]:g} lies outside the bounds ({low:g}, {high:g}); "
            "give the range that the score can have"
        )


def _size(numbers: Vector) -> float:
    return float(np.abs(numbers).max(initial=0.0))


def _has_spread(numbers: Vector) -> bool:
    return float(np.ptp(numbers)) > ROUNDING * _size(numbers)


def _lower_end(numbers: Vector, low: float, tail: float) -> float:
    """The lower end, with error probability `tail`; the upper end is that of mirrored numbers."""
    return _gaffke_end(numbers, low, tail) if np.isfinite(low) else _open_end(numbers, tail)


def _open_end(numbers: Vector, tail: float) -> float:
    """The lower end without a bound: the wider of Student's t and Hall's cubic transformation.

    Hall (On the removal of skewness by transformation, J. R. Stat. Soc. B 54, 1992) corrects t for
    skewness: with a long lower tail, a few prompts where the policy fails badly, t claims too much.
    A small sample shows less skewness than its law has, so the sample's enters times
    1 + 2 / sqrt(n). The factor is chosen, not derived: with it the nominal 5 % of a lognormal lower
    tail is at most 10 % from 8 prompts on (docs/measurements/intervals.md); in the limit it is 1.
    The wider of the two: a short lower tail in a small sample is no ground to claim more.
    """
    count = len(numbers)
    if count < 2 or not _has_spread(numbers):
        return float("-inf")
    move = float(special.stdtrit(count - 1, 1 - tail))
    skewness = (1 + 2 / np.sqrt(count)) * _skewness(numbers)
    if skewness < -1e-6:  # nearer to 0 Hall's is t, by a difference of nearly equal numbers
        shifted = move / np.sqrt(count) - skewness / (6 * count)
        hall = 3 * np.sqrt(count) * (np.cbrt(1 + skewness * shifted) - 1) / skewness
        move = max(move, float(hall))
    return float(numbers.mean()) - standard_error(numbers) * move


def _skewness(numbers: Vector) -> float:
    """The sample's skewness, unbiased for normal laws; 0 for fewer than three numbers."""
    count, centred = len(numbers), numbers - numbers.mean()
    if count < 3:
        return 0.0
    moments = (centred**3).mean() / (centred**2).mean() ** 1.5
    return float(moments * np.sqrt(count * (count - 1)) / (count - 2))


def _gaffke_end(numbers: Vector, low: float, tail: float) -> float:
    """Gaffke's lower end: a quantile of the mean of the numbers and `low` at random weights."""
    if not len(numbers):
        return low
    low = min(low, float(numbers.min()))  # lower by rounding only
    span = float(numbers.max()) - low
    if span <= ROUNDING * max(abs(low), _size(numbers)):
        return low
    # Equal numbers make one atom with a count; rounding to 12 digits finds them.
    shares = np.append(np.round((numbers - low) / span, 12), 0.0)
    atoms, counts = np.unique(shares, return_counts=True)
    return low + span * _weighted_mean_quantile(atoms, counts.astype(np.float64), tail)


def _weighted_mean_quantile(atoms: Vector, counts: Vector, tail: float) -> float:
    """The `tail` quantile of the mean of atoms, from 0 to 1 in order, at Dirichlet(counts) weights.

    Newton's method on log P(mean <= t). The mean's density is a B-spline with its knots at the
    atoms (H. Curry and I. Schoenberg, J. Analyse Math. 17, 1966) and log-concave, so log P is
    concave: from the left of the quantile the steps approach it and never pass it, and from the
    right one step leads to the left. The start is the quantile of the beta law with the same mean
    and variance; with two atoms it is the law itself, and the result Clopper and Pearson's.
    """
    total = counts.sum()
    mean = (counts * atoms).sum() / total
    variance = ((counts * atoms**2).sum() / total - mean**2) / (total + 1)
    size = total if len(atoms) == 2 else mean * (1 - mean) / variance - 1
    point = float(special.betaincinv(size * mean, size * (1 - mean), tail))
    for _ in range(0 if len(atoms) == 2 else 200):
        log_probability, slope = _weighted_mean_cdf(point, atoms, counts)
        step = max((np.log(tail) - log_probability) / slope, -point / 2)
        point += step
        if abs(step) <= 1e-10 * point:  # the next step would be of the order of its square
            break
    return point


def _weighted_mean_cdf(point: float, atoms: Vector, counts: Vector) -> tuple[float, float]:
    """log P(mean of atoms <= point) at Dirichlet(counts) weights, and its derivative.

    The weights are gamma variables over their sum: P = P(sum_j G_j c_j <= 0), c_j = atom - point.
    By inversion of the sum's Laplace transform, P = -1/(2 pi i) times the integral of
    prod_j (1 - z c_j)^(-count_j) / z along a line from below to above that crosses the real axis
    left of 0, best at the saddle point (H. Daniels, Saddlepoint approximations in statistics, Ann.
    Math. Statist. 25, 1954). Without the 1/z it is the density of the sum at 0.

    There w = (z - saddle) / scale makes every factor, 1/z too, one of the form (1 - w v)^(-power),
    with sum v = 0 and sum v^2 = 1. All poles are real, so the line may bend: the hyperbola
    w = i sinh(x) + bend (cosh(x) - 1) follows the steepest descent at the saddle, and along it the
    trapezoidal rule converges exponentially (J. Weideman and L. Trefethen, Parabolic and hyperbolic
    contours for computing the Bromwich integral, Math. Comp. 76, 2007).
    """
    offsets = atoms - point
    saddle = _saddle_point(offsets, counts)
    tilted = 1 - saddle * offsets
    rates = np.append(offsets / tilted, -1 / saddle)
    powers = np.append(counts, 1.0)
    scale = 1 / np.sqrt((powers * rates**2).sum())
    rates *= scale
    bend = 2 / 3 * (powers * rates**3).sum()
    width = 32 if counts.sum() > 100 else 100  # fewer prompts, slower decay
    probability, density = 0.0, 0.0
    for first in range(0, len(NODES), width):
        sinh, cosh = SINH[first : first + width], COSH[first : first + width]
        w = 1j * sinh + bend * (cosh - 1)
        terms = np.exp(-_log_product(w, rates, powers)) * (1j * cosh + bend * sinh)
        if first == 0:
            terms[0] /= 2
        probability += terms.imag.sum()
        terms *= 1 - w * rates[-1]
        density += terms.imag.sum()
        if abs(terms[-1]) < 1e-17 * density:
            break
    log_transform = -(counts * np.log(tilted)).sum()
    log_probability = log_transform + np.log(scale * NODE_SPACING * probability / (-saddle * np.pi))
    slope = (counts.sum() - 1) * -saddle * density / probability
    return float(log_probability), float(slope)


def _log_product(w: ComplexVector, rates: Vector, powers: Vector) -> ComplexVector:
    """log prod_j (1 - w rate_j)^power_j for every w, up to multiples of 2 pi i."""
    single = powers == 1
    # Products cost much less than logarithms; 32 factors cannot overflow.
    factors = 1 - np.multiply.outer(w, rates[single])
    products = np.multiply.reduceat(factors, np.arange(0, factors.shape[1], 32), axis=1)
    repeated = np.log(1 - np.multiply.outer(w, rates[~single]))
    # Without BLAS, whose rounding may depend on the number of threads.
    logs: ComplexVector = np.log(products).sum(axis=1) + (repeated * powers[~single]).sum(axis=1)
    return logs


def _saddle_point(offsets: Vector, counts: Vector) -> float:
    """The z < 0 where prod_j (1 - z c_j)^(-count_j) / -z is smallest; offsets in order.

    The root of its logarithmic derivative, searched as a share of the way from 0 to the pole
    1 / min(c). Even with every other atom's term at its worst it lies between the search's ends.
    """
    lowest = float(offsets[0])
    below, above = counts[offsets < 0].sum(), counts[offsets > 0].sum()
    ends = 0.5 / (1 + below), 1 - 0.5 * counts[0] / (1 + above + counts[0])

    def derivative(share: float) -> float:
        z = share / lowest
        return float((counts * offsets / (1 - z * offsets)).sum() - 1 / z)

    # Every z near by gives the same integral: a rough root is enough.
    return float(optimize.brentq(derivative, *ends, rtol=1e-4)) / lowest
