"""How much memory a run will need, from the loaded models and the recipe: estimates, to be compared with a measured peak.

The estimate counts live tensors (tests/test_memory.py says how far it is off). It does not count the libraries' own memory (0.5 to 1 GiB of
a process on the CPU, the CUDA context on a GPU), attention implementations that keep their scores, or what an allocator keeps for later: on
a CPU, glibc's default settings held up to twice the live memory in the same test.
"""

import re
from typing import TYPE_CHECKING

from constrained_dpo.fit_settings import FitSettings
from constrained_dpo.recipe import Recipe
from data_prep.policy import LoraSettings, Policy
from data_prep.sampling import LOGITS_AT_ONCE
from data_prep.scoring import Scorer

if TYPE_CHECKING:
    import torch

GIB = 2**30
# TRL's fused language-model head projects so many tokens by so many words at once (trl.kernels.chunked_logprob).
TOKEN_TILE, WORD_TILE = 4096, 32768
OPTIMIZER_BYTES = {"adamw_torch": 8, "paged_adamw_32bit": 8, "paged_adamw_8bit": 2, "adamw_bnb_8bit": 2}


def module_bytes(model: "torch.nn.Module") -> int:
    """Bytes of parameters and buffers as they are stored, a 4-bit layer's scales included."""
    total = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            total += state.absmax.numel() * state.absmax.element_size()
            state = getattr(state, "state2", None)
    return total


def _models_of(scorer: Scorer) -> list["torch.nn.Module"]:
    """What a scorer keeps loaded; an implicit one's adapter on the policy itself is none of it."""
    return scorer.loaded if hasattr(scorer, "loaded") else [scorer.model] if hasattr(scorer, "model") else []


def _linear_shapes(model: "torch.nn.Module") -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of every linear layer but the output head, by module name."""
    head, shapes = model.get_output_embeddings(), {}
    for name, module in model.named_modules():
        if module is head:
            continue
        if hasattr(module, "in_features") and hasattr(module, "out_features"):
            shapes[name] = (module.in_features, module.out_features)
        elif hasattr(module, "nx") and hasattr(module, "nf"):  # GPT-2's Conv1D
            shapes[name] = (module.nx, module.nf)
    return shapes


def _is_target(name: str, lora: LoraSettings) -> bool:
    if lora.target_modules == "all-linear":
        return True
    if isinstance(lora.target_modules, str):
        return re.fullmatch(lora.target_modules, name) is not None
    return name.split(".")[-1] in lora.target_modules


def _head_is_target(model: "torch.nn.Module", lora: LoraSettings) -> bool:
    """Whether the language-model head gets an adapter layer; `all-linear` leaves it out."""
    head = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if module is head]
    return lora.target_modules != "all-linear" and any(_is_target(name, lora) for name in names)


def estimate_memory(policy: Policy, recipe: Recipe, scorers: dict[str, Scorer], longest_prompt: int) -> dict[str, float]:
    """GiB by part: base, scorers, adapter (weights, gradients, optimizer), fit (activations, logits), sampling; and the peak.

    longest_prompt: tokens. The peak is base + scorers + the larger of fit and sampling. With `fit.shared_prompts`, `fit` is that of one
    sequence per row; where the fit finds the layout inexact or dearer it needs `fit_padded` instead, which is given beside it.
    """
    import torch

    model, fit, sampling, lora = policy.model, recipe.fit, recipe.sampling, recipe.policy.lora
    config = model.config.get_text_config()
    size = getattr(torch, recipe.policy.dtype).itemsize
    shapes = _linear_shapes(model)
    targets = [shape for name, shape in shapes.items() if _is_target(name, lora)]
    hidden, layers, words = config.hidden_size, config.num_hidden_layers, config.vocab_size
    head_adapted = _head_is_target(model, lora)
    widest = max((max(shape) for shape in shapes.values()), default=hidden)

    trained = [*targets, (hidden, words)] if head_adapted else targets
    adapter = sum(lora.r * (inputs + outputs) for inputs, outputs in trained) * (4 + 4 + OPTIMIZER_BYTES[fit.optimizer])
    per_token = size * (sum(outputs for _, outputs in shapes.values()) + layers * (hidden + widest))
    # A dropped-out input is kept in float32; its mask takes a byte a number on a GPU and, being noise in float32, four on a CPU.
    on_gpu = policy.device.type == "cuda"
    kept = (5 if on_gpu else 8) if lora.dropout else 4 if size != 4 else 0
    per_token += sum(inputs * kept + 4 * lora.r for inputs, _ in targets)
    if fit.gradient_checkpointing:
        per_token = layers * hidden * size + per_token / layers
    response = min(sampling.max_new_tokens, fit.max_length)
    prompt = min(longest_prompt, fit.max_length - response)
    if recipe.pool.source != "reference":  # of a dataset's answers only this is known before they are read
        response = fit.max_length - prompt
    # Of a logit live: in policy.dtype, in float32, its log-softmax and its gradient; with an adapter its part in float32 and the sum.
    per_logit = size + 3 * 4 + (2 * 4 if head_adapted else 0)
    own_logits = fit.group_size * fit.batch_size * response * words * per_logit if head_adapted else None
    padded = _padded_batch(fit, prompt + response, hidden, words, size, per_token, on_gpu, own_logits)
    shared = _shared_batch(fit, prompt, response, hidden, words, size, per_token, per_logit)
    # A quantized layer is expanded to the compute dtype while it is used.
    expanded = 0 if recipe.policy.quantization == "none" else max((i * o for i, o in shapes.values()), default=0) * size

    rows, window = sampling.batch_size, longest_prompt + sampling.max_new_tokens
    heads = config.num_attention_heads
    per_head = getattr(config, "head_dim", None) or hidden // heads
    cache = 2 * layers * (getattr(config, "num_key_value_heads", None) or heads) * per_head * size * rows * window
    drawing = cache + rows * words * (size + 3 * 4)
    judging = rows * ((sampling.max_new_tokens + 1) * words * size + window * size * (4 * hidden + 3 * widest))

    parts = {
        "base": module_bytes(model),
        "scorers": sum(module_bytes(model) for s in scorers.values() for model in _models_of(s)),
        "adapter": adapter,
        "fit": (min(shared, padded) if fit.shared_prompts else padded) + expanded,
        "sampling": max(drawing, judging) + expanded,
    }
    parts["peak"] = parts["base"] + parts["scorers"] + max(parts["adapter"] + parts["fit"], parts["sampling"])
    if fit.shared_prompts:
        parts["fit_padded"] = padded + expanded
    return {name: value / GIB for name, value in parts.items()}


def _padded_batch(
    fit: FitSettings, length: int, hidden: int, words: int, size: int, per_token: float, on_gpu: bool, own_logits: float | None
) -> float:
    """Bytes of a batch of group_size × fit.batch_size sequences of `length` tokens: per_token kept for the backward pass, and TRL's head,
    or `own_logits` where the model's own logits take its place.

    Kept per token: what every linear layer puts out (in policy.dtype), attention's output and the activation of the widest layer; for
    every layer with an adapter its dropped-out input in float32 with its mask; with gradient checkpointing a hidden state per layer and
    one layer's activations.
    """
    tokens = fit.group_size * fit.batch_size * length
    # On a GPU a Triton kernel works in place; elsewhere torch's backward holds seven float32 copies of the tile and two masks.
    tile = min(tokens, TOKEN_TILE) * (WORD_TILE * size if on_gpu else min(words, WORD_TILE) * (size + 7 * 4 + 2))
    return tokens * per_token + (tile if own_logits is None else own_logits) + tokens * hidden * (size + 4)


def _shared_batch(
    fit: FitSettings, prompt: int, response: int, hidden: int, words: int, size: int, per_token: float, per_logit: float
) -> float:
    """Bytes of a batch of fit.batch_size rows, a prompt with its group_size responses in one sequence each, their mask and logits (those at
    response positions, at most LOGITS_AT_ONCE)."""
    length = prompt + fit.group_size * response
    tokens, scored = fit.batch_size * length, fit.batch_size * fit.group_size * response
    logits = min(scored * words, LOGITS_AT_ONCE) * per_logit
    return tokens * per_token + tokens * length * size + logits + scored * hidden * (size + 4)
