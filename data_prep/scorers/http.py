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

from data_prep.http import GarbledAnswer, HttpClient, resolve_url
from data_prep.prompts.messages import Prompt, conversation_text
from data_prep.scorers.protocol import Scorer
from data_prep.scorers.settings import HttpScorerSettings, fill_template


class HttpScorer(Scorer):
    """Asks the server in batches. Raises UserError at once where the key is not set or the
    version's URL does not answer.

    The fingerprint holds the URL as the recipe names it, the format and the version: of the model
    itself a server shows nothing.
    """

    def __init__(self, settings: HttpScorerSettings) -> None:
        self.settings = settings
        self.reads_conversation = settings.format == "classify"
        self.url = resolve_url(settings.url)
        self.client = HttpClient(settings)
        version = settings.version
        if settings.version_url is not None:
            answer = self.client.get(resolve_url(settings.version_url))
            version = hashlib.sha256(json.dumps(answer, sort_keys=True).encode()).hexdigest()[:16]
        request = settings.model_dump_json(
            include={"url", "format", "model", "template", "label"}, exclude_defaults=True
        )
        self.fingerprint = f"http:{version}:{hashlib.sha256(request.encode()).hexdigest()[:16]}"

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
        for index, answer in self.client.post_all(
            self.url, bodies, desc="score", check=self._check
        ):
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
