"""`cdpo evaluate` and `cdpo export`: a policy judged afresh, and taken away. Results on stdout, a
user's mistake exits 2."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from constrained_dpo.cli.options import AsJson, RoundChoice, RunPath, results_console
from data_prep.console import quiet_libraries
from data_prep.errors import UserError


def evaluate(
    run: RunPath,
    round_: RoundChoice = "last",
    adapter: Annotated[
        Path | None,
        typer.Option(help="instead of a round: a LoRA adapter from elsewhere on the run's base"),
    ] = None,
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
    from constrained_dpo.evaluation.evaluate import (
        check_names,
        evaluate_adapter,
        evaluate_round,
        evaluation_prompts,
    )
    from constrained_dpo.evaluation.judge_answers import (
        check_judge_options,
        judge_all,
        judgement_lines,
        left_out_line,
        parse_judge,
    )
    from constrained_dpo.learners.lora import LoraLearner
    from constrained_dpo.report.words import print_evaluation
    from constrained_dpo.run.directory import RunDirectory
    from constrained_dpo.run.prepare import require_same_inputs
    from constrained_dpo.run.selection import chosen_round
    from data_prep.scorers.settings import parse_scorer

    directory = RunDirectory(run)
    recipe = directory.recipe()
    if adapter is None:
        number = chosen_round(directory, round_)
    elif round_ != "last":
        raise UserError(f"--adapter and --round {round_}: give one of them")
    elif not directory.state()["lambda"]:
        raise UserError(
            f"{run}: not prepared yet, so π_ref's responses are missing; `cdpo prepare {run}` "
            "draws and scores them"
        )
    check_judge_options(
        judge, against, {"--unsafe": unsafe, "--prompts": prompts, "--adapter": adapter}
    )
    settings = None if judge is None else parse_judge(judge)
    extra = {
        name: parse_scorer(text, f"--scorer {name}")
        for name, _, text in (s.partition("=") for s in scorer)
    }
    check_names(list(extra), recipe.problem)
    quiet_libraries()
    chosen, duplicates = evaluation_prompts(directory, recipe, prompts)
    learner = LoraLearner(recipe, directory, chosen, sys.stderr.isatty(), extra)
    with directory.locked():
        require_same_inputs(directory, learner)
        left_out = {"duplicates": duplicates} | learner.restrict(recipe.fit.max_length)
        count = responses or recipe.dual.responses_per_prompt
        label = prompts.stem if prompts else "test"
        asked = {"label": label, "responses_per_prompt": count, "seed": seed}
        if adapter is None:
            record = evaluate_round(directory, recipe, learner, number, **asked)
        else:
            record = evaluate_adapter(directory, recipe, learner, adapter, **asked)
        judged = (
            {}
            if settings is None
            else judge_all(
                directory, recipe, learner, record["key"], settings, against, unsafe, round_, asked
            )
        )
    if as_json:
        print(json.dumps(record | {"left_out": left_out} | ({"judge": judged} if judged else {})))
        return
    print_evaluation(results_console(), record, recipe.problem, recipe.dual.confidence)
    if any(left_out.values()):
        print(left_out_line(left_out))
    titles = {"asked": f"{label} prompts", "unsafe": f"prompts of {unsafe}"}
    for which, found in judged.items():
        print("\n".join(judgement_lines(titles[which], found, str(against or "π_ref"))))
    print(f"tables: {directory.evaluation_folder(record['key'])}")


def export(
    run: RunPath,
    output: Annotated[Path, typer.Argument(help="new folder")],
    round_: RoundChoice = "last",
    merge: Annotated[
        bool,
        typer.Option(
            "--merge",
            help="merge into the unquantized base (bfloat16) and measure the result again",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a round's adapter, or the merged model, with a model card."""
    from constrained_dpo.evaluation.evaluate import evaluation_prompts
    from constrained_dpo.evaluation.export import export_adapter, export_merged
    from constrained_dpo.report.words import print_evaluation
    from constrained_dpo.run.directory import RunDirectory
    from constrained_dpo.run.selection import chosen_round

    directory = RunDirectory(run)
    recipe, number = directory.recipe(), chosen_round(directory, round_)
    if not merge:
        export_adapter(directory, recipe, number, output)
        said = f"{output}: adapter of round {number} and its model card (README.md)"
        print(json.dumps({"output": str(output), "round": number}) if as_json else said)
        return
    quiet_libraries()
    with directory.locked():
        record = export_merged(
            directory, recipe, number, output, evaluation_prompts(directory, recipe, None)[0]
        )
    if as_json:
        print(json.dumps({"output": str(output), "round": number, "measurement": record}))
        return
    print_evaluation(results_console(), record, recipe.problem, recipe.dual.confidence)
    print(
        f"{output}: round {number} merged in bfloat16, its measurement (measurement.json) and its "
        "model card (README.md)"
    )
