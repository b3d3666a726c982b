"""The `scorer` blocks of a recipe: which scorers there are, what each can be told, and its texts'
template. What all can be told is in options.py, scorers that load a model for texts are in
model_settings.py."""

import re
from typing import Annotated, Literal, get_args

from pydantic import Field, TypeAdapter, field_validator, model_validator

from data_prep.http import RequestSettings
from data_prep.scorers.model_settings import (
    BeaverScorerSettings,
    ClassifierScorerSettings,
    GuardScorerSettings,
)
from data_prep.scorers.options import ScorerOptions
from data_prep.settings import LocalPath, parse_option
from data_prep.urls import check_urls


class PythonScorerSettings(ScorerOptions):
    """A function of your own: `function(prompts: list[str], responses: list[str]) ->
    list[float]`."""

    type: Literal["python"]
    target: LocalPath = Field(description="file.py:function, or package.module:function")

    @property
    def place(self) -> str:
        return self.target


class ColumnScorerSettings(ScorerOptions):
    """Scores looked up in a table with `prompt, response` and the column; it cannot score anything
    new, so it serves `data score` only."""

    type: Literal["column"]
    file: LocalPath = Field(description="table with prompt, response and the column")
    column: str = Field(description="the column that holds the score")

    @property
    def place(self) -> str:
        return self.file


class ImplicitScorerSettings(ScorerOptions):
    """The implicit reward of a DPO policy, β·log π/π_ref of the sampled tokens (PeCAN,
    arXiv:2405.19544; PeCAID, arXiv:2505.19387)."""

    type: Literal["implicit"]
    beta: float = Field(
        gt=0,
        description="β of the DPO that trained the adapter or model; the scores are in its "
        "reward's units",
    )
    adapter: LocalPath | None = Field(
        None,
        description="LoRA adapter (PEFT folder) on the reference; the recipe's policy is not "
        "loaded twice",
    )
    model: LocalPath | None = Field(
        None,
        description="instead of an adapter: local folder or hub id of a causal model with the "
        "policy's tokens",
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub `model`")
    reference: LocalPath | None = Field(
        None,
        description="what the adapter or model was trained from: local folder or hub id; null: "
        "the recipe's reference policy",
    )
    reference_revision: str | None = Field(
        None, description="branch, tag or commit of a hub `reference`"
    )
    calibrate: LocalPath | None = Field(
        None,
        description="table with prompt, chosen, rejected: `check` and `prepare` report how often "
        "the scores order its pairs right",
    )
    batch_size: int = Field(32, ge=1, description="responses per forward")
    trust_remote_code: bool = Field(
        False, description="run modelling code that comes with `model` or `reference`"
    )
    allow_pickle: bool = Field(
        False, description="accept pickled weights of `model` or `reference`"
    )

    @model_validator(mode="before")
    @classmethod
    def _only_differences(cls, values: object) -> object:
        """log Z(x) is unknown, so a score says something only beside another response's to the same
        prompt."""
        for key in ("indicator", "clip", "threshold"):
            value = values.get(key) if isinstance(values, dict) else None
            field = cls.model_fields.get(key)
            if value is not None and (field is None or value != field.default):
                raise ValueError(f"{key}: {NOT_IDENTIFIED}")
        return values

    @model_validator(mode="after")
    def _one_of_two(self) -> "ImplicitScorerSettings":
        if (self.adapter is None) == (self.model is None):
            raise ValueError("give either adapter (a PEFT folder) or model (a causal model)")
        if self.revision is not None and self.model is None:
            raise ValueError("revision: belongs to model; an adapter is a local folder")
        if self.reference_revision is not None and self.reference is None:
            raise ValueError("reference_revision: belongs to reference")
        return self

    @property
    def place(self) -> str:
        return self.adapter or self.model or ""

    @property
    def models(self) -> list[tuple[str, str | None]]:
        pairs = (self.model, self.revision), (self.reference, self.reference_revision)
        return [(model, revision) for model, revision in pairs if model is not None]


NOT_IDENTIFIED = (
    "an implicit scorer gives r(x, y) − β log Z(x) with an unknown Z(x), so the level of a score "
    "means nothing; "
    "give a margin, which compares responses to the same prompts"
)


class HttpScorerSettings(ScorerOptions, RequestSettings):
    """A server that scores: any JSON endpoint, or a reward model behind vLLM's /classify.

    A server's weights cannot be hashed, so `version` (or what `version_url` answers) stands for
    them in the score cache and in a run's identity: change it whenever the model behind the URL
    changes.
    """

    type: Literal["http"]
    url: str | list[str] = Field(
        description="what is posted to; $NAME: the environment variable's value, for servers that "
        "move; a list (or commas in the variable): servers that give the same scores, which share "
        "the work"
    )
    format: Literal["json", "classify"] = Field(
        "json",
        description="json: lists of prompts and responses in, a list of scores out; classify: "
        "vLLM's /classify, raw logits",
    )
    prompts_field: str = Field(
        "prompts", description="for json: the request's field with the prompts"
    )
    responses_field: str = Field(
        "responses", description="for json: the request's field with the responses"
    )
    scores_field: str = Field(
        "scores", description="for json: the answer's field with one number per response"
    )
    model: str | None = Field(
        None, description="model name sent along, where the server serves several"
    )
    template: str | None = Field(
        None, description="for classify: the text it reads, with {prompt} and {response}"
    )
    label: int = Field(0, ge=0, description="for classify: which class's logit is the score")
    version: str | None = Field(
        None, description="what the server runs, in your words; this or version_url is needed"
    )
    version_url: str | list[str] | None = Field(
        None,
        description="asked with GET for the version: its whole JSON answer counts; of a list all "
        "must answer the same",
    )
    batch_size: int = Field(32, ge=1, description="texts per request")

    @field_validator("url", "version_url")
    @classmethod
    def _plain(cls, url: str | list[str] | None) -> str | list[str] | None:
        return url if url is None else check_urls(url)

    @model_validator(mode="after")
    def _complete(self) -> "HttpScorerSettings":
        if (self.version is None) == (self.version_url is None):
            raise ValueError(
                "give version or version_url: a server's weights cannot be hashed, so one of them "
                "has to identify them"
            )
        if self.format == "classify" and (
            self.template is None or "{response}" not in self.template
        ):
            raise ValueError(
                "format: classify needs a template with {response} (and {prompt}, unless the "
                "response is judged alone)"
            )
        return self

    @property
    def place(self) -> str:
        return self.url if isinstance(self.url, str) else ", ".join(self.url)


AnyScorerSettings = (
    PythonScorerSettings
    | ColumnScorerSettings
    | ClassifierScorerSettings
    | BeaverScorerSettings
    | GuardScorerSettings
    | ImplicitScorerSettings
    | HttpScorerSettings
)


ScorerSettings = Annotated[AnyScorerSettings, Field(discriminator="type")]


SCORER_TYPES = tuple(
    get_args(block.model_fields["type"].annotation)[0] for block in get_args(AnyScorerSettings)
)


def parse_scorer(text: str, option: str) -> ScorerSettings:
    """Scorer settings from a command-line option's YAML, e.g. `{type: python, target:
    "file.py:function"}`; raises UserError."""
    return parse_option(
        TypeAdapter(ScorerSettings),
        text,
        option,
        'write it as in a recipe, e.g. {type: python, target: "file.py:function"}',
    )


def fill_template(template: str, prompt: str, response: str) -> str:
    """The template's text; in one pass, so that a prompt which holds "{response}" is left as it
    is."""
    return re.sub(
        r"\{(prompt|response)\}",
        lambda match: prompt if match[1] == "prompt" else response,
        template,
    )
