"""`cdpo evaluate`: a policy judged afresh. Results on stdout, a user's mistake exits 2."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from constrained_dpo.cli.options import (
    AdapterChoice,
    AsJson,
    RoundChoice,
    RunPath,
    print_json,
    results_console,
)
from data_prep.errors import UserError

if TYPE_CHECKING:
    from constrained_dpo.evaluation.evaluate import JudgeOptions


def evaluate(
    run: RunPath,
    round_: RoundChoice = "last",
    adapter: AdapterChoice = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="other prompts (format as in the recipe); default: the run's test prompts"
        ),
    ] = None,
    scorer: Annotated[
        list[str], typer.Option(help="NAME={type: ...} as in a recipe: one more score to report")
    ] = [],
    responses: Annotated[
        int | None,
        typer.Option(min=1, help="responses per prompt; default: dual.responses_per_prompt"),
    ] = None,
    seed: Annotated[int, typer.Option(help="another seed draws other responses")] = 0,
    more: Annotated[
        bool,
        typer.Option(
            "--more", help="add fresh responses to the earlier evaluation by the same command"
        ),
    ] = False,
    judge: Annotated[
        str | None,
        typer.Option(
            help="{base_url: ..., model: ...}: a chat server compares the answers with π_ref's"
        ),
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="with --judge: compare with this run's last round instead")
    ] = None,
    unsafe: Annotated[
        Path | None,
        typer.Option(help="with --judge: prompts that ask for harm, judged apart from the others"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Sample a round's policy, or another adapter's, afresh on unseen prompts and judge it, by the
    run's scorers and extra ones."""
    from constrained_dpo.report.judge_words import judgement_lines, left_out_line
    from constrained_dpo.report.words import print_evaluation
    from constrained_dpo.run.directory import RunDirectory
    from data_prep.scorers.settings import parse_scorer

    directory = RunDirectory(run)
    recipe = directory.recipe()
    from constrained_dpo.evaluation.evaluate import EvaluationOptions
    from constrained_dpo.evaluation.evaluate import evaluate as evaluate_run

    options = EvaluationOptions(
        round=round_,
        adapter=adapter,
        prompts=prompts,
        scorers={
            name: parse_scorer(text, f"--scorer {name}")
            for name, _, text in (option.partition("=") for option in scorer)
        },
        responses=responses,
        seed=seed,
        more=more,
        judge=_judge_options(judge, against, unsafe),
    )
    evaluated = evaluate_run(directory, options)
    record = evaluated.record
    if as_json:
        judged = {"judge": evaluated.judged} if evaluated.judged else {}
        print_json(record.to_json() | {"left_out": evaluated.left_out} | judged)
        return
    print_evaluation(results_console(), record, recipe)
    if any(evaluated.left_out.values()):
        print(left_out_line(evaluated.left_out))
    titles = {"prompts": f"{options.label} prompts", "unsafe": f"prompts of {unsafe}"}
    for which, judgement in evaluated.judged.items():
        print("\n".join(judgement_lines(titles[which], judgement, str(against or "π_ref"))))
    print(f"tables: {directory.evaluation_folder(record.key)}")


def _judge_options(
    judge: str | None, against: Path | None, unsafe: Path | None
) -> "JudgeOptions | None":
    from constrained_dpo.evaluation.evaluate import JudgeOptions
    from constrained_dpo.evaluation.judge_answers import parse_judge

    if judge is None:
        for option, value in (("--against", against), ("--unsafe", unsafe)):
            if value is not None:
                raise UserError(
                    f"{option}: is read with --judge only; give --judge "
                    "'{base_url: ..., model: ...}'"
                )
        return None
    return JudgeOptions(parse_judge(judge), against, unsafe)
