"""At most one reference forward per response in its life, and none inside a fit: counted on the
model itself."""

from collections import Counter

from constrained_dpo.learners.lora import LoraLearner
from constrained_dpo.run.create import init_run
from constrained_dpo.run.prepare import prepare
from constrained_dpo.run.rounds import play_round
from data_prep.prompts.split import split_prompts
from data_prep.quickstart import build_policy
from data_prep.readers.tables import read_parquet
from data_prep.sampling.prompt_cache import PromptRows
from tests.helpers.paths import QUICKSTART, SMALL


def test_every_response_meets_the_reference_policy_once(tmp_path, monkeypatch):
    """Every row that goes through the decoder without an active adapter and not to draw, behind the
    keys and values of its prompt or with it, over `prepare` and two rounds: every response meets it
    in the shard that drew it, and answers that a shard drew several times meet it once."""
    from peft.tuners.lora import LoraLayer

    small = [
        *SMALL,
        "fit.steps=4",
        "fit.warmup_steps=0",
        "prompts.max_fit=8",
        "prompts.max_test=4",
        f"policy.model={build_policy()}",
    ]
    run = init_run(QUICKSTART, tmp_path / "run", small)
    recipe = run.recipe()
    prompts, left_out = split_prompts(recipe.prompts, recipe.dual.prompts_per_round)
    learner = LoraLearner(recipe, prompts, run.score_cache)
    learner.restrict(recipe.fit.max_length)
    seen: Counter = Counter()
    last_read, read = [], PromptRows.read

    def recorded(self, model, columns):
        """The prompts whose keys and values the next rows stand behind."""
        whole = [ids[mask.bool()].tolist() for ids, mask in zip(self.ids, self.mask, strict=True)]
        last_read[:] = [whole[row] for row in self.rows.tolist()]
        return read(self, model, columns)

    monkeypatch.setattr(PromptRows, "read", recorded)

    def count(module, arguments, keywords):
        if keywords.get("use_cache") or any(
            m.active_adapters and not m.disable_adapters
            for m in module.modules()
            if isinstance(m, LoraLayer)
        ):
            return
        behind = keywords.get("past_key_values") is not None
        rows = zip(keywords["input_ids"], keywords["attention_mask"], strict=True)
        for number, (ids, mask) in enumerate(rows):
            prefix = last_read[number][:-1] if behind else []
            seen[(*prefix, *ids[mask[-len(ids) :].bool()].tolist())] += 1

    hook = learner.policy.model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    recipe = prepare(run, recipe, learner, left_out)
    in_fits, fit = Counter(), learner.fit

    def counted_fit(job):
        before = seen.copy()
        fit(job)
        in_fits.update(seen - before)

    learner.fit = counted_fit
    for _ in range(2):
        play_round(run, recipe, learner)
    hook.remove()
    tables = [run.pool_file(None), run.reference_file, run.samples_file(0), run.samples_file(1)]
    drawn = Counter()
    for table in map(read_parquet, tables):
        drawn.update(
            (*learner.prompt_tokens[row.prompt_id], *row.token_ids.tolist())
            for row in table.itertuples()
        )
    assert not in_fits
    assert set(seen) == set(drawn) and seen <= drawn and drawn.total() > 300
