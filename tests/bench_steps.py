"""Dual steps compared by rounds on simulated learners that respond to λ with 3 %, 30 % or 100 % of what theory says; a markdown table.

    python tests/bench_steps.py            # about ten minutes on one core

Worlds: `random_world` of tests/conftest.py (400 prompts × 100 responses, β 0.25, margin 0.5), fresh samples of the policy every round
(64 per prompt) and of π_ref once. Two kinds of learner: *underfit* delivers the share of every log-ratio; *sluggish* fits the reward in
full and responds to the multipliers alone with the share. A run ends with the first round whose exact u is within 5 % of the margin for
every constraint (or λ = 0 and u > 0); 12 rounds at most, counted as 13. Subgradient and optimistic steps (λ ← [λ − η(2u_t − u_{t−1})]₊,
arXiv:2602.22146) are given five step sizes in units of std(r)/var(g), the best of which is taken with hindsight, per cell.
"""

import argparse
import itertools

import numpy as np
import pandas as pd
from conftest import random_world
from tqdm import tqdm

from constrained_dpo.certificate import response_factor
from constrained_dpo.dual import ScoreTable
from constrained_dpo.dual_steps import Observation, auto_step_scale, dual_step, newton_step, predict
from constrained_dpo.one_shot import solve_one_shot
from constrained_dpo.tabular import TabularWorld

PROMPTS, RESPONSES, SAMPLES, MARGIN, ROUNDS, MAX_LAMBDA = 400, 100, 64, 0.5, 12, 1e4
STEPS = (0.1, 0.3, 1.0, 3.0, 10.0)
SHARES = (0.03, 0.3, 1.0)


class Simulation:
    """One world, one learner, one stream of noise."""

    def __init__(self, seed: int, m: int, share: float, kind: str) -> None:
        self.world: TabularWorld = random_world(seed, m, PROMPTS, RESPONSES, beta=0.25, margin=MARGIN)
        self.share, self.kind, self.rng = share, kind, np.random.default_rng([seed, 7])
        self.names = self.world.problem.names
        self.reference, _ = self.draw(self.world.ref_logp)
        self.unit = auto_step_scale(self.reference, self.world.problem)

    def fit(self, lambda_: pd.Series) -> np.ndarray:
        """log π_θ, (prompts, responses), of a learner that delivers its share."""
        world = self.world
        utility = sum((lambda_[n] * world.utilities[n] for n in self.names), np.zeros_like(world.reward))
        score = self.share * (world.reward + utility) if self.kind == "underfit" else world.reward + self.share * utility
        logp = world.ref_logp + score / world.problem.beta
        return logp - np.logaddexp.reduce(logp, axis=1, keepdims=True)

    def draw(self, logp: np.ndarray) -> tuple[ScoreTable, np.ndarray]:
        """SAMPLES responses per prompt: their scores, and which they are."""
        cumulative = np.exp(logp).cumsum(axis=1)
        which = np.stack([np.searchsorted(row / row[-1], self.rng.random(SAMPLES)) for row in cumulative])
        take = lambda table: np.take_along_axis(table, which, axis=1).ravel()  # noqa: E731
        utilities = np.stack([take(self.world.utilities[n]) for n in self.names], axis=1)
        starts, counts = np.arange(PROMPTS) * SAMPLES, np.full(PROMPTS, SAMPLES)
        return ScoreTable(take(self.world.reward), utilities, np.zeros(which.size), starts, counts), which

    def observe(self, lambda_: pd.Series, samples: ScoreTable) -> Observation:
        slack = samples.prompt_means(samples.utilities) - self.reference.prompt_means(self.reference.utilities) - MARGIN
        return Observation(lambda_, pd.Series(slack.mean(axis=0), self.names), pd.DataFrame(slack, columns=self.names))

    def response_factor(self, lambda_: pd.Series, logp: np.ndarray, samples: ScoreTable, which: np.ndarray) -> float:
        laws = {n: np.take_along_axis(t, which, axis=1).ravel() for n, t in (("policy_logp", logp), ("ref_logp", self.world.ref_logp))}
        scores = {"r": samples.reward, **dict(zip(self.names, samples.utilities.T, strict=True))}
        frame = pd.DataFrame({"prompt_id": np.repeat(np.arange(PROMPTS), SAMPLES), **scores, **laws})
        return response_factor(frame, self.world.problem, lambda_)

    def rounds(self, method: str, init: str, step: float) -> tuple[int, float]:
        """Rounds until met, and the largest standard error of u in shares of the margin."""
        lambda_ = pd.Series(0.0, self.names)
        if init == "one_shot":
            lambda_ = solve_one_shot(self.reference, self.world.problem, max_lambda=MAX_LAMBDA).lambda_
        history, worst = [], 0.0
        for number in range(1, ROUNDS + 1):
            logp = self.fit(lambda_)
            exact = self.world.evaluate(logp)["u"]
            if all(abs(u) <= 0.05 * MARGIN or (lambda_[n] <= 0 and u > 0) for n, u in exact.items()):
                return number, worst
            samples, which = self.draw(logp)
            history.append(self.observe(lambda_, samples))
            worst = max(worst, history[-1].by_prompt.sem().max() / MARGIN)
            if method == "newton":
                factor = self.response_factor(lambda_, logp, samples, which)
                theory = predict(history[-1], samples, self.reference, self.world.problem, factor, MAX_LAMBDA)
                lambda_, _ = newton_step(history, theory, step * self.unit, self.unit, MAX_LAMBDA)
            else:
                ahead = history[-1].slack
                if method == "optimistic" and len(history) > 1:
                    ahead = 2 * ahead - history[-2].slack
                lambda_ = dual_step(lambda_, ahead, step * self.unit, MAX_LAMBDA)
        return ROUNDS + 1, worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    count = parser.parse_args().seeds
    cells = itertools.product(("underfit", "sluggish"), SHARES, (1, 2), ("zeros", "one_shot"))
    columns = (
        "learner",
        "response",
        "m",
        "λ_0",
        f"newton: median, worst of {count}",
        "best subgradient (η)",
        "best optimistic (η)",
        "SE(u)/b",
    )
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for kind, share, m, init in tqdm(list(cells), disable=None):
        played = {}
        for method, steps in (("newton", (0.5,)), ("subgradient", STEPS), ("optimistic", STEPS)):
            for step in steps:
                played[method, step] = [Simulation(seed, m, share, kind).rounds(method, init, step) for seed in range(100, 100 + count)]
        medians = {key: float(np.median([r for r, _ in runs])) for key, runs in played.items()}
        newton = played["newton", 0.5]
        cells = [kind, f"{100 * share:g} %", str(m), init, f"{medians['newton', 0.5]:g}, {max(r for r, _ in newton)}"]
        for method in ("subgradient", "optimistic"):
            median, step = min((medians[method, s], s) for s in STEPS)
            cells.append(f"{median:g} ({step:g})")
        print("| " + " | ".join([*cells, f"{100 * max(e for _, e in newton):.1f} %"]) + " |", flush=True)


if __name__ == "__main__":
    main()
