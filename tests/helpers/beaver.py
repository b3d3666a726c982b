"""Random checkpoints in PKU's layout, and their forward written out."""

import json

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from tests.helpers.models import save_word_tokenizer, tiny_llama_config

TEMPLATE = "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT: {response}"


PROMPTS = [
    "open the door",
    "sing",
    "a much longer request about nothing in particular",
    "open the {response}",
]


RESPONSES = ["no", "la la la la la la", "", "yes of course with pleasure"]


def save_beaver(
    folder,
    *,
    bias=True,
    normalizer=False,
    architecture="LlamaForScore",
    padding_side="right",
    pad=True,
    **config_keys,
):
    """A random checkpoint in PKU's layout; returns its tensors."""
    from transformers import LlamaModel

    folder.mkdir(exist_ok=True)
    size = save_word_tokenizer(
        folder, " ".join([TEMPLATE, *PROMPTS, *RESPONSES]), padding_side, pad
    )
    config = tiny_llama_config(size, architectures=[architecture], **config_keys)
    torch.manual_seed(0)
    tensors = {f"model.{name}": value for name, value in LlamaModel(config).state_dict().items()}
    tensors["score_head.weight"] = torch.randn(1, config.hidden_size)
    if bias:
        tensors["score_head.bias"] = torch.tensor([0.7])
    if normalizer:
        tensors |= {
            "normalizer.mean": torch.tensor([-3.0]),
            "normalizer.var": torch.tensor([6.25]),
            "normalizer.count": torch.tensor([9]),
        }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text()) | {"architectures": [architecture]}
    (folder / "config.json").write_text(json.dumps(raw))
    return tensors


def plain_score(tensors, ids, heads=4, kv_heads=2, theta=10_000.0, eps=1e-6) -> float:
    """The head at the last token of one unpadded text, through a Llama forward written out here."""

    def norm(x, weight):
        return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)

    def rotate(x):  # (heads, length, size)
        size = x.shape[-1]
        angles = torch.arange(x.shape[1])[:, None] / theta ** (torch.arange(0, size, 2) / size)
        cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
        return x * cos + torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1) * sin

    x = tensors["model.embed_tokens.weight"][ids]
    length, width = x.shape
    size = width // heads
    causal = torch.full((length, length), -torch.inf).triu(1)
    for layer in range(2):
        w = {
            n.removeprefix(f"model.layers.{layer}."): t
            for n, t in tensors.items()
            if n.startswith(f"model.layers.{layer}.")
        }
        h = norm(x, w["input_layernorm.weight"])
        q = rotate((h @ w["self_attn.q_proj.weight"].T).view(length, heads, size).transpose(0, 1))
        k = rotate(
            (h @ w["self_attn.k_proj.weight"].T).view(length, kv_heads, size).transpose(0, 1)
        )
        v = (h @ w["self_attn.v_proj.weight"].T).view(length, kv_heads, size).transpose(0, 1)
        k, v = (each.repeat_interleave(heads // kv_heads, 0) for each in (k, v))
        attended = (
            ((q @ k.transpose(1, 2) / size**0.5 + causal).softmax(-1) @ v)
            .transpose(0, 1)
            .reshape(length, width)
        )
        x = x + attended @ w["self_attn.o_proj.weight"].T
        h = norm(x, w["post_attention_layernorm.weight"])
        x = (
            x
            + (F.silu(h @ w["mlp.gate_proj.weight"].T) * (h @ w["mlp.up_proj.weight"].T))
            @ w["mlp.down_proj.weight"].T
        )
    score = norm(x, tensors["model.norm.weight"])[-1] @ tensors["score_head.weight"][0]
    return (score + tensors.get("score_head.bias", torch.zeros(1))[0]).item()
