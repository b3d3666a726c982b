"""Which figures a report has: their values, captions, alternative texts and the run's files that
they are drawn from."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import pandas as pd

from constrained_dpo.report.contents import Contents, cut_off, interval, lengths, signed
from constrained_dpo.report.drawing import draw_certificate, draw_histogram, draw_multipliers
from constrained_dpo.report.front_figures import front_pictures
from constrained_dpo.report.picture import Picture
from constrained_dpo.report.slack_drawing import draw_path, draw_slack


def pictures(contents: Contents) -> Iterator[Picture]:
    """Every figure of the report, in order."""
    names = contents.recipe.problem.names
    if contents.front is not None:
        yield from front_pictures(contents.front, contents.record)
    if names:
        yield _multipliers(contents)
    for index, name in enumerate(names, 1):
        yield _slack(contents, index, name)
    for index, name in enumerate(names, 1):
        yield _path(contents, index, name)
    if any(record.dual_value is not None for record in contents.records):
        yield _certificate(contents)
    yield from _histograms(contents)


def _exact_source(contents: Contents) -> list[str]:
    return [contents.name_of(contents.run.exact_file)] if contents.optimum else []


def _multipliers(contents: Contents) -> Picture:
    history = pd.DataFrame(contents.state.lambda_)[contents.recipe.problem.names]
    optimum = contents.optimum_on("dual")
    optimal = {} if optimum is None else optimum.lambda_
    exact = "; dashed: the exact optimum λ*" if optimal else ""
    return Picture(
        "lambda",
        "multipliers",
        "Multipliers",
        "Multipliers by round: "
        + "; ".join(
            f"{n} from {history[n].iloc[0]:.4g} to {history[n].iloc[-1]:.4g}"
            for n in contents.recipe.problem.names
        )
        + "".join(f"; exact λ*({n}) {v:.4g}" for n, v in optimal.items()),
        "λ that each round's pseudo-preferences were drawn under; hollow: what the next round "
        f"would use{exact}. "
        f"Grey band: round {contents.shown}, the policy shown.",
        [contents.name_of(contents.run.state_file), *_exact_source(contents)],
        partial(draw_multipliers, history=history, optimal=optimal, shown=contents.shown),
    )


def _slack(contents: Contents, index: int, name: str) -> Picture:
    estimates = {}
    for split in ("dual", "test"):
        measured = [record if split == "dual" else record.test for record in contents.records]
        exact = [record.exact_on(split) for record in contents.records]
        estimates[split] = pd.DataFrame(
            {
                "u": [m.u[name] for m in measured],
                "low": [m.u_ci_low[name] for m in measured],
                "high": [m.u_ci_high[name] for m in measured],
                "exact": [values.u[name] if values else np.nan for values in exact],
            }
        )
    confidence = contents.recipe.dual.confidence
    test = contents.record.test
    return Picture(
        f"u-{index}-{name}",
        "slack",
        f"Slack of {name}",
        f"u of {name} by round on dual and test prompts; round {contents.shown}: dual "
        f"{interval(contents.record, name)}, "
        f"test {interval(test, name)}",
        f"u({name}) against 0: above is satisfied with room. Bars: {100 * confidence:g} % "
        "intervals, each prompt one observation. The dual "
        f"prompts ({contents.record.num_prompts}) move λ; the test prompts "
        f"({test.num_prompts}) only decide.",
        contents.round_files,
        partial(draw_slack, name=name, estimates=estimates, confidence=confidence),
    )


def _path(contents: Contents, index: int, name: str) -> Picture:
    reward, tests = contents.recipe.problem.reward, [record.test for record in contents.records]
    rounds = pd.DataFrame(
        {
            "u": [test.u[name] for test in tests],
            "low": [test.u_ci_low[name] for test in tests],
            "high": [test.u_ci_high[name] for test in tests],
            "reward": [test.reward for test in tests],
        }
    )
    here, means = tests[contents.shown], contents.reference_means
    reference = (means[name] - contents.recipe.problem.levels(means)[name], means[reward])
    best = contents.optimum_on("test")
    optimum = (best.optimal.u[name], best.optimal.reward) if best else None
    where = "these prompts" if "test" in (contents.optimum or {}) else "all prompts of the world"
    percent = f"{100 * contents.recipe.dual.confidence:g} %"
    return Picture(
        f"path-{index}-{name}",
        "path",
        f"Reward against slack of {name}",
        f"Reward against u of {name} on test prompts: π_ref at {signed(reference[0])}, "
        f"{signed(reference[1])}; round {contents.shown} at "
        f"{signed(here.u[name])}, {signed(here.reward)}",
        f"Each round's policy on the test prompts; u ≥ 0 reaches the level of {name}. Ring: round "
        f"{contents.shown}, the policy shown, with the {percent} interval of its u"
        + (f"; star: the exact constrained optimum on {where}." if optimum else ".")
        + " The reward leaves the KL term out.",
        [
            *contents.round_files,
            contents.name_of(contents.run.reference_file),
            *_exact_source(contents),
        ],
        partial(
            draw_path,
            rounds=rounds,
            names=(name, reward),
            reference=reference,
            optimum=optimum,
            shown=contents.shown,
        ),
    )


def _certificate(contents: Contents) -> Picture:
    rounds = pd.DataFrame(
        [
            {
                "objective": record.objective,
                "dual_value": record.dual_value,
                "dual_value_se": record.dual_value_se,
            }
            for record in contents.records
        ],
        dtype=float,
    )
    exact = [record.exact_on("dual") for record in contents.records]
    rounds["exact"] = [values.objective if values else np.nan for values in exact]
    best_policy = contents.optimum_on("dual")
    optimum = None if best_policy is None else best_policy.objective
    best = rounds["dual_value"].min()
    exact_words = "" if optimum is None else f"; the exact optimum is {signed(optimum)}"
    return Picture(
        "certificate",
        "certificate",
        "Objective and bound",
        "Objective by round against the dual value, an estimated bound from above; the smallest "
        f"bound is {signed(best)}{exact_words}",
        "E[r] − β KL of each round's policy on the dual prompts, and D(λ) with two standard "
        "errors: no policy that meets the "
        "constraints is above the lowest D. A round below it may still be the best there is: D is "
        "tight only at the optimal λ."
        + ("" if optimum is None else " Crosses and dashes: exact values."),
        [*contents.round_files, *_exact_source(contents)],
        partial(draw_certificate, rounds=rounds, optimum=optimum, shown=contents.shown),
    )


def _histograms(contents: Contents) -> Iterator[Picture]:
    run, policy = contents.run, f"round {contents.shown}"
    sources = [
        contents.name_of(run.reference_file),
        contents.name_of(run.samples_file(contents.shown)),
    ]
    count = f"{len(contents.before):,} responses each."
    for index, name in enumerate(contents.recipe.problem.columns):
        scores = [side[name].dropna().to_numpy() for side in (contents.before, contents.after)]
        yield Picture(
            f"scores-{index}-{name}",
            "scores",
            f"{'Utility' if index else 'Reward'}: {name}",
            _spread(name, *scores),
            f"Scores of the responses to the test prompts under π_ref and round {contents.shown}. "
            f"Vertical lines: means. {len(scores[0]):,} responses each.",
            sources,
            partial(
                draw_histogram,
                before=scores[0],
                after=scores[1],
                label=f"{name} (score units)",
                policy=policy,
            ),
        )
    before, after = (lengths(side).to_numpy() for side in (contents.before, contents.after))
    cut = [f"{100 * cut_off(side):.0f} %" for side in (contents.before, contents.after)]
    yield Picture(
        "length",
        "scores",
        "Length",
        _spread("length in tokens", before, after),
        f"Tokens per response to the test prompts; {cut[0]} of π_ref's and {cut[1]} of the "
        "policy's were cut off at "
        f"{contents.recipe.sampling.max_new_tokens} tokens. {count}",
        sources,
        partial(
            draw_histogram,
            before=before,
            after=after,
            label="length (tokens)",
            policy=policy,
            whole=True,
        ),
    )


def _spread(what: str, before: np.ndarray, after: np.ndarray) -> str:
    return (
        f"Histograms of {what} on test prompts before and after: means {before.mean():.4g} and "
        f"{after.mean():.4g}, "
        f"standard deviations {before.std():.4g} and {after.std():.4g}"
    )
