"""Every answer of a small world, such as the embedded one, and its exact probability, through the
policy's own forward."""

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_prep.quickstart import MAX_NEW_TOKENS

if TYPE_CHECKING:
    import torch

    from data_prep.models.policy import Policy


PROMPTS_PER_FORWARD = 12


def enumerate_responses(
    eos_id: int, vocabulary: int, length: int = MAX_NEW_TOKENS
) -> list[list[int]]:
    """Every token sequence the sampler can emit: ended by EOS after 0..L−1 tokens, or L = `length`
    tokens without EOS. Their number is (V−1)^L + Σ (V−1)^l."""
    others = [t for t in range(vocabulary) if t != eos_id]
    sequences = []
    for before in range(length):
        sequences += [[*head, eos_id] for head in itertools.product(others, repeat=before)]
    return sequences + [list(s) for s in itertools.product(others, repeat=length)]


def exact_logps(
    policy: "Policy",
    adapter: Path | None,
    prompt_tokens: dict[str, list[int]],
    length: int = MAX_NEW_TOKENS,
) -> np.ndarray:
    """log π(y | x) of every response, shape (num_prompts, num_responses), rows as in
    `enumerate_responses`; nats, float64.

    From the logits of the policy's own forward (quantized base, adapter attached) at every prefix:
    no masking, no renormalising; the probabilities of a row sum to 1 because the model's own
    next-token distributions do.
    """
    import torch

    from data_prep.models.adapters import attached_adapter

    by_length: dict[int, list[str]] = {}
    for name, tokens in prompt_tokens.items():
        by_length.setdefault(len(tokens), []).append(name)
    rows: dict[str, np.ndarray] = {}
    (eos,) = policy.eos_ids
    with attached_adapter(policy, adapter) as model, torch.no_grad():
        for names in by_length.values():
            for start in range(0, len(names), PROMPTS_PER_FORWARD):
                batch = names[start : start + PROMPTS_PER_FORWARD]
                rectangle = [prompt_tokens[name] for name in batch]
                prompts = torch.tensor(rectangle, device=policy.device)
                tree = response_tree(model, prompts, eos, length).numpy()
                rows |= dict(zip(batch, tree, strict=True))
    return np.stack([rows[name] for name in prompt_tokens])


def response_tree(
    model: "torch.nn.Module", prompts: "torch.Tensor", eos: int, length: int = MAX_NEW_TOKENS
) -> "torch.Tensor":
    """`exact_logps` of prompts of one length, token ids (num_prompts, prompt length), with gradient
    where it is on: every prefix is computed once, from its parent's cached keys and values."""
    import torch

    ids, cache, row, heads = prompts, None, [], torch.zeros(len(prompts), 1, dtype=torch.float64)
    for position in range(length):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        size = output.logits.shape[-1]
        following = output.logits[:, -1].double().log_softmax(-1).cpu().view(len(prompts), -1, size)
        others = torch.tensor([t for t in range(size) if t != eos])
        row.append(heads + following[..., eos])
        heads = (heads[..., None] + following[..., others]).flatten(1)
        if position < length - 1:
            cache = output.past_key_values
            ids = others.repeat(len(ids)).unsqueeze(1).to(prompts.device)
            cache.batch_repeat_interleave(len(others))
    return torch.cat([*row, heads], dim=1)
