"""A recipe drafted: look at everything that was given, then write the file."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

from ruamel.yaml.comments import CommentedMap

from constrained_dpo.draft.models import read_model
from constrained_dpo.draft.prompts import read_prompt_file
from constrained_dpo.draft.recipe import Seen, placed, recipe_lines
from constrained_dpo.draft.specs import NamedScorer, named_scorer
from constrained_dpo.draft.trial import Trial, play_trial, quick, try_alone
from constrained_dpo.recipe.load import validated
from constrained_dpo.recipe.schema import Recipe
from data_prep.errors import UserError
from data_prep.files import write_atomically
from data_prep.settings import parse_yaml


@dataclass(frozen=True)
class Wish:
    """What a recipe is to be about, as the command line says it."""

    policy: str
    prompts: str
    reward: str
    constraints: Sequence[str]
    margins: Sequence[str]


@dataclass(frozen=True)
class Draft:
    """What was written. trial: of the model's answers, None where the models do not load in
    seconds; warnings: what to look at before a run."""

    recipe: Recipe
    trial: Trial | None
    warnings: list[str]


def require_new(file: Path) -> None:
    """Raises UserError where a recipe is there already, or the name is no recipe's."""
    if file.suffix not in (".yaml", ".yml"):
        raise UserError(f"{file}: a recipe is a YAML file; name it {file.name}.yaml")
    if file.exists():
        raise UserError(f"{file}: is there already; choose another name")
    if not file.absolute().parent.is_dir():
        raise UserError(f"{file}: no such folder {file.parent}; make it first")


def copy_shipped(file: Path, name: str) -> Recipe:
    """Write a recipe that ships with the toolkit, by its name, as it is; return it.

    Raises UserError for a name that none has.
    """
    require_new(file)
    folder = files("constrained_dpo") / "recipes"
    shipped = {Path(item.name).stem: item for item in folder.iterdir() if _is_recipe(item.name)}
    if name not in shipped:
        raise UserError(f"--copy {name}: no such recipe; there are {', '.join(sorted(shipped))}")
    text = shipped[name].read_text(encoding="utf-8")
    recipe = _validated(file, text)
    write_atomically(file, text.encode())
    return recipe


def _is_recipe(name: str) -> bool:
    return name.endswith(".yaml")


def write_draft(file: Path, wish: Wish) -> Draft:
    """Look at the model, the prompts and the scorers, and write a recipe about them.

    Raises UserError, before anything is written, for what cannot be used.
    """
    require_new(file)
    seen = _seen(file, wish)
    warnings = list[str]()
    scorers = {seen.reward.name: seen.reward, **seen.constraints}
    models = [model for scorer in scorers.values() for model, _ in scorer.settings.models]
    if quick([wish.policy, *models], seen.model.gpu_bytes):
        trial = play_trial(_validated(file, _text(seen)))
        seen, warnings = replace(seen, trial=trial), _constant(trial)
    else:
        untried = try_alone(scorers)
        warnings.append("the models are large, so none answered; β and the margins are guesses")
        warnings += [f"scorer of {name}: was not tried" for name in untried]
    text = _text(seen)
    recipe = _validated(file, text)
    write_atomically(file, text.encode())
    return Draft(recipe, seen.trial, warnings)


def _seen(file: Path, wish: Wish) -> Seen:
    """What the files say, before anything is sampled."""
    folder = file.absolute().parent
    reward = _placed(named_scorer(wish.reward, "--reward", "reward"), folder)
    constraints: dict[str, NamedScorer] = {}
    for text in wish.constraints:
        scorer = _placed(named_scorer(text, "--constraint"), folder)
        if scorer.name in constraints or scorer.name == reward.name:
            raise UserError(
                f"--constraint {text}: {scorer.name} is taken; give it a name of its own, NAME=SPEC"
            )
        constraints[scorer.name] = scorer
    margins = dict(margin.partition("=")[::2] for margin in wish.margins)
    if odd := [name for name, value in margins.items() if name not in constraints or not value]:
        raise UserError(
            f"--margin {odd[0]}: write NAME=NUMBER or NAME=0.5std, NAME a constraint "
            f"({', '.join(constraints) or 'there is none'})"
        )
    model = read_model(wish.policy)
    return Seen(
        name=file.stem,
        model=replace(model, source=placed(wish.policy, folder)),
        source=placed(wish.prompts, folder),
        prompts=read_prompt_file(wish.prompts, model),
        reward=reward,
        constraints=constraints,
        margins=margins,
        trial=None,
    )


def _placed(scorer: NamedScorer, folder: Path) -> NamedScorer:
    """The scorer with its paths as the recipe finds them."""
    paths = ("target", "model", "adapter", "reference", "calibrate")
    block = {
        key: placed(str(value), folder) if key in paths and value is not None else value
        for key, value in scorer.block.items()
    }
    return replace(scorer, block=block)


def _text(seen: Seen) -> str:
    return "\n".join(line.written() for line in recipe_lines(seen)) + "\n"


def _validated(file: Path, text: str) -> Recipe:
    return validated(file, CommentedMap(parse_yaml(text)))


def _constant(trial: Trial) -> list[str]:
    """A line per scorer that gave one number alone."""
    return [
        f"scorer of {name}: gives {facts.low:.4g} to all {trial.answers} answers; where it cannot "
        "tell answers apart, `cdpo prepare` refuses it"
        for name, facts in trial.scores.items()
        if facts.low == facts.high
    ]
