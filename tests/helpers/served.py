"""What tests of served sampling share: prompts, settings and draws of a tiny policy."""

import pandas as pd

from data_prep.sampling.completions import CompletionServers
from data_prep.sampling.generate import Sampler
from data_prep.sampling.law import SamplingSettings
from data_prep.sampling.served import ServedSampler


def load_base(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


def prompts_of(policy, count: int) -> tuple[pd.DataFrame, dict[str, list[int]]]:
    texts = [f"w{i} w{2 * i} w{3 * i}" for i in range(count)]
    tokens = {text: policy.tokenizer(text)["input_ids"] for text in texts}
    return pd.DataFrame({"prompt_id": texts, "prompt": texts}), tokens


def served_by(url: str | list[str], **more) -> SamplingSettings:
    server = {"base_url": url, "model": "base", "timeout": 20.0} | more
    return SamplingSettings(backend="openai", max_new_tokens=6, batch_size=64, server=server)


def draw(policy, settings, count, per_prompt, adapter=None, seed=3) -> pd.DataFrame:
    """Responses that the settings' server draws."""
    table, tokens = prompts_of(policy, count)
    sampler = ServedSampler(CompletionServers(settings.server), Sampler(policy, tokens, settings))
    return sampler.draw(
        table, responses_per_prompt=per_prompt, adapter=adapter, source="reference", seed=seed
    )
