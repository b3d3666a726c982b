"""`cdpo evaluate --judge`: asks a chat server about stored responses; every answer is kept as it
arrives, so none is asked for twice."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import Field, TypeAdapter, field_validator

from constrained_dpo.evaluation.judge import (
    CRITERIA,
    comparison_prompt,
    read_comparison,
    read_refusal,
    refusal_prompt,
    refusal_rates,
    win_rate,
)
from data_prep.errors import UserError
from data_prep.files import write_json
from data_prep.http import RequestSettings
from data_prep.http_answers import GarbledAnswer
from data_prep.readers.tables import read_parquet
from data_prep.servers import Servers
from data_prep.settings import parse_option
from data_prep.urls import check_urls, resolve_urls


class JudgeSettings(RequestSettings):
    """A chat server (OpenAI's /chat/completions) and how much it is asked."""

    base_url: str | list[str] = Field(
        description="e.g. http://localhost:8000/v1; $NAME: the environment variable's value; a "
        "list: servers of the same model, which share the work"
    )
    model: str = Field(description="model name")
    responses: int = Field(1, ge=1, description="pairs of responses per prompt")
    max_tokens: int = Field(1024, ge=16, description="longest answer of the judge")

    @field_validator("base_url")
    @classmethod
    def _plain(cls, url: str | list[str]) -> str | list[str]:
        return check_urls(url)


def parse_judge(text: str) -> JudgeSettings:
    """Settings from `--judge`'s YAML, e.g. `{base_url: "http://localhost:8000/v1", model: NAME}`;
    raises UserError."""
    return parse_option(
        TypeAdapter(JudgeSettings),
        text,
        "--judge",
        'write e.g. {base_url: "http://localhost:8000/v1", model: NAME}',
    )


class Judge:
    """Asks and remembers: `answers` is a file with a JSON line per answer, by a hash of model and
    question."""

    def __init__(self, settings: JudgeSettings, answers: Path) -> None:
        self.settings, self.file = settings, answers
        self.servers = Servers(settings, resolve_urls(settings.base_url))
        self.kept: dict[str, str] = {}
        for line in answers.read_text(encoding="utf-8").splitlines() if answers.exists() else []:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue  # cut off by a kill: it is asked again
            self.kept[row["question"]] = row["answer"]

    def ask(self, questions: list[str]) -> list[str]:
        """The judge's answer to every question, in order; what was answered before is not asked
        again."""
        keys = [
            hashlib.sha256(
                json.dumps([self.settings.model, self.settings.max_tokens, q]).encode()
            ).hexdigest()
            for q in questions
        ]
        todo = {
            key: question
            for key, question in zip(keys, questions, strict=True)
            if key not in self.kept
        }
        names, bodies = list(todo), [self._body(question) for question in todo.values()]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as log:
            # ends a line that a kill cut off
            log.write("\n" if self.file.stat().st_size else "")
            for index, _, answer in self.servers.post_all(
                "/chat/completions", bodies, desc="judge", check=_check
            ):
                self.kept[names[index]] = _content(answer)
                line = {"question": names[index], "answer": self.kept[names[index]]}
                log.write(json.dumps(line) + "\n")
                log.flush()
        return [self.kept[key] for key in keys]

    def _body(self, question: str) -> dict:
        message = {"role": "user", "content": question}
        return {
            "model": self.settings.model,
            "messages": [message],
            "temperature": 0.0,
            "max_tokens": self.settings.max_tokens,
        }


def _check(_: dict | None, answer: dict) -> None:
    _content(answer)


def _content(answer: dict) -> str:
    """The answer's text; empty where the server says null (a judge that only thought). Raises
    GarbledAnswer without a message."""
    try:
        return answer["choices"][0]["message"].get("content") or ""
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise GarbledAnswer(
            f"the answer has no choices[0].message: {json.dumps(answer)[:200]}"
        ) from error


def pair_responses(
    samples: pd.DataFrame, other: pd.DataFrame, prompt_texts: pd.Series, per_prompt: int
) -> pd.DataFrame:
    """prompt_id, prompt, policy, other: the first `per_prompt` responses of either side to a
    prompt, k-th beside k-th.

    Raises UserError where the other side has no response to a prompt.
    """
    sides = []
    for name, table in (("policy", samples), ("other", other)):
        number = table.groupby("prompt_id").cumcount()
        sides.append(
            table.assign(k=number)[number < per_prompt][["prompt_id", "k", "response"]].rename(
                columns={"response": name}
            )
        )
    pairs = sides[0].merge(sides[1], on=["prompt_id", "k"], how="inner")
    if missing := sorted(set(samples["prompt_id"]) - set(pairs["prompt_id"])):
        raise UserError(
            f"--against: has no response to {len(missing)} of the prompts, e.g. {missing[0]}; "
            "both runs need the same test prompts"
        )
    return pairs.assign(prompt=pairs["prompt_id"].map(prompt_texts))


def judge_evaluation(
    folder: Path,
    settings: JudgeSettings,
    prompt_texts: pd.Series,
    other: pd.DataFrame | None,
    confidence: float,
) -> dict[str, Any]:
    """Judge the stored responses of an evaluation against π_ref's (`other` None) or another
    table's, and keep the record beside them.

    folder: of the evaluation; prompt_texts: what the judge is told the request was, by prompt_id.
    Returns the record of judgement-*.json.
    """
    against = read_parquet(folder / "reference.parquet") if other is None else other
    samples = read_parquet(folder / "samples.parquet")
    pairs = pair_responses(samples, against, prompt_texts, settings.responses)
    judge = Judge(settings, folder / "judge_answers.jsonl")
    judged = judge_pairs(judge, pairs, confidence)
    record = {"model": settings.model, **judged}
    compared = pairs[["prompt_id", "policy", "other"]].to_json(orient="values")
    identity = json.dumps([settings.model, settings.max_tokens, compared])
    name = hashlib.sha256(identity.encode()).hexdigest()[:8]
    write_json(folder / f"judgement-{name}.json", record)
    return record


def judge_pairs(judge: Judge, pairs: pd.DataFrame, confidence: float) -> dict[str, Any]:
    """Ask the judge: `win_rate` by criterion, and `refusal_rates`, JSON-ready.

    pairs: as `pair_responses` gives them.
    """
    record: dict[str, Any] = {}
    rows = list(pairs[["prompt", "policy", "other"]].itertuples(index=False))
    count, ids = len(rows), pairs[["prompt_id"]]
    for criterion in CRITERIA:
        questions = [comparison_prompt(criterion, p, policy, other) for p, policy, other in rows]
        questions += [comparison_prompt(criterion, p, other, policy) for p, policy, other in rows]
        choices = pd.Series([read_comparison(a) for a in judge.ask(questions)], dtype=object)
        first, second = choices[:count].to_numpy(), choices[count:].to_numpy()
        table = ids.assign(policy_first=first, policy_second=second)
        record[criterion] = win_rate(table, confidence)
    questions = [refusal_prompt(p, policy) for p, policy, _ in rows]
    questions += [refusal_prompt(p, other) for p, _, other in rows]
    declines = pd.Series([read_refusal(a) for a in judge.ask(questions)], dtype=object)
    first, second = declines[:count].to_numpy(), declines[count:].to_numpy()
    table = ids.assign(policy=first, other=second)
    record["refusals"] = refusal_rates(table, confidence)
    return record
