"""`cdpo front` and `cdpo export --margin` on a real small conditional run."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from constrained_dpo import Run
from constrained_dpo.evaluation.export_members import served_rank
from constrained_dpo.evaluation.front_record import FrontPoint
from constrained_dpo.fit.family import FAMILY_WEIGHTS, read_family
from data_prep.errors import UserError
from data_prep.models.policy import resolve_model
from data_prep.models.settings import PolicySettings
from tests.helpers.cli import cdpo


@pytest.fixture(scope="module")
def played(conditional_run, tmp_path_factory) -> Run:
    """A copy to write into."""
    return Run(shutil.copytree(conditional_run.path, tmp_path_factory.mktemp("played") / "run"))


def last_family(played: Run) -> Path:
    round_folder = played.directory.round_folder(1)
    return sorted(round_folder.glob("family*"))[-1]


@pytest.fixture(scope="module")
def shown(played) -> dict:
    result = cdpo("front", played.path, "--margins", "harmless=0.1,0.4", "--json", check=0)
    return json.loads(result.stdout)


def test_front_lists_its_points_and_reads_them_again(played, shown):
    assert [point["levels"] for point in shown["points"]] == [{"harmless": m} for m in (0.1, 0.4)]
    assert [point["look"] for point in shown["points"]] == [1, 2]
    text = cdpo("front", played.path, "--margins", "harmless=0.1,0.4", check=0).stdout
    for point in shown["points"]:
        assert f"{point['lambda']['harmless']:.4f}" in text and point["verdict"] in text
    assert "front.html" in text and (played.path / "front/front.html").stat().st_size > 20_000
    more = cdpo("front", played.path, "--kappa", "0.25", "--json", check=0).stdout
    points = json.loads(more)["points"]
    assert len(points) == 3 and points[2]["kappa"] == 0.25 and points[2]["kappa_outside"] == "low"


def member_of(folder) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(
        resolve_model(PolicySettings(model="quickstart")), dtype=torch.float32
    )
    return PeftModel.from_pretrained(base, str(folder)).eval()


def test_an_exported_margin_is_the_familys_member(played, shown, tmp_path):
    out = tmp_path / "adapter"
    text = cdpo("export", played.path, out, "--margin", "harmless=0.4", check=0).stdout
    names = {file.name for file in out.iterdir()}
    assert names == {
        "README.md",
        "measurement.json",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    point = FrontPoint.read(out / "measurement.json")
    assert point.to_json()["lambda"] == shown["points"][1]["lambda"]  # the stored point
    assert point.verdict in text and f"{point.lambda_['harmless']:.4f}" in text
    family = read_family(last_family(played))
    gates = family.gates(pd.DataFrame([point.lambda_]))[0]
    whole = load_file(last_family(played) / FAMILY_WEIGHTS)
    weights = load_file(out / "adapter_model.safetensors")
    for name, value in weights.items():
        scale = torch.tensor(np.repeat(gates, family.rank), dtype=torch.float32)[:, None]
        assert torch.equal(value, whole[name] * scale if "lora_A" in name else whole[name])
    model = member_of(out)
    assert any(p.abs().max() > 0 for n, p in model.named_parameters() if "lora_B" in n)
    card = (out / "README.md").read_text()
    assert f"--max-lora-rank 16 --lora-modules harmless-0.4={out}" in card
    assert point.verdict in card and f"{point.test.u['harmless']:+.3f}" in card


@pytest.mark.slow
def test_several_margins_are_several_adapters_and_one_card(played, shown, tmp_path):
    out = tmp_path / "adapters"
    result = cdpo("export", played.path, out, "--margin", "harmless=0.1,0.4", "--json", check=0)
    content = json.loads(result.stdout)
    names = ["harmless-0.1", "harmless-0.4"]
    assert sorted(file.name for file in out.iterdir()) == ["README.md", *names]
    assert [adapter["name"] for adapter in content["adapters"]] == names
    card = (out / "README.md").read_text()
    assert content["serve"] in card
    modules = re.search(r"--lora-modules (.*)", card)[1].split()
    assert modules == [f"{name}={out / name}" for name in names]
    for name in names:
        assert (out / name / "adapter_model.safetensors").exists()
    assert not list(out.parent.glob(".*")) and not list(out.parent.glob("..*"))
    cdpo("export", played.path, tmp_path / "kappa", "--kappa", "0.5", check=0)
    assert "kappa-0.5=" in (tmp_path / "kappa" / "README.md").read_text()


@pytest.mark.slow
def test_a_margin_out_of_reach_is_exported_at_the_edge_with_a_notice(played, tmp_path):
    out = tmp_path / "far"
    text = cdpo("export", played.path, out, "--margin", "harmless=9", check=0).stdout
    assert "notice: harmless-9: the margin of harmless is met at no λ in range" in text
    card, point = (out / "README.md").read_text(), FrontPoint.read(out / "measurement.json")
    assert "**Notice.** harmless-9" in card and point.at_edge == {"harmless": "high"}
    assert point.verdict == "violated" and "violated" in card


def test_a_rounds_adapter_is_exported_as_ever(played, tmp_path):
    cdpo("export", played.path, tmp_path / "round", check=0)
    plain = load_file(tmp_path / "round" / "adapter_model.safetensors")
    stored = load_file(played.directory.adapter_folder(1) / "adapter_model.safetensors")
    assert all(torch.equal(value, stored[name]) for name, value in plain.items())
    at = played.record().lambda_next["harmless"]
    assert f"{at:.4f}" in (tmp_path / "round" / "README.md").read_text()


def test_from_python(played, shown, tmp_path):
    front = played.front(margins={"harmless": [0.1, 0.4]})
    assert [point.levels["harmless"] for point in front.rows if point.solved][:2] == [0.1, 0.4]
    (member,) = played.export(tmp_path / "out", margins={"harmless": 0.1})
    assert member.folder == tmp_path / "out" and member.point.setting.margins == {"harmless": 0.1}
    with pytest.raises(UserError, match="exists already"):
        played.export(tmp_path / "out", margins={"harmless": 0.1})


def test_what_cannot_be_is_refused_in_a_line(played, run, refused, tmp_path):
    refused("front", run.path, match="has no family")
    refused("export", run.path, tmp_path / "x", "--margin", "harmless=1", match="has no family")
    refused("front", played.path, "--margins", "harmless", match="write NAME=LOW:HIGH:NUMBER")
    refused("front", played.path, "--margins", "other=1", match="no constraint has this name")
    refused("front", played.path, "--kappa", "much", match="--kappa much: write numbers")
    words = ("--margin", "harmless=1", "--merge")
    refused("export", played.path, tmp_path / "x", *words, match="--merge: --margin, --lambda")
    refused("export", played.path, played.path, "--margin", "harmless=1", match="exists already")
    assert not (tmp_path / "x").exists()


def test_a_server_takes_the_next_rank_that_vllm_allows():
    assert [served_rank(r) for r in (8, 9, 24, 64, 257, 512)] == [8, 16, 32, 64, 320, 512]
    assert served_rank(600) == 600
