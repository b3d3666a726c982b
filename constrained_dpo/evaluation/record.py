"""The record of an evaluation."""

from constrained_dpo.estimates.measure import Measurement
from constrained_dpo.estimates.slack import Change


class Evaluation(Measurement):
    """What fresh samples of a policy show (evaluation.json).

    key: its folder's name; looks: how often samples were added and judged; trained_prompts: how
    many of its prompts the run was fitted on, which say nothing of unseen ones; change: of every
    objective and extra score; adapter: the folder of one from elsewhere.
    """

    key: str
    looks: int = 1
    trained_prompts: int
    verdict: str
    change: dict[str, Change]
    adapter: str | None = None
