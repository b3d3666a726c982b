"""What `check` sees of a recipe's sampling servers: whose model they serve, their law beside the
policy's on a few responses of each, and what is known to go wrong on them."""

import re
from typing import Any

from constrained_dpo.estimates.draws import describe_draws, draw_rule, require_policy_draws
from constrained_dpo.estimates.sampling_law import (
    COMPARED_ROWS,
    NOT_THE_POLICY,
    compare_sampler,
    why_not_the_policy,
)
from constrained_dpo.learners.lora import LoraLearner
from constrained_dpo.recipe.schema import Recipe
from data_prep.models.policy import Policy
from data_prep.settings import derive_seed


def try_servers(learner: LoraLearner) -> tuple[dict[str, Any], list[str]]:
    """Give the servers' identity, their log-probabilities beside ours on COMPARED_ROWS responses of
    π_ref a server, and warnings.

    Raises UserError where a server refuses a request, or draws from another policy.
    """
    servers = learner.servers
    if servers is None:
        raise ValueError("the recipe samples here")
    identity = servers.identity()
    prompts = learner.prompts.head(8 * len(servers.servers.serving))
    drawn = learner.sample(
        prompts,
        responses_per_prompt=-(-COMPARED_ROWS * len(servers.servers.serving) // len(prompts)),
        adapter=None,
        source="check",
        seed=derive_seed(learner.recipe.seed, 0, "check"),
    )
    require_policy_draws(drawn, draw_rule(learner.recipe), "check")
    warnings = server_warnings(learner.recipe, learner.policy)
    reason = why_not_the_policy(learner.recipe.sampling, drawn)
    if reason not in (None, NOT_THE_POLICY):
        warnings.append(f"no certificate, KL and objective: {reason}")
    facts: dict[str, Any] = {
        "fingerprint": identity,
        "servers": sorted(drawn["server_url"].unique()),
        "cost": learner.sampling_cost(),
    }
    return facts | compare_sampler(drawn) | describe_draws(drawn), warnings


def server_warnings(recipe: Recipe, policy: Policy) -> list[str]:
    """Warn of what servers are known to answer wrongly: adapters with a layer on the head, and base
    requests where every slot holds an adapter."""
    server = recipe.sampling.server
    if server is None or server.kind != "vllm":
        return []
    warnings = []
    if adapts_head(policy, recipe.policy.lora.target_modules):
        warnings.append(
            "policy.lora.target_modules holds the head: vLLM (0.32) keeps such an adapter in its "
            "answers for the base until it is restarted, so that later draws of π_ref are refused; "
            "write target_modules: all-linear, or restart it before every draw of π_ref"
        )
    warnings.append(
        "vLLM mixes adapters into the base's answers where requests share a batch and every slot "
        "holds an adapter: a run never sends both at once, but others that share the server may; "
        "start it with a slot more than runs (--max-loras 2 or more)"
    )
    return warnings


def adapts_head(policy: Policy, targets: str | list[str]) -> bool:
    """Whether an adapter on these modules has a layer on the language-model head."""
    head = policy.model.get_output_embeddings()
    names = [name for name, module in policy.model.named_modules() if module is head]
    if not names or targets == "all-linear":
        return False
    if isinstance(targets, str):  # PEFT takes a string for a pattern of whole names
        return any(re.fullmatch(targets, name) for name in names)
    return any(name == t or name.endswith(f".{t}") for name in names for t in targets)
