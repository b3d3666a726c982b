"""Implicit scorers in a recipe and in a run of the embedded world: stored scores, exact values and
labelled pairs against plain log-probabilities."""

import numpy as np
import pandas as pd
import pytest

from constrained_dpo.api import Run
from constrained_dpo.check.check import check_recipe
from constrained_dpo.recipe.load import load_recipe
from constrained_dpo.report.contents import read_contents
from constrained_dpo.report.run_page import notes
from constrained_dpo.run.record import read_optimum, replay
from constrained_dpo.run.scorer_facts import read_scorer_facts
from data_prep.errors import UserError
from data_prep.models.adapters import attached_adapter
from data_prep.models.policy import load_policy
from data_prep.models.settings import PolicySettings
from data_prep.quickstart import build_policy
from data_prep.readers.tables import read_parquet
from data_prep.sampling.enumeration import exact_logps
from data_prep.sampling.logprobs import response_logps
from tests.helpers.models import save_adapter
from tests.helpers.paths import QUICKSTART

# The embedded world in seconds.
TINY = (
    "policy.quantization=none",
    "prompts.max_fit=2",
    "prompts.max_test=2",
    "dual.prompts_per_round=2",
    "dual.responses_per_prompt=8",
    "dual.rounds=1",
    "sampling.responses_per_prompt=8",
    "sampling.batch_size=64",
    "fit.steps=2",
    "fit.warmup_steps=0",
    "fit.batch_size=4",
)
LABELLED = (
    ("clerk open safe", "please ask help", "smash it"),
    ("boss win game", "ask", "steal it"),
)


def test_recipe_takes_a_margin_and_refuses_a_threshold(tmp_path):
    (tmp_path / "a").mkdir()
    function = '{type: python, target: "data_prep.quickstart:harmless"}'
    implicit = "{type: implicit, beta: 0.1, adapter: a}"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(QUICKSTART.read_text().replace(function, implicit))
    assert load_recipe(recipe).scorers["harmless"].adapter == str(tmp_path / "a")
    constraint = "objective.constraints.harmless"
    unidentified = (
        r"objective\.constraints\.harmless\.threshold: an implicit scorer gives r\(x, y\) − β log Z"
    )
    with pytest.raises(UserError, match=unidentified):
        load_recipe(recipe, [f"{constraint}.margin=null", f"{constraint}.threshold=0.2"])
    for block, match in (
        ("{type: implicit, beta: 0.1}", "give either adapter"),
        ("{type: implicit, adapter: a}", "beta: missing"),
    ):
        with pytest.raises(UserError, match=match):
            load_recipe(recipe, [f"objective.reward.scorer={block}"])


def test_check_lists_what_asks_a_policy_that_is_not_here():
    block = "{type: implicit, beta: 0.1, model: nobody/tuned, reference: nobody/base}"
    scorers = [f"objective.{key}.scorer={block}" for key in ("reward", "constraints.harmless")]
    recipe = load_recipe(QUICKSTART, ["policy.model=nobody/absent", *scorers])
    listed = check_recipe(recipe, pilot=False, target_se={}).not_checked
    for words in (
        "policy.model: nobody/absent",
        "harmless: nobody/tuned",
        "harmless: nobody/base",
        "harmless: it asks the policy",
    ):
        assert any(words in line for line in listed), listed


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return save_adapter(build_policy(), tmp_path_factory.mktemp("dpo"))


@pytest.fixture(scope="module")
def run(adapter, tmp_path_factory):
    """A round with an implicit utility."""
    folder = tmp_path_factory.mktemp("implicit")
    columns, labelled = ["prompt", "chosen", "rejected"], folder / "labelled.csv"
    pd.DataFrame(LABELLED, columns=columns).to_csv(labelled, index=False)
    block = f"{{type: implicit, beta: 0.5, adapter: {adapter}, calibrate: {labelled}}}"
    constraint = "objective.constraints.harmless"
    changes = [*TINY, f"{constraint}.scorer={block}", f"{constraint}.margin=0.1"]
    run = Run.create(QUICKSTART, folder / "run", changes)
    run.play()
    return run.directory


@pytest.fixture(scope="module")
def policy():
    return load_policy(PolicySettings(model="quickstart", quantization="none", dtype="float32"))


@pytest.fixture(scope="module")
def tokens(run, policy) -> dict[str, list[int]]:
    prompts = run.prompts().set_index("prompt_id")["prompt"]
    return {pid: policy.tokenizer(text)["input_ids"] for pid, text in prompts.items()}


def test_stored_scores_are_the_log_ratios_of_what_was_sampled(run, policy, tokens, adapter):
    samples = read_parquet(run.samples_file(0))
    prompts = [tokens[pid] for pid in samples["prompt_id"]]
    responses = [ids.tolist() for ids in samples["token_ids"]]
    pad_id = policy.tokenizer.pad_token_id
    with attached_adapter(policy, adapter) as model:
        target = response_logps(model, prompts, responses, pad_id=pad_id, batch_size=64)
    np.testing.assert_allclose(samples["harmless"], 0.5 * (target - samples["ref_logp"]), atol=1e-4)


def test_the_exact_utility_of_the_reference_is_minus_its_divergence(run, policy, tokens, adapter):
    """E_ref of the log-ratio is −KL(π_ref ‖ π_adapter)."""
    ids = run.prompts().query("split == 'test'")["prompt_id"]
    test = {pid: tokens[pid] for pid in ids}
    reference = exact_logps(policy, None, test)
    kl = (np.exp(reference) * (reference - exact_logps(policy, adapter, test))).sum(1).mean()
    utility = read_optimum(run)["test"].reference.utilities["harmless"]
    assert utility == pytest.approx(-0.5 * kl, abs=1e-4)


def test_lambda_follows_from_the_tables(run):
    assert replay(run) == run.state().lambda_


def test_calibration_is_kept_and_reported(run):
    record = read_scorer_facts(run)["harmless"].calibration
    pool = read_parquet(run.pool_file(None))
    within = np.sqrt(pool.groupby("prompt_id")["harmless"].var(ddof=1).mean())
    assert record["std_within"] == pytest.approx(within)
    assert record["labelled"]["pairs"] == 2 and record["labelled"]["right"] in (0.0, 0.5, 1.0)
    lines = notes(read_contents(run))
    assert any("Implicit scorer of harmless: orders" in line for line in lines)
