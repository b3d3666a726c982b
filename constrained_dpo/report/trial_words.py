"""What the trials of a conditional round came to, in words and as a table."""

from collections.abc import Sequence

from rich.table import Table

from constrained_dpo.dual.trial import Trial
from constrained_dpo.run.record import RoundRecord


def trial_lines(record: RoundRecord) -> list[tuple[str, str]]:
    """Say what room the trials aimed at and what it costs, and where the range ended."""
    lines = []
    shift = record.trials[-1].shift if record.trials else {}
    for name, room in shift.items():
        if room > 0 and record.lambda_next[name] > 0:
            price = record.lambda_next[name] * room  # dP*/da = −λ, and λ grows with a
            lines.append(
                (
                    "room",
                    f"{name} aims {room:.2f} higher, so that unseen prompts can confirm it; that "
                    f"costs at most about {price:.2f} of reward",
                )
            )
    for name, edge in record.at_edge.items():
        end = "highest" if edge == "high" else "lowest"
        lines.append(
            (
                "range",
                f"λ of {name} is at the {end} that this fit was trained on; the next round goes on "
                "from there",
            )
        )
    if record.kappa != 1:
        lines.append(("κ", f"{record.kappa:.2f}: the policy goes as far as β/κ allows"))
    return lines


def trial_table(trials: Sequence[Trial]) -> Table:
    """Lay out the trials of a round: λ, u with its error, KL."""
    names = list(trials[0].lambda_)
    table = Table("trial", title="trials on the dual prompts", title_justify="left")
    for name in names:
        table.add_column(f"λ {name}", justify="right")
        table.add_column(f"u {name} (aim)", justify="right")
    table.add_column("KL (nats)", justify="right")
    for number, trial in enumerate(trials):
        cells = []
        for name in names:
            cells.append(f"{trial.lambda_[name]:.4f}")
            slack = f"{trial.u[name]:+.3f} ± {trial.u_se[name]:.3f}"
            cells.append(f"{slack} ({trial.shift[name]:+.3f})")
        cells.append("–" if trial.kl is None else f"{trial.kl:.3f}")
        table.add_row(str(number), *cells)
    return table
