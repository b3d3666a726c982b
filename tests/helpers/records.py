"""Records of rounds with one constraint g, as a run would hold them."""

import pandas as pd

from constrained_dpo.estimates.measure import Measurement
from constrained_dpo.estimates.verdict import judge, overall
from constrained_dpo.run.record import RoundRecord


def measurement(u: float, se: float = 0.01, **fields) -> Measurement:
    """Estimates of a policy on 50 prompts, with the verdict that two standard errors give."""
    low, high = u - 2 * se, u + 2 * se
    bounds = pd.DataFrame({"one_low": low, "each_low": low, "each_high": high}, index=["g"])
    content = {
        "u": {"g": u},
        "u_se": {"g": se},
        "u_ci_low": {"g": low},
        "u_ci_high": {"g": high},
        "u_low": {"g": low},
        "u_each_low": {"g": low},
        "u_each_high": {"g": high},
        "u_bounds": {"g": (-10.0, 10.0)},
        "bounds_seen": [],
        "overall": overall(bounds),
        "verdicts": judge(bounds),
        "verdict_confidence": 0.95,
        "reward": 1.0,
        "reward_se": 0.1,
        "utilities": {"g": u},
        "kl": 0.5,
        "kl_se": 0.02,
        "objective": 0.9,
        "objective_se": 0.05,
        "kl_reason": None,
        "num_prompts": 50,
        "num_samples": 400,
        "cut_off_fraction": 0.0,
        "mean_length": 3.0,
    }
    return Measurement.from_json(content | fields)


def round_record(number: int = 0, u: float = 0.0, **fields) -> RoundRecord:
    """A round's record; its test prompts say *violated* whatever the dual prompts say."""
    test = measurement(-9.0)
    content = measurement(u).to_json() | {
        "round": number,
        "lambda": {"g": 0.5},
        "lambda_next": {"g": 0.5},
        "step": "subgradient",
        "steered_on": {"g": u},
        "test": test.to_json(),
        "verdict": test.overall,
        "sampling_law": {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 3},
    }
    return RoundRecord.from_json(content | fields)
