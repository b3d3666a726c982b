"""The `scorer` blocks of a recipe: which scorers there are, what each can be told, and its texts'
template."""

import math
import re
from typing import Annotated, Literal, get_args

from pydantic import Field, TypeAdapter, field_validator, model_validator

from data_prep.http import RequestSettings
from data_prep.settings import LocalPath, Settings, parse_option
from data_prep.urls import check_urls


class ScorerOptions(Settings):
    """What every scorer can be told about its scores. Applied by `scoring.apply_options` to what
    the scorer gives and the caches keep."""

    negate: bool = Field(False, description="true for a cost (higher is worse)")
    indicator: float | None = Field(
        None,
        description="t: the score is 1 where it is at least t (after `negate`) and 0 elsewhere, "
        "so its mean is a rate",
    )
    clip: Annotated[list[float], Field(min_length=2, max_length=2)] | None = Field(
        None,
        description="[low, high]: scores outside (after `negate`) become the nearer bound; "
        "`check` and `prepare` say how many",
    )

    range: Annotated[list[float], Field(min_length=2, max_length=2)] | None = Field(
        None,
        description="[low, high]: between these all its scores lie (after `negate`), where you "
        "know it; verdicts then hold without assuming anything of unseen prompts. A score outside "
        "is an error",
    )

    @model_validator(mode="after")
    def _one_shape(self) -> "ScorerOptions":
        if self.range is not None and not self.range[0] < self.range[1]:
            raise ValueError(f"range is {self.range}; write [low, high] with low < high")
        if self.indicator is not None and self.clip is not None:
            raise ValueError(
                "indicator and clip: give one of them; an indicator's scores are 0 and 1 already"
            )
        if self.clip is not None and not self.clip[0] < self.clip[1]:
            raise ValueError(f"clip is {self.clip}; write [low, high] with low < high")
        return self

    @property
    def place(self) -> str:
        """Where the scorer is: a file and function, a folder, a hub id, a URL."""
        raise NotImplementedError

    @property
    def models(self) -> list[tuple[str, str | None]]:
        """Models that are loaded, by folder or hub id, each with its revision."""
        return []

    @property
    def raw_range(self) -> tuple[float, float]:
        """What the scorer itself can give, before `negate`; infinite where nothing bounds it."""
        return -math.inf, math.inf

    @property
    def score_range(self) -> tuple[float, float]:
        """Give the range of the scores after all options; infinite where it is not known."""
        if self.indicator is not None:
            return 0.0, 1.0
        low, high = self.raw_range
        if self.negate:
            low, high = -high, -low
        for bounds in (self.range, self.clip):
            if bounds is not None:
                low, high = max(low, bounds[0]), min(high, bounds[1])
        return low, high

    def described(self) -> str:
        """The options that are not at their defaults, in words; empty where all are."""
        words = ["negated"] if self.negate else []
        if self.indicator is not None:
            words.append(f"1 where at least {self.indicator:g}, else 0")
        if self.clip is not None:
            words.append(f"clipped to [{self.clip[0]:g}, {self.clip[1]:g}]")
        if self.range is not None:
            words.append(f"within [{self.range[0]:g}, {self.range[1]:g}]")
        return ", ".join(words)


# Not part of a scorer's fingerprint: the options apply to its scores afterwards, the rest does
# not change them.
OUTSIDE_FINGERPRINT = {
    "model",
    "revision",
    "batch_size",
    "device",
    "allow_pickle",
    *ScorerOptions.model_fields,
}


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


class ClassifierScorerSettings(ScorerOptions):
    """Any AutoModelForSequenceClassification with its tokenizer."""

    type: Literal["classifier"]
    model: LocalPath = Field(description="local folder or hub id")
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    label: str | int | None = Field(
        None,
        description="which label's output is the score (name or index); needed with several labels",
    )
    text: Literal["pair", "template", "chat"] = Field(
        "pair", description="(prompt, response) pair, `template`, or its chat template"
    )
    template: str | None = Field(
        None,
        description="for text: template; with {response}, and {prompt} unless the response is "
        "judged alone",
    )
    append_eos: bool = Field(
        False, description="append the tokenizer's EOS text (reward models trained with it need it)"
    )
    max_length: int | None = Field(None, ge=8, description="window in tokens; default: the model's")
    truncate: bool = Field(
        False,
        description="cut the prompt's side of texts over max_length, counted; false: such texts "
        "are an error",
    )
    batch_size: int = Field(64, ge=1, description="texts per forward")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="the model's dtype"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where it runs; auto: the GPU where there is one"
    )
    trust_remote_code: bool = Field(
        False, description="run modelling code that comes with the checkpoint"
    )
    allow_pickle: bool = Field(
        False,
        description="accept pickled weights (pytorch_model.bin) where there are no safetensors",
    )
    quantization: Literal["none", "nf4", "int8"] = Field(
        "none",
        description="storage of the weights below the head; `check` and `prepare` measure how far "
        "scores move from those in `dtype`",
    )
    output: Literal["logit", "log_probability", "probability"] = Field(
        "logit",
        description="of the label: its logit, or by softmax over the labels (sigmoid where the "
        "config's problem_type is multi_label)",
    )

    @property
    def place(self) -> str:
        return self.model

    @property
    def models(self) -> list[tuple[str, str | None]]:
        return [(self.model, self.revision)]

    @property
    def raw_range(self) -> tuple[float, float]:
        if self.output == "logit":
            return -math.inf, math.inf
        return (0.0, 1.0) if self.output == "probability" else (-math.inf, 0.0)


class BeaverScorerSettings(ScorerOptions):
    """PKU's Beaver reward and cost models (Safe-RLHF, arXiv:2310.12773), read from their
    checkpoints without the safe-rlhf package."""

    type: Literal["beaver"]
    model: LocalPath = Field(
        description="local folder or hub id, e.g. PKU-Alignment/beaver-7b-v1.0-reward"
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    negate: bool = Field(
        False,
        description="true for a cost (higher is worse); needed for a checkpoint that says it is "
        "one",
    )
    template: str = Field(
        "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{response}",
        description="what it reads; contains {prompt} and {response}",
    )
    append_eos: bool = Field(
        True,
        description="end the text with EOS: the models were trained so, their cards' examples "
        "leave it out",
    )
    max_length: int | None = Field(None, ge=8, description="window in tokens; default: the model's")
    truncate: bool = Field(
        False,
        description="cut the beginning of texts over max_length, counted; false: such texts are "
        "an error",
    )
    batch_size: int = Field(16, ge=1, description="texts per forward")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "bfloat16", description="the backbone's dtype; head and score are float32"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where it runs; auto: the GPU where there is one"
    )
    allow_pickle: bool = Field(
        False,
        description="accept pickled weights (pytorch_model.bin) where there are no safetensors",
    )

    @property
    def place(self) -> str:
        return self.model

    @property
    def models(self) -> list[tuple[str, str | None]]:
        return [(self.model, self.revision)]


class GuardScorerSettings(ScorerOptions):
    """A generative guard (Llama-Guard, Qwen3Guard style): log p(safe) − log p(unsafe) where it
    writes its verdict, in nats."""

    type: Literal["guard"]
    model: LocalPath = Field(description="local folder or hub id of a causal language model")
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    safe: str | list[str] = Field(
        "safe", description="the word of its verdict that says safe, or several (Qwen3Guard: Safe)"
    )
    unsafe: str | list[str] = Field(
        "unsafe",
        description="the word that says unsafe, or several (Qwen3Guard: [Unsafe, Controversial])",
    )
    template: str | None = Field(
        None,
        description="what it reads, with {prompt} and {response}; null: its chat template with a "
        "user and an assistant message",
    )
    verdict_prefix: str | None = Field(
        None,
        description="text between what it reads and its verdict; null: found by letting it answer "
        "on two canned texts",
    )
    min_mass: float = Field(
        0.5,
        gt=0,
        le=1,
        description="least p(safe) + p(unsafe) at the verdict on the canned texts; below it the "
        "guard is refused",
    )
    max_length: int | None = Field(None, ge=8, description="window in tokens; default: the model's")
    truncate: bool = Field(
        False,
        description="cut the beginning of prompts whose text is over max_length, counted; false: "
        "an error",
    )
    batch_size: int = Field(16, ge=1, description="texts per forward")
    quantization: Literal["nf4", "int8", "none"] = Field(
        "none", description="storage of its weights"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "bfloat16", description="compute dtype; the score is float32"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where it runs; auto: the GPU where there is one"
    )
    trust_remote_code: bool = Field(
        False, description="run modelling code that comes with the checkpoint"
    )
    allow_pickle: bool = Field(
        False,
        description="accept pickled weights (pytorch_model.bin) where there are no safetensors",
    )

    @model_validator(mode="after")
    def _readable(self) -> "GuardScorerSettings":
        for field in ("{prompt}", "{response}"):
            if self.template is not None and field not in self.template:
                raise ValueError(f"template does not contain {field}")
        words = [*self.safe_words, *self.unsafe_words]
        if not (
            self.safe_words and self.unsafe_words and all(word.strip() for word in words)
        ) or len(set(words)) < len(words):
            raise ValueError(
                "safe and unsafe each name at least one word, none empty and none twice"
            )
        return self

    @property
    def safe_words(self) -> list[str]:
        return [self.safe] if isinstance(self.safe, str) else self.safe

    @property
    def unsafe_words(self) -> list[str]:
        return [self.unsafe] if isinstance(self.unsafe, str) else self.unsafe

    @property
    def place(self) -> str:
        return self.model

    @property
    def models(self) -> list[tuple[str, str | None]]:
        return [(self.model, self.revision)]


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
