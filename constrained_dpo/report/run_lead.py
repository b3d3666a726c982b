"""What a run's page begins with: the verdict in one sentence, the figure that decides, and the same
prompts' answers before and after."""

from constrained_dpo.estimates.verdict import SATISFIED, UNDECIDED, VIOLATED
from constrained_dpo.report.contents import Contents, interval, lengths, level_words, signed
from constrained_dpo.report.picture import DrawnPicture

LEAD_ANSWERS = 3
"""Prompts whose answers are on the first screen: the first test prompts, whatever was answered."""


def verdict_sentence(contents: Contents) -> str:
    """The verdict on the test prompts in one sentence: which constraint, its margin, u with its
    interval, the round, the confidence."""
    problem, test, confidence = (
        contents.recipe.problem,
        contents.record.test,
        contents.recipe.dual.confidence,
    )
    verdicts, where = test.verdicts, f"{test.num_prompts} unseen test prompts"
    if not problem.constraints:
        return (
            f"No constraint was set: round {contents.shown} reaches E[{problem.reward}] "
            f"{signed(test.reward)} on {where}."
        )
    parts = [
        f"{c.name} ({level_words(c)}) is {verdicts[c.name]}, u = {interval(test, c.name)}"
        for c in problem.constraints
    ]
    start = f"After round {contents.shown}, on {where} and at {100 * confidence:g} % confidence"
    if len(parts) == 1:
        return f"{start}, {parts[0]} score units."
    counts = {
        word: sum(v == word for v in verdicts.values())
        for word in ("satisfied", "undecided", "violated")
    }
    summary = ", ".join(
        f"{n or 'none'} {word}" for word, n in counts.items() if n or word == "satisfied"
    )
    return (
        f"{start} over all {len(parts)} constraints together, {summary}: {'; '.join(parts)} "
        "(score units)."
    )


def lead_figure(contents: Contents, figures: list[DrawnPicture]) -> DrawnPicture:
    """Choose the first screen's figure, of the constraint that decides the verdict: the front where
    the run has one, else the reward against its slack; without a constraint the reward's scores."""
    names, verdicts = contents.recipe.problem.names, contents.record.test.verdicts
    section = "scores" if not names else "path" if contents.front is None else "front"
    order = (VIOLATED, UNDECIDED, SATISFIED)
    place = min(range(len(names)), key=lambda i: order.index(verdicts[names[i]]), default=0)
    return [figure for figure in figures if figure.picture.section == section][place]


def averages(contents: Contents) -> list[tuple[str, str, str]]:
    """Name, mean before and mean after of every score and of the length, on the test prompts."""
    problem, test, means = contents.recipe.problem, contents.record.test, contents.reference_means
    after = {problem.reward: test.reward} | test.utilities
    rows = [(n, signed(means[n], 2), signed(after[n], 2)) for n in problem.objectives]
    length = lengths(contents.reference).mean()
    return [*rows, ("tokens", f"{length:.1f}", f"{test.mean_length:.1f}")]
