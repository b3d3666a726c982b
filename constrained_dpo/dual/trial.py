"""A trial: what sampling a conditional policy at one λ (and κ) says of u and of how u answers."""

from pydantic import Field

from data_prep.records import Record


class Trial(Record):
    """A sampled member of the family π(y|x; λ, κ) ≈ π_ref exp(κ(r + λ·g)/β)/Z; dicts are by
    constraint, score units, all means over the same prompts.

    u: the slack; u_se: its standard error WITHIN prompts, what another draw of responses to the
    same prompts would change; shift: what the target subtracts, v = u − shift (0: u itself; u −
    its lower bound: the bound). slope[i][j] = du_i/dλ_j and slope_kappa[i] = du_i/dκ of the exact
    maximizer, from covariances within prompts. kl (nats), kl_se likewise, None where the samples
    have no log-probabilities; kl_slope[j] = dKL/dλ_j, kl_slope_kappa = dKL/dκ. concerned: share of
    the prompts that each constraint concerns, over which its u is a mean; all where it is missing.
    """

    lambda_: dict[str, float] = Field(alias="lambda")
    kappa: float
    u: dict[str, float]
    u_se: dict[str, float]
    shift: dict[str, float]
    slope: dict[str, dict[str, float]]
    kl: float | None
    kl_se: float | None
    slope_kappa: dict[str, float]
    kl_slope: dict[str, float]
    kl_slope_kappa: float
    num_samples: int
    concerned: dict[str, float] = Field(default_factory=dict)

    @property
    def v(self) -> dict[str, float]:
        """u − shift, which the solution brings to 0, by constraint (score units)."""
        return {name: self.u[name] - self.shift[name] for name in self.u}
