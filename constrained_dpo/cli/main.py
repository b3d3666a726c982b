"""`cdpo`, and what it does as one process of `accelerate launch`. Results on stdout, progress on
stderr; a user's mistake exits 2."""

import sys

import typer

from constrained_dpo.cli.check import check
from constrained_dpo.cli.compare import compare
from constrained_dpo.cli.dual import app as dual_app
from constrained_dpo.cli.evaluate import evaluate
from constrained_dpo.cli.export import export
from constrained_dpo.cli.front import front
from constrained_dpo.cli.gate import gate
from constrained_dpo.cli.new import new
from constrained_dpo.cli.prealign import prealign
from constrained_dpo.cli.runs import init, play_all, play_one, prepare, report, status
from constrained_dpo.cli.sweep import sweep
from constrained_dpo.environment import settle_environment
from constrained_dpo.launch import join_launch, may_speak, num_processes, run_launched
from data_prep.cli.main import app as data_app
from data_prep.console import common_options, run_app
from data_prep.errors import UserError

app = typer.Typer(
    name="cdpo",
    no_args_is_help=True,
    help="As helpful as possible, at least this much safer: constrained alignment by DPO and a "
    "dual step.",
)

app.callback()(common_options)
for command in (new, init, check, prepare, status, report, evaluate, front, export, compare, sweep):
    app.command()(command)
app.command()(prealign)
app.command()(gate)
app.command("round")(play_one)
app.command("run")(play_all)
app.add_typer(dual_app, name="dual")
app.add_typer(data_app, name="data")

LAUNCHED = ("prepare", "round", "run")


def _run_with_others() -> None:
    """The command as one process of `accelerate launch`."""
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    join_launch()
    if command not in LAUNCHED:
        raise UserError(
            f"cdpo {command}: runs in one process; start it without `accelerate launch` "
            f"({', '.join(LAUNCHED)} take several)"
        )
    app()


def main() -> None:
    """Run `cdpo` on this process's arguments."""
    run_app(settle_environment)
    if num_processes() == 1:
        run_app(app)
    else:
        run_launched(lambda: run_app(_run_with_others, may_speak))
