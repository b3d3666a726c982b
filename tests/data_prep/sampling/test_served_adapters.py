"""Adapters on a server: one at a time, none beside the base, there again after a restart, gone when
nobody needs them."""

import re

import numpy as np
import pytest

from data_prep.sampling.completions import CompletionServers
from data_prep.sampling.generate import Sampler
from data_prep.sampling.served import ServedSampler
from tests.helpers.completion_server import completion_server
from tests.helpers.models import tiny_adapter
from tests.helpers.served import load_base, prompts_of, served_by


@pytest.fixture(scope="module")
def adapters(policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return [tiny_adapter(policy, folder / name, seed=seed) for seed, name in enumerate("ab")]


def sampler_of(policy, url: str, owner: str | None = "run") -> ServedSampler:
    settings = served_by(url)
    _, tokens = prompts_of(policy, 2)
    servers = CompletionServers(settings.server, owner)
    return ServedSampler(servers, Sampler(policy, tokens, settings))


def drawn(policy, sampler: ServedSampler, adapter):
    prompts, _ = prompts_of(policy, 2)
    return sampler.draw(prompts, responses_per_prompt=4, adapter=adapter, source="s", seed=1)


def loaded(server) -> set[str]:
    return set(server.models) - {"base"}


def test_a_server_holds_the_adapter_that_is_asked_for_and_no_other(policy, model_folder, adapters):
    with completion_server(lambda: load_base(model_folder)) as server:
        sampler = sampler_of(policy, server.url)
        names = []
        for adapter in adapters:
            for _ in range(2):
                drawn(policy, sampler, adapter)
            (name,) = loaded(server)
            assert re.fullmatch(r"cdpo-[0-9a-f]{8}-[0-9a-f]+", name)
            names.append(name)
        drawn(policy, sampler, None)
        assert not loaded(server) and len(set(names)) == 2
        drawn(policy, sampler, adapters[0])
        sampler.servers.release()
        assert not loaded(server)
        paths = [path for path, _ in server.requests if "lora" in path]
        assert paths == ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"] * 3


def test_a_restarted_server_gets_the_adapter_again(policy, model_folder, adapters):
    with completion_server(lambda: load_base(model_folder)) as server:
        sampler = sampler_of(policy, server.url)
        before = drawn(policy, sampler, adapters[0])
        server.forget()
        after = drawn(policy, sampler, adapters[0])
        assert after["response"].equals(before["response"])
        np.testing.assert_allclose(after["server_logp"], after["policy_logp"], atol=1e-4)


def test_two_runs_share_a_server_and_each_clears_up_after_itself(policy, model_folder, adapters):
    with completion_server(lambda: load_base(model_folder)) as server:
        one, two = (sampler_of(policy, server.url, owner) for owner in ("one", "two"))
        for sampler in (one, two):
            drawn(policy, sampler, adapters[0])
        assert len(loaded(server)) == 2
        again = sampler_of(policy, server.url, "one")  # after a kill of `one`
        drawn(policy, again, adapters[1])
        assert len(loaded(server)) == 2
        drawn(policy, two, None)
        assert len(loaded(server)) == 1


def test_adapters_go_with_who_put_them_there(policy, model_folder, adapters):
    with completion_server(lambda: load_base(model_folder)) as server:
        sampler = sampler_of(policy, server.url, owner=None)
        drawn(policy, sampler, adapters[0])
        assert loaded(server)
        del sampler
        assert not loaded(server)
