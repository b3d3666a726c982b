"""Were these tokens drawn from this law? Sums over the drawn tokens whose mean is 0 if they were.

Before a token is drawn its prefix is given, so two differences have mean 0 there, whatever the
prefixes are: the token's surprisal −log q(y|prefix) less the law's entropy, and 1[y is an EOS] less
q(EOS|prefix). Their sums over a table are martingales, and the sum of their conditional variances
is their variance (Hall and Heyde, Martingale Limit Theory and Its Application, 1980, section 3.2:
sum / √variance is asymptotically standard normal). No log-probability of who drew them is needed.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DrawLaw:
    """The law that tokens are drawn from: the policy's logits divided by `temperature`, within the
    nucleus of top_p. eos_ids: what ends a response, where its draws are tested; else empty."""

    temperature: float = 1.0
    top_p: float = 1.0
    eos_ids: tuple[int, ...] = ()

    @property
    def is_policy(self) -> bool:
        """Whether it is the policy itself."""
        return self.temperature == 1.0 and self.top_p == 1.0

    def logps(self, logits: "torch.Tensor") -> "torch.Tensor":
        """Log-probabilities of the next token, shape as the logits (num_tokens, vocabulary), −∞
        outside the nucleus: by transformers' own warpers in `generate`'s order."""
        from transformers import TemperatureLogitsWarper, TopPLogitsWarper

        if self.temperature != 1.0:
            logits = TemperatureLogitsWarper(self.temperature)(None, logits)
        if self.top_p < 1.0:
            logits = TopPLogitsWarper(self.top_p)(None, logits)
        return logits.log_softmax(-1)


def draw_terms(
    law: "torch.Tensor", drawn: "torch.Tensor", eos_ids: tuple[int, ...]
) -> "torch.Tensor":
    """Give every drawn token's part in `data_prep.tables.DRAWS`, (num_tokens, 5), float64.

    law: log-probabilities of the next token, (num_tokens, vocabulary); drawn: (num_tokens,).
    """
    import torch

    probability = law.exp()
    logs = law.masked_fill(probability == 0, 0.0)
    first = (probability * logs).sum(-1, dtype=torch.float64)
    second = (probability * logs**2).sum(-1, dtype=torch.float64)
    chosen = law.gather(1, drawn[:, None])[:, 0].double()
    inside = chosen.isfinite()
    ends = torch.tensor(eos_ids, device=law.device)
    end = probability[:, ends].sum(-1, dtype=torch.float64)
    ended = torch.isin(drawn, ends).double()
    columns = (
        first - chosen.where(inside, first),
        (second - first**2).clamp(min=0),
        ended - end,
        end * (1 - end).clamp(min=0),
        (~inside).double(),
    )
    kept = inside.double()
    return torch.stack([*(column * kept for column in columns[:4]), columns[4]], dim=1)
