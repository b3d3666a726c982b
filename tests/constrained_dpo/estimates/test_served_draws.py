"""Servers that look right and draw from another law: each is refused in one line, and a right one
is not."""

import pytest
import torch

from constrained_dpo.estimates.draws import DrawRule, draw_test, require_policy_draws, rounding
from data_prep.errors import UserError
from data_prep.models.policy import load_policy
from data_prep.models.settings import PolicySettings
from tests.helpers.completion_server import Faults, completion_server
from tests.helpers.models import save_tiny_causal_lm, tiny_adapter
from tests.helpers.served import draw, load_base, served_by

RULE = DrawRule(rounding=0.002, strict=True)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A tiny model whose next-token laws are far from uniform."""
    folder = save_tiny_causal_lm(tmp_path_factory.mktemp("peaked"))
    model = load_base(folder)
    with torch.no_grad():
        model.lm_head.weight *= 15
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def policy(model_folder):
    settings = PolicySettings(model=str(model_folder), quantization="none", dtype="float32")
    return load_policy(settings)


def five_percent_off(folder):
    model, rng = load_base(folder), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 1 + 0.05 * torch.randn(weight.shape, generator=rng)
    return model


def judged(policy, url: str, adapter=None, count: int = 8, rule: DrawRule = RULE, **more):
    """A table of 8 responses a prompt that a server drew, after the tests."""
    settings = served_by(url, **more)
    table = draw(policy, settings, count, 8, adapter=adapter)
    require_policy_draws(table, rule, "reference")
    return table


def test_a_right_server_is_believed_with_and_without_an_adapter(policy, model_folder, tmp_path):
    adapter = tiny_adapter(policy, tmp_path / "adapter")
    with completion_server(lambda: load_base(model_folder)) as server:
        for table in (judged(policy, server.url), judged(policy, server.url, adapter)):
            assert rounding(table) < 1e-5
            test = draw_test(table)
            assert abs(test.eos) < 4 and abs(test.surprisal) < 4 and test.outside == 0
            assert set(table["server_url"]) == {server.url}


def test_other_weights_are_refused(policy, model_folder):
    with (
        completion_server(lambda: five_percent_off(model_folder)) as server,
        pytest.raises(
            UserError, match=r"^reference: http\S+ has log-probabilities that are 0\."
        ) as e,
    ):
        judged(policy, server.url)
    assert "\n" not in str(e.value) and "sampling.server.rounding" in str(e.value)


def test_an_ignored_adapter_is_refused_also_where_the_policy_is_quantized(
    policy, model_folder, tmp_path
):
    adapter = tiny_adapter(policy, tmp_path / "adapter")
    quantized = DrawRule(rounding=0.5, strict=False)
    faults = Faults(ignores_adapters=True)
    with completion_server(lambda: load_base(model_folder), faults) as server:
        judged(policy, server.url)
        for rule in (RULE, quantized):
            with pytest.raises(UserError, match="it ignores adapters"):
                judged(policy, server.url, adapter, rule=rule)


def test_an_adapter_that_leaks_into_the_base_is_refused(policy, model_folder, tmp_path):
    adapter = tiny_adapter(policy, tmp_path / "adapter")
    with completion_server(lambda: load_base(model_folder), Faults(leaks=True)) as server:
        judged(policy, server.url)
        judged(policy, server.url, adapter)
        with pytest.raises(UserError, match=r"stays in the base's answers until it is restarted"):
            judged(policy, server.url)


def test_draws_that_end_too_often_are_refused_though_the_log_probabilities_are_right(
    policy, model_folder
):
    with completion_server(lambda: load_base(model_folder), Faults(ends=2.0)) as server:
        table = judged(policy, server.url, count=24, rule=None)
        assert rounding(table) < 1e-5
        with pytest.raises(UserError, match=r"responses end too often \(z = \+"):
            require_policy_draws(table, RULE, "reference")
        # where the law is not known to be ours, nothing follows from that
        require_policy_draws(table, DrawRule(0.002, strict=False), "reference")


def test_a_nucleus_that_is_not_heeded_is_refused(policy, model_folder):
    with completion_server(lambda: load_base(model_folder)) as server:
        settings = served_by(server.url).model_copy(update={"top_p": 0.5})
        table = draw(policy, settings, 8, 8)
    with pytest.raises(UserError, match="does it obey top_p"):
        require_policy_draws(table, RULE, "reference")


def test_one_of_two_servers_is_named(policy, model_folder):
    with (
        completion_server(lambda: load_base(model_folder)) as right,
        completion_server(lambda: five_percent_off(model_folder)) as wrong,
    ):
        with pytest.raises(UserError, match=wrong.url):
            judged(policy, [right.url, wrong.url], count=16, concurrency=1)
        table = judged(policy, [right.url, wrong.url], count=16, rule=None, concurrency=1)
    assert set(table["server_url"]) == {right.url, wrong.url}
