"""The dual function D(λ), its gradient and Hessian on a table of scores. numpy only."""

from dataclasses import dataclass

import numpy as np

from constrained_dpo.dual.scores import BLOCK_ROWS, ScoreTable


@dataclass(frozen=True)
class DualPoint:
    """D(λ) and its derivatives, with the tilted policy's means: value (score units), gradient (m,),
    hessian (m, m), reward E[r], utilities (m,) E[g], kl E_x KL in nats, ess (num_prompts,)
    effective sample size of the tilted weights."""

    value: float
    gradient: np.ndarray
    hessian: np.ndarray
    reward: float
    utilities: np.ndarray
    kl: float
    ess: np.ndarray


@dataclass(frozen=True)
class PromptTerms:
    """What each prompt contributes to D(λ): log_mean (num_prompts,) log mean_k exp(…) in nats;
    reward, ess (num_prompts,); utilities (m, num_prompts) E_w[g]; covariance (m, m, num_prompts)
    Cov_w(g)."""

    lambda_: np.ndarray
    beta: float
    log_mean: np.ndarray
    reward: np.ndarray
    utilities: np.ndarray
    covariance: np.ndarray
    ess: np.ndarray

    def point(self, levels: np.ndarray, prompt_weight: np.ndarray | None = None) -> DualPoint:
        """Means over prompts; prompt_weight: (num_prompts,), e.g. how often a bootstrap drew each.
        levels: (m,)."""

        def mean(values: np.ndarray) -> np.ndarray:
            if prompt_weight is None:
                return np.asarray(values.mean(axis=-1))
            return np.asarray((values * prompt_weight).sum(axis=-1) / prompt_weight.sum())

        log_mean, reward, utilities = (
            float(mean(self.log_mean)),
            float(mean(self.reward)),
            mean(self.utilities),
        )
        return DualPoint(
            value=self.beta * log_mean - float((self.lambda_ * levels).sum()),
            gradient=utilities - levels,
            hessian=mean(self.covariance) / self.beta,
            reward=reward,
            utilities=utilities,
            # KL(π_λ‖π_ref) = E_λ[s/β] − log Z for the tilted policy.
            kl=(reward + float((self.lambda_ * utilities).sum())) / self.beta - log_mean,
            ess=self.ess,
        )


def prompt_terms(
    table: ScoreTable, lambda_: np.ndarray, beta: float, block_rows: int = BLOCK_ROWS
) -> PromptTerms:
    """One pass over the table, block by block: beyond the table, memory is one block's and (m² + m
    + 3) numbers per prompt.

    A prompt's sums do not depend on its block, and sums over prompts are taken once at the end: the
    result is the same to the last bit for every block size and number of threads, so a resumed
    process computes the same λ.
    """
    prompts, m = len(table.counts), len(lambda_)
    log_mean, reward, ess = np.empty((3, prompts))
    utilities, covariance = np.empty((m, prompts)), np.empty((m, m, prompts))
    for block in table.blocks(block_rows):
        at = block.prompts
        rewards, columns = block.of(table.reward), [block.of(g) for g in table.utilities.T]
        weight = rewards / beta
        for multiplier, column in zip(lambda_ / beta, columns, strict=True):
            weight += multiplier * column
        weight += block.of(table.log_weight)
        top = block.max(weight)
        weight -= block.spread(top)
        np.exp(weight, out=weight)
        total = block.sum(weight)
        log_mean[at] = top + np.log(total / block.counts)
        reward[at] = block.dot(weight, rewards) / total
        ess[at] = total**2 / block.dot(weight, weight)
        for i, column in enumerate(columns):
            utilities[i, at] = block.dot(weight, column) / total
        centred = [
            column - block.spread(mean)
            for column, mean in zip(columns, utilities[:, at], strict=True)
        ]
        for i in range(m):
            weighted = weight * centred[i]
            for j in range(i + 1):
                covariance[i, j, at] = covariance[j, i, at] = (
                    block.dot(weighted, centred[j]) / total
                )
    return PromptTerms(lambda_, beta, log_mean, reward, utilities, covariance, ess)


def evaluate_dual(
    table: ScoreTable, lambda_: np.ndarray, beta: float, levels: np.ndarray
) -> DualPoint:
    """D, its gradient and Hessian in one pass over the table (`prompt_terms`). lambda_, levels:
    (m,) in the order of the utilities."""
    return prompt_terms(table, lambda_, beta).point(levels)
