"""Scores from a server: a JSON endpoint of one's own, or a reward model behind vLLM's /classify.

vLLM's fields are those of its protocol (vllm/entrypoints/pooling/classify/protocol.py): `input`,
`use_activation` in, `data[i].index` and `data[i].probs` out, which hold logits where the activation
is off.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence

import numpy as np

from data_prep.errors import UserError
from data_prep.http import HttpClient
from data_prep.http_answers import GarbledAnswer
from data_prep.prompts.messages import Prompt, conversation_text
from data_prep.scorers.protocol import Scorer
from data_prep.scorers.settings import HttpScorerSettings, fill_template
from data_prep.servers import Servers
from data_prep.urls import resolve_urls

SAME_SCORE = 0.02
"""By what part of itself, or of 1, a score may differ between servers of the same model: half
precision's rounding, no other weights."""


class HttpScorer(Scorer):
    """Asks the server in batches. Raises UserError at once where the key is not set or the
    version's URL does not answer.

    The fingerprint holds the URL as the recipe names it, the format and the version: of the model
    itself a server shows nothing.
    """

    def __init__(self, settings: HttpScorerSettings) -> None:
        self.settings = settings
        self.reads_conversation = settings.format == "classify"
        self.servers = Servers(settings, resolve_urls(settings.url))
        self._compared = len(self.servers.clients) == 1
        version = settings.version
        if settings.version_url is not None:
            version = self._told_version(resolve_urls(settings.version_url))
        request = settings.model_dump_json(
            include={"url", "format", "model", "template", "label"}, exclude_defaults=True
        )
        self.fingerprint = f"http:{version}:{hashlib.sha256(request.encode()).hexdigest()[:16]}"

    def _told_version(self, urls: list[str]) -> str:
        """The hash of what the servers say they run; raises UserError where they do not agree."""
        client = HttpClient(self.settings)
        told = {url: json.dumps(client.get(url), sort_keys=True) for url in urls}
        if len(set(told.values())) > 1:
            words = "; ".join(f"{url}: {answer[:80]}" for url, answer in told.items())
            raise UserError(f"version_url: the servers run different versions ({words})")
        return hashlib.sha256(told[urls[0]].encode()).hexdigest()[:16]

    def _compare(self, body: dict) -> None:
        """Ask every server for the same scores once; raises UserError where they differ by more
        than rounding."""
        scores: dict[str, np.ndarray] = {}

        def ask(url: str, client: HttpClient) -> None:
            scores[url] = np.array(self._scores(client.post(url, body, self._check)))

        self.servers.each(ask)
        (first, expected), *others = scores.items()
        for url, other in others:
            wide = np.abs(other - expected) > SAME_SCORE * np.maximum(1.0, np.abs(expected))
            if wide.any() or (np.isnan(other) != np.isnan(expected)).any():
                at = int(np.argmax(wide))
                raise UserError(
                    f"{url}: scores a text {other[at]:.4g} that {first} scores {expected[at]:.4g}; "
                    "all servers of a scorer must serve the same model"
                )
        self._compared = True

    def score(self, prompts: Sequence[Prompt], responses: list[str]) -> np.ndarray:
        scores = np.empty(len(prompts))
        for positions, batch in self.batches(prompts, responses):
            scores[positions] = batch
        return scores

    def batches(
        self, prompts: Sequence[Prompt], responses: list[str]
    ) -> Iterator[tuple[list[int], np.ndarray]]:
        """(positions, scores) of a batch as soon as the server has answered; batches come in any
        order."""
        size = self.settings.batch_size
        batches = [
            list(range(begin, min(begin + size, len(prompts))))
            for begin in range(0, len(prompts), size)
        ]
        bodies = [
            self._body([prompts[i] for i in batch], [responses[i] for i in batch])
            for batch in batches
        ]
        if bodies and not self._compared:
            self._compare(bodies[0])
        for index, _, answer in self.servers.post_all("", bodies, desc="score", check=self._check):
            yield batches[index], np.array(self._scores(answer), dtype=np.float64)

    def _body(self, prompts: list[Prompt], responses: list[str]) -> dict:
        settings = self.settings
        named = {} if settings.model is None else {"model": settings.model}
        if settings.format == "classify":
            texts = [
                fill_template(settings.template or "", conversation_text(p), r)
                for p, r in zip(prompts, responses, strict=True)
            ]
            return named | {"input": texts, "use_activation": False}
        return named | {settings.prompts_field: prompts, settings.responses_field: responses}

    def _check(self, body: dict | None, answer: dict) -> None:
        field = "input" if self.settings.format == "classify" else self.settings.responses_field
        expected, count = len((body or {})[field]), len(self._scores(answer))
        if count != expected:
            raise GarbledAnswer(
                f"the answer has {count} scores for {expected} responses; one each is needed, in "
                "their order"
            )

    def _scores(self, answer: dict) -> list[float]:
        """One number per response, in order; NaN where the server says null. Raises GarbledAnswer
        for an answer without them."""
        settings = self.settings
        try:
            if settings.format == "classify":
                rows = sorted(answer["data"], key=lambda row: row["index"])
                values = [row["probs"][settings.label] for row in rows]
            else:
                values = list(answer[settings.scores_field])
            return [math.nan if value is None else float(value) for value in values]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            expected = (
                f"data[i].probs[{settings.label}]"
                if settings.format == "classify"
                else settings.scores_field
            )
            shown = json.dumps(answer)[:200]
            raise GarbledAnswer(f"the answer has no numbers under {expected}: {shown}") from error
