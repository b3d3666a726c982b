"""Which pairs of responses a report shows."""

import numpy as np
import pandas as pd

from constrained_dpo.report.run_samples import EXTREMES, choose_samples


def test_the_samples_shown_are_the_first_draws_and_the_extremes():
    rng = np.random.default_rng(0)
    index = pd.MultiIndex.from_product(
        [[f"p{i}" for i in range(150)], range(5)], names=["prompt_id", "draw"]
    )
    changes = pd.DataFrame(
        {"a": rng.normal(size=len(index)), "b": rng.normal(size=len(index))}, index=index
    )
    chosen = choose_samples(changes, ["a", "b"])
    assert list(chosen)[:100] == [(f"p{i}", 0) for i in range(100)]
    count = EXTREMES // 4
    for name in ("a", "b"):
        ordered = changes[name].sort_values()
        for keys, word in ((ordered.index[:count], "losses"), (ordered.index[-count:], "gains")):
            marked = {
                key
                for key, reasons in chosen.items()
                if f"among the {count} largest {word} of {name}" in reasons
            }
            assert marked == set(keys)
