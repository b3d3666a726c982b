"""The model card of an export: problem, λ, verdict, sampling law, scorers, limits."""

from constrained_dpo.estimates.measure import Measurement
from constrained_dpo.estimates.verdict import overall
from constrained_dpo.recipe.schema import Recipe
from constrained_dpo.run.directory import RunDirectory
from constrained_dpo.run.record import RoundRecord

MERGED_DTYPE = "bfloat16"


def model_card(
    run: RunDirectory, recipe: Recipe, record: RoundRecord, measured: Measurement, *, merged: bool
) -> str:
    """Write the README.md of an export: problem, λ, verdict on the test prompts, sampling law,
    scorers and their revisions, limits.

    measured: on the test prompts, of what is exported.
    """
    state, problem = run.state(), recipe.problem
    base, law = recipe.policy, record.sampling_law
    what = (
        f"merged into the base in {MERGED_DTYPE} and measured again"
        if merged
        else "a LoRA adapter (PEFT)"
    )
    against = (
        f"the base in {MERGED_DTYPE}"
        if merged
        else f"the base in {base.quantization}, {base.dtype}"
    )
    reference = f"`{base.model}`" + (f", revision `{base.revision}`" if base.revision else "")
    reference += f" + adapter `{base.reference_adapter}`, merged" if base.reference_adapter else ""
    lines = [
        "---",
        f"base_model: {base.model}",
        f"library_name: {'transformers' if merged else 'peft'}",
        "tags: [constrained-dpo, alignment, dpo]",
        "---",
        "",
        f"# {recipe.name}, round {record.round}: {what}",
        "",
        "## Problem",
        "",
        *(f"    {line}" for line in problem.describe().splitlines()),
        "",
        f"π_ref is {reference}; measured against {against}.",
        "",
        f"## Verdict on the test prompts: {overall(measured.verdicts)}",
        "",
        f"| constraint | λ | u | {100 * recipe.dual.confidence:g} % interval | verdict |",
        "|---|---|---|---|---|",
    ]
    for name in problem.names:
        interval = f"[{measured.u_ci_low[name]:+.3f}, {measured.u_ci_high[name]:+.3f}]"
        lines.append(
            f"| {name} | {record.lambda_[name]:.4f} | {measured.u[name]:+.3f} | {interval} | "
            f"{measured.verdicts[name]} |"
        )
    kl = (
        "not estimated (the samples are not from the policy itself)"
        if measured.kl is None
        else f"{measured.kl:.3f} nats"
    )
    lines += [
        "",
        f"u > 0: above the required level. E[{problem.reward}] {measured.reward:+.3f} ± "
        f"{measured.reward_se:.3f}; KL to π_ref {kl}; "
        f"{measured.num_prompts} prompts, {measured.num_samples} responses, mean length "
        f"{measured.mean_length:.0f} tokens, "
        f"{100 * measured.cut_off_fraction:.0f} % cut off.",
        "",
        "## Sampling law",
        "",
        "Prompts are put "
        + (
            "through the tokenizer's chat template."
            if recipe.prompts.format == "chat"
            else f"as `{recipe.prompts.template!r}`."
        )
        + " Responses are drawn at",
        f"temperature {law['temperature']:g}, top_p {law['top_p']:g}, at most "
        f"{law['max_new_tokens']} new tokens, no top_k, no repetition "
        "penalty. Under another law the constraint was not measured.",
        "",
        "## Scorers",
        "",
        "| objective | scorer | revision | fingerprint |",
        "|---|---|---|---|",
    ]
    for name, scorer in recipe.scorers.items():
        revision = scorer.models[0][1] if scorer.models else None
        options = f", {words}" if (words := scorer.described()) else ""
        lines.append(
            f"| {name} | {scorer.type} `{scorer.place}`{options} | {revision or '–'} | "
            f"`{state.hashes['scorers'][name]}` |"
        )
    lines += [
        "",
        "## Limits",
        "",
        "The verdict is about these scorers, on prompts like the test prompts, at the stated "
        "confidence, one round among "
        f"{run.rounds_done()} played. It says nothing of what the scorers miss, of other "
        "languages or uses, or of attacks on the model.",
    ]
    if not merged:
        lines += [
            "",
            f"Load it on {against}, the policy that was measured; on an unquantized base measure "
            "again (`cdpo export --merge`).",
        ]
    return "\n".join(lines) + "\n"
