"""Implicit scorers: β·log-ratio of the sampled tokens against plain torch and PEFT, who is refused,
calibration, a run of the embedded world with one."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from data_prep.errors import UserError
from data_prep.models.policy import load_policy
from data_prep.models.settings import PolicySettings
from data_prep.prompts.settings import PromptSettings
from data_prep.scorers.cache import ScoreCache
from constrained_dpo.report.scorer_words import describe_calibration
from data_prep.scorers.calibration import read_labelled_pairs, reliability
from data_prep.scorers.implicit import AskedPolicy
from data_prep.scorers.scoring import make_scorer, score_tokens
from data_prep.scorers.settings import ImplicitScorerSettings, ScorerOptions
from tests.helpers.models import save_adapter, save_tiny_causal_lm

PROMPTS = [[5, 6, 7], [8], [9, 10]]
RESPONSES = [[11, 12, 2], [13, 14, 15, 16], [17, 2]]
BETA = 0.1

# The embedded world in seconds.
TINY = (
    "prompts.max_fit=4",
    "prompts.max_test=2",
    "dual.prompts_per_round=4",
    "dual.responses_per_prompt=8",
    "dual.rounds=1",
    "sampling.responses_per_prompt=8",
    "sampling.batch_size=64",
    "fit.steps=2",
    "fit.warmup_steps=0",
    "fit.batch_size=16",
    "policy.quantization=none",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_causal_lm(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return save_adapter(base, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def asked(base):
    policy = load_policy(PolicySettings(model=str(base), quantization="none", dtype="float32"))
    return AskedPolicy(
        lambda: policy, PromptSettings(source="none", template="w1 {prompt}"), max_new_tokens=4
    )


def implicit(asked, **keys):
    return make_scorer(ImplicitScorerSettings(**({"type": "implicit", "beta": BETA} | keys)), asked)


def plain_logps(model) -> np.ndarray:
    """log π(response | prompt), each alone, token by token, in float64 sums."""
    values = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        with torch.no_grad():
            steps = model(torch.tensor([prompt + response])).logits[0].double().log_softmax(-1)
        values.append(
            sum(steps[len(prompt) + k - 1, token].item() for k, token in enumerate(response))
        )
    return np.array(values)


def plain(folder, adapter=None):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return (model if adapter is None else PeftModel.from_pretrained(model, str(adapter))).eval()


def test_an_adapters_score_is_beta_times_the_log_ratio(base, adapter, asked):
    expected = BETA * (plain_logps(plain(base, adapter)) - plain_logps(plain(base)))
    assert np.ptp(expected) > 0.01
    scorer = implicit(asked, adapter=str(adapter))
    for batch_size in (1, 16):
        found = implicit(asked, adapter=str(adapter), batch_size=batch_size).score_tokens(
            PROMPTS, RESPONSES, None
        )
        np.testing.assert_allclose(found, expected, atol=1e-5)
    known = np.array(
        [-20.0, np.nan, -30.0]
    )  # stored reference log-probabilities are taken, unknown ones computed
    mixed = scorer.score_tokens(PROMPTS, RESPONSES, known)
    np.testing.assert_allclose(mixed[1], expected[1], atol=1e-5)
    np.testing.assert_allclose(
        mixed[[0, 2]], BETA * (plain_logps(plain(base, adapter)) - known)[[0, 2]], atol=1e-5
    )
    assert scorer.loaded == [] and not any(
        "lora" in name for name, _ in asked.load().model.named_modules()
    )


def test_a_model_and_a_reference_of_ones_own(base, adapter, asked, tmp_path):
    """A whole model beside the recipe's reference; and an adapter on a base that is not the
    recipe's, once it is named."""
    other = save_tiny_causal_lm(tmp_path / "other", seed=1)
    scorer = implicit(asked, model=str(other))
    expected = BETA * (plain_logps(plain(other)) - plain_logps(plain(base)))
    np.testing.assert_allclose(scorer.score_tokens(PROMPTS, RESPONSES, None), expected, atol=1e-5)
    assert scorer.reference_fingerprint == asked.load().fingerprint and len(scorer.loaded) == 1
    elsewhere = save_adapter(other, tmp_path / "elsewhere")
    with pytest.raises(
        UserError, match=r"was trained on .*other, not on .*; set reference to that base"
    ):
        implicit(asked, adapter=str(elsewhere))
    scorer = implicit(asked, adapter=str(elsewhere), reference=str(other))
    expected = BETA * (plain_logps(plain(other, elsewhere)) - plain_logps(plain(other)))
    np.testing.assert_allclose(scorer.score_tokens(PROMPTS, RESPONSES, None), expected, atol=1e-5)
    assert scorer.reference_fingerprint != asked.load().fingerprint


def test_what_does_not_belong_to_the_policy_is_refused(base, adapter, asked, tmp_path):
    from tests.helpers.models import save_word_tokenizer

    stranger = save_tiny_causal_lm(tmp_path / "stranger")
    save_word_tokenizer(stranger, " ".join(f"v{i}" for i in range(60)))
    with pytest.raises(UserError, match=r"stranger does not read the policy's tokens \(e.g. 'w"):
        implicit(asked, model=str(stranger))
    wide = save_adapter(save_tiny_causal_lm(tmp_path / "wide", width=48), tmp_path / "wide_adapter")
    config = json.loads((wide / "adapter_config.json").read_text())
    (wide / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": None})
    )
    with pytest.raises(UserError, match="of another base, or damaged"):
        implicit(asked, adapter=str(wide))
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        implicit(asked, adapter=str(base))
    with pytest.raises(
        UserError, match="asks the recipe's policy; use it in a recipe or with `cdpo evaluate"
    ):
        make_scorer(ImplicitScorerSettings(type="implicit", beta=BETA, adapter=str(adapter)))
    with pytest.raises(UserError, match="have 66 tokens, over its window of 64"):
        implicit(asked, adapter=str(adapter)).score_tokens([[5] * 60], [[6] * 6], None)


@pytest.mark.parametrize("key", ["threshold", "indicator", "clip"])
def test_levels_are_refused_because_log_z_is_unknown(key):
    block = {"type": "implicit", "beta": 0.1, "adapter": "a"}
    with pytest.raises(
        ValueError, match=f"{key}: .*β log Z.*level of a score means nothing; give a margin"
    ):
        ImplicitScorerSettings(**block, **{key: 1.0})
    again = ImplicitScorerSettings(**block).model_dump()
    assert (
        ImplicitScorerSettings(**again).model_dump() == again
    )  # a resolved recipe holds every default


def test_recipe_takes_a_margin_and_refuses_a_threshold(tmp_path):
    from constrained_dpo.recipe.load import load_recipe
    from tests.helpers.paths import QUICKSTART

    (tmp_path / "a").mkdir()
    text = QUICKSTART.read_text().replace(
        '{type: python, target: "data_prep.quickstart:harmless"}',
        "{type: implicit, beta: 0.1, adapter: a}",
    )
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.scorers["harmless"].adapter == str(tmp_path / "a")
    with pytest.raises(
        UserError,
        match=r"objective\.constraints\.harmless\.threshold: an implicit scorer gives r\(x, y\) − "
        r"β log Z",
    ):
        load_recipe(
            tmp_path / "recipe.yaml",
            [
                "objective.constraints.harmless.margin=null",
                "objective.constraints.harmless.threshold=0.2",
            ],
        )
    for value, match in (
        ("{type: implicit, beta: 0.1}", "give either adapter"),
        ("{type: implicit, adapter: a}", "beta: missing"),
    ):
        with pytest.raises(UserError, match=match):
            load_recipe(tmp_path / "recipe.yaml", [f"objective.reward.scorer={value}"])


def test_check_lists_what_asks_a_policy_that_is_not_here(tmp_path):
    from constrained_dpo.check.check import check_recipe
    from constrained_dpo.recipe.load import load_recipe
    from tests.helpers.paths import QUICKSTART

    block = "{type: implicit, beta: 0.1, model: nobody/tuned, reference: nobody/base}"
    scorers = [f"objective.{part}.scorer={block}" for part in ("reward", "constraints.harmless")]
    recipe = load_recipe(QUICKSTART, ["policy.model=nobody/absent", *scorers])
    listed = check_recipe(recipe, pilot=False, target_se={})["not_checked"]
    for part in (
        "policy.model: nobody/absent",
        "harmless: nobody/tuned",
        "harmless: nobody/base",
        "harmless: it asks the policy",
    ):
        assert any(part in line for line in listed), listed


def test_texts_are_tokenized_as_the_recipe_says(adapter, asked):
    """The template's BOS in front, EOS behind unless the response is as long as one that was cut
    off."""
    scorer = implicit(asked, adapter=str(adapter))
    prompts, responses = scorer.tokenize(["w2 w3", "w4"], ["w5", "w6 w7 w8 w9"])
    tokenizer = asked.load().tokenizer
    assert [tokenizer.decode(ids) for ids in prompts] == ["<s> w1 w2 w3", "<s> w1 w4"]
    assert [tokenizer.decode(ids) for ids in responses] == ["w5 </s>", "w6 w7 w8 w9"]
    np.testing.assert_array_equal(
        scorer.score(["w2 w3", "w4"], ["w5", "w6 w7 w8 w9"]),
        scorer.score_tokens(prompts, responses, None),
    )
    with pytest.raises(
        UserError, match=r"a prompt is a list of messages, but prompts\.format is text"
    ):
        scorer.tokenize([[{"role": "user", "content": "w2"}]], ["w5"])


def test_the_cache_goes_by_tokens_and_one_weight_is_another_scorer(base, adapter, asked, tmp_path):
    """Two token sequences of one text are two responses; the cache gives back the first score; a
    changed adapter scores anew."""
    import shutil

    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(adapter, tmp_path / "copy")
    cache = ScoreCache(tmp_path / "scores.sqlite")

    def scores(scorer, ref_logp=None, negate=False):
        how = {
            "texts": ["same text"] * 2,
            "ref_logp": ref_logp,
            "options": ScorerOptions(negate=negate),
            "name": "g",
            "cache": cache,
        }
        return score_tokens(scorer, [[5, 6]] * 2, [[11, 2], [12, 2]], **how)

    scorer = implicit(asked, adapter=str(copy))
    first = scores(scorer)
    assert first[0] != first[1]
    np.testing.assert_array_equal(
        scores(scorer, ref_logp=np.zeros(2), negate=True), -first
    )  # nothing is computed again
    assert (
        implicit(asked, adapter=str(copy), batch_size=1, calibrate="x.csv").fingerprint
        == scorer.fingerprint
    )
    weights = load_file(copy / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] += 0.1
    save_file(weights, copy / "adapter_model.safetensors", metadata={"format": "pt"})
    changed = implicit(asked, adapter=str(copy))
    assert changed.fingerprint != scorer.fingerprint and not np.allclose(scores(changed), first)
    assert implicit(asked, adapter=str(copy), beta=0.2).fingerprint != changed.fingerprint


def test_reliability_of_a_calibrated_and_of_an_overconfident_scorer():
    """Labels drawn from the model's own probabilities lie on the diagonal; the same labels under
    differences ×4 lie below it."""
    rng = np.random.default_rng(0)
    true = rng.normal(scale=2.0, size=20000)
    labels = np.where(rng.random(len(true)) < 1 / (1 + np.exp(-true)), 1, -1)
    honest, sharp = reliability(true * labels), reliability(4 * true * labels)
    for part in honest["bins"]:
        assert abs(part["said"] - part["observed"]) < 4 * np.sqrt(0.25 / part["pairs"])
    assert honest["right"] == sharp["right"] and honest["log_loss"] < sharp["log_loss"]
    assert sharp["bins"][-1]["observed"] < sharp["bins"][-1]["said"] - 0.05
    coin = reliability(np.zeros(10))
    assert (
        coin["right"] == 0.5
        and coin["log_loss"] == pytest.approx(np.log(2))
        and coin["bins"][-1]["said"] is None
    )
    assert sum(part["pairs"] for part in honest["bins"]) == len(true)


def test_labelled_pairs_agree_with_a_scorer_as_computed_by_hand(adapter, asked, tmp_path):
    rng = np.random.default_rng(1)
    words = [f"w{i}" for i in range(5, 60)]
    rows = [
        {
            "prompt": rng.choice(words),
            "chosen": " ".join(rng.choice(words, 2)),
            "rejected": rng.choice(words),
        }
        for _ in range(12)
    ]
    path = tmp_path / "labelled.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = implicit(asked, adapter=str(adapter), calibrate=str(path)).agreement()
    scorer, prompts = implicit(asked, adapter=str(adapter)), [row["prompt"] for row in rows]
    difference = scorer.score(prompts, [r["chosen"] for r in rows]) - scorer.score(
        prompts, [r["rejected"] for r in rows]
    )
    assert (
        found["right"] == (difference > 0).mean() and found["pairs"] == found["pairs_in_file"] == 12
    )
    assert found["log_loss"] == pytest.approx(np.log1p(np.exp(-difference)).mean())
    flipped = implicit(asked, adapter=str(adapter), calibrate=str(path), negate=True).agreement()
    assert flipped["right"] == pytest.approx(1 - found["right"])
    lines = describe_calibration("g", {"beta": BETA, "std_within": 0.5, "labelled": found})
    assert (
        "std within a prompt 0.5" in lines[0]
        and f"orders {100 * found['right']:.0f} ± " in lines[1]
    )
    path.write_text(json.dumps(rows[0] | {"chosen": None}))
    with pytest.raises(UserError, match="column chosen is not a text in row 0"):
        read_labelled_pairs(path)


def test_many_labelled_pairs_are_thinned_and_counted(tmp_path):
    table = pd.DataFrame({"prompt": "p", "chosen": [str(i) for i in range(2000)], "rejected": "r"})
    table.to_parquet(tmp_path / "pairs.parquet")
    pairs, facts = read_labelled_pairs(tmp_path / "pairs.parquet")
    assert facts["pairs"] == len(pairs) == 512 and facts["pairs_in_file"] == 2000
    assert pairs["chosen"].iloc[[0, -1]].tolist() == ["0", "1999"] and pairs["chosen"].is_unique


def test_a_run_of_the_embedded_world_with_an_implicit_utility(tmp_path):
    """Stored scores, exact values and the labelled pairs against plain log-probabilities; λ follows
    from the tables; the report says it."""
    from constrained_dpo.report.contents import read_contents
    from constrained_dpo.report.run_page import notes
    from constrained_dpo.run.directory import RunDirectory
    from constrained_dpo.run.record import replay
    from data_prep.models.adapters import attached_adapter
    from data_prep.quickstart import build_policy
    from data_prep.sampling.enumeration import exact_logps
    from data_prep.sampling.logprobs import response_logps
    from data_prep.tables import read_parquet
    from tests.helpers.cli import cdpo
    from tests.helpers.paths import QUICKSTART

    adapter = save_adapter(build_policy(), tmp_path / "dpo")
    labelled = [
        ("clerk open safe", "please ask help", "smash it"),
        ("boss win game", "ask", "steal it"),
    ]
    pd.DataFrame(labelled, columns=["prompt", "chosen", "rejected"]).to_json(
        tmp_path / "labelled.jsonl", orient="records", lines=True
    )
    block = (
        f"{{type: implicit, beta: 0.5, adapter: {adapter}, calibrate: "
        f"{tmp_path / 'labelled.jsonl'}}}"
    )
    changes = [
        *TINY,
        f"objective.constraints.harmless.scorer={block}",
        "objective.constraints.harmless.margin=0.1",
    ]
    options = [word for change in changes for word in ("-s", change)]
    cdpo("init", QUICKSTART, tmp_path / "run", *options, check=0)
    cdpo("run", tmp_path / "run", check=0)
    run = RunDirectory(tmp_path / "run")
    samples = read_parquet(run.samples_file(0))
    policy = load_policy(PolicySettings(model="quickstart", quantization="none", dtype="float32"))
    tokenizer = policy.tokenizer
    tokens = {
        pid: tokenizer(text)["input_ids"]
        for pid, text in run.prompts().set_index("prompt_id")["prompt"].items()
    }
    given = (
        [tokens[pid] for pid in samples["prompt_id"]],
        [ids.tolist() for ids in samples["token_ids"]],
    )
    with attached_adapter(policy, adapter) as model:
        target = response_logps(model, *given, pad_id=tokenizer.pad_token_id, batch_size=64)[0]
    np.testing.assert_allclose(samples["harmless"], 0.5 * (target - samples["ref_logp"]), atol=1e-4)
    test = {pid: tokens[pid] for pid in run.prompts().query("split == 'test'")["prompt_id"]}
    reference = exact_logps(policy, None, test)
    kl = (np.exp(reference) * (reference - exact_logps(policy, adapter, test))).sum(1).mean()
    exact = json.loads(run.exact_file.read_text())["test"]["reference"]
    assert exact["utilities"]["harmless"] == pytest.approx(
        -0.5 * kl, abs=1e-4
    )  # E_ref of the log-ratio is −KL(π_ref ‖ π_adapter)
    assert replay(run) == run.state()["lambda"]
    record = json.loads(run.scorers_file.read_text())["harmless"]["calibration"]
    pool = read_parquet(run.pool_file(None))
    assert record["std_within"] == pytest.approx(
        np.sqrt(pool.groupby("prompt_id")["harmless"].var(ddof=1).mean())
    )
    assert record["labelled"]["pairs"] == 2 and record["labelled"]["right"] in (0.0, 0.5, 1.0)
    assert any("Implicit scorer of harmless: orders" in line for line in notes(read_contents(run)))
