"""Ours beside the paper's setting on real text, at equal passes: four rounds a run, models and
prompts from your own folders.

    python -m benchmarks.bench_real_text runs FILE.jsonl --policy POLICY --helpful RM
        --harmless RM --fit FIT.jsonl --test TEST.jsonl
    python -m benchmarks.bench_real_text table FILE.jsonl

`runs` goes on where FILE stops (25 minutes of one core a run). POLICY: a small chat model; RM:
sequence classifiers with one logit of (prompt, response); prompts: rows with `prompt` as chat
messages. All settings make 64 steps of 16 sequences a round and start from the same reference
samples.
"""

import argparse
import json
import tempfile
from pathlib import Path

import yaml

from benchmarks.real_runs import play
from constrained_dpo import Run

SETTINGS: dict[str, dict[str, dict]] = {
    "paper": {
        "fit": {"labels": "bernoulli", "group_size": 2, "batch_size": 8, "pairs_per_prompt": 8},
        "pool": {"grow": False},
    },
    "ours": {
        "fit": {"group_size": 4, "batch_size": 4, "groups_per_prompt": 4},
        "pool": {"shares": {"reference": 0.2, "recent": 0.4, "earlier": 0.4}},
    },
    "conditional": {
        "policy": {"lora": {"dropout": 0}},
        "dual": {"method": "solve", "confidence_side": "none"},
        "fit": {
            "conditional": {},
            "refresh": 2,
            "loraplus_ratio": 16,
            "learning_rate": 5e-4,
            "group_size": 4,
            "batch_size": 4,
            "groups_per_prompt": 4,
        },
        "pool": {"shares": {"reference": 0.1, "recent": 0.7, "earlier": 0.2}},
    },
}
MARGINS = (0.0, 0.4, 0.8, 1.2, 1.6)  # of a conditional run's front
ROUND_KEYS = (
    "lambda",
    "u",
    "u_ci_low",
    "u_ci_high",
    "reward",
    "kl",
    "lagrangian_gap",
    "lagrangian_gap_se",
    "ess",
    "residual",
)
TEST_KEYS = (
    "u",
    "u_ci_low",
    "u_ci_high",
    "reward",
    "reward_se",
    "kl",
    "mean_length",
    "cut_off_fraction",
    "num_prompts",
    "num_samples",
)
FRONT_KEYS = {"levels", "lambda_", "gains", "u", "u_ci_low", "u_ci_high", "reward", "kl", "at_edge"}


def recipe_of(setting: str, seed: int, parts: argparse.Namespace) -> dict:
    scorer = {"type": "classifier", "max_length": 128, "truncate": True}
    recipe = {
        "name": f"real text, {setting}",
        "seed": seed,
        "policy": {
            "model": str(parts.policy.resolve()),
            "quantization": "nf4",
            "dtype": "float32",
            "lora": {"dropout": 0.05},
        },
        "prompts": {
            "source": str(parts.fit.resolve()),
            "test": str(parts.test.resolve()),
            "format": "chat",
        },
        "sampling": {"responses_per_prompt": 8, "max_new_tokens": 48, "batch_size": 64},
        "objective": {
            "beta": 0.1,
            "reward": {
                "name": "helpful",
                "scorer": scorer | {"model": str(parts.helpful.resolve())},
            },
            "constraints": [
                {
                    "name": "harmless",
                    "margin": 0.8,
                    "scorer": scorer | {"model": str(parts.harmless.resolve())},
                }
            ],
        },
        "dual": {
            "method": "subgradient",
            "init": "one_shot",
            "step_size": 0.5,
            "rounds": 4,
            "responses_per_prompt": 8,
        },
        "fit": {
            "conditional": None,
            "refresh": 1,
            "loraplus_ratio": 1,
            "loss": "logistic",
            "steps": 64,
            "learning_rate": 1e-3,
            "warmup_steps": 5,
            "max_length": 256,
        },
    }
    recipe["prompts"] |= {"max_fit": parts.prompts, "max_test": parts.prompts}
    recipe["dual"]["prompts_per_round"] = parts.prompts
    for block, changes in SETTINGS[setting].items():
        recipe[block] = recipe.get(block, {}) | changes
    return recipe


def play_runs(parts: argparse.Namespace) -> None:
    """One JSON line a run: the task, and by round what the tables are made of."""
    parts.output.parent.mkdir(parents=True, exist_ok=True)
    done = (
        {tuple(json.loads(line)["task"]) for line in parts.output.read_text().splitlines()}
        if parts.output.exists()
        else set()
    )
    for seed in parts.seeds:
        with tempfile.TemporaryDirectory() as name:
            folder, prepared = Path(name), None
            for setting in parts.settings:
                if (setting, seed) in done:
                    continue
                (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_of(setting, seed, parts)))
                records, _ = play(folder / "recipe.yaml", folder / setting, [], start_from=prepared)
                prepared, contents = folder / setting, [record.to_json() for record in records]
                reasons = {
                    key: value
                    for content in contents
                    for key, value in content.items()
                    if key.endswith("_reason") and value is not None
                }
                rounds = [
                    {key: content[key] for key in (*ROUND_KEYS, "verdict", "seconds")}
                    | {"test": {key: content["test"][key] for key in TEST_KEYS}}
                    for content in contents
                ]
                result = {"task": (setting, seed), "rounds": rounds, "reasons": reasons}
                if setting == "conditional":
                    result["front"] = front_of(prepared)
                with parts.output.open("a") as lines:
                    lines.write(json.dumps(result) + "\n")
                print(
                    setting,
                    seed,
                    [round(r["test"]["u"]["harmless"], 3) for r in rounds],
                    flush=True,
                )


def front_of(run: Path) -> list[dict]:
    """Play five margins of a conditional run: λ, u, reward and KL on the test prompts."""
    rows = Run(run).front(margins={"harmless": MARGINS}).rows
    return [row.model_dump(include=FRONT_KEYS) for row in rows]


def print_table(results: list[dict]) -> None:
    """The last round of every run, test prompts."""
    columns = (
        "setting",
        "seed",
        "λ",
        "u [95 %]",
        "E[helpful] ± SE",
        "KL",
        "Lagrangian gap ± SE",
        "ESS",
        "residual",
        "tokens",
        "cut off",
    )
    print("| " + " | ".join((*columns, "verdict")) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for result in sorted(results, key=lambda r: r["task"]):
        setting, seed = result["task"]
        last = result["rounds"][-1]
        test, (name,) = last["test"], last["lambda"]
        gap = (
            "null"
            if last["lagrangian_gap"] is None
            else f"{last['lagrangian_gap']:.2f} ± {last['lagrangian_gap_se']:.2f}"
        )
        cells = [setting, str(seed), f"{last['lambda'][name]:.2f}"]
        cells.append(
            f"{test['u'][name]:+.2f} [{test['u_ci_low'][name]:+.2f}, "
            f"{test['u_ci_high'][name]:+.2f}]"
        )
        cells += [
            f"{test['reward']:+.2f} ± {test['reward_se']:.2f}",
            f"{test['kl']:.2f}",
            gap,
            f"{last['ess']:.1f}",
            f"{last['residual']:.2f}",
        ]
        cells += [
            f"{test['mean_length']:.1f}",
            f"{100 * test['cut_off_fraction']:.0f} %",
            last["verdict"],
        ]
        print("| " + " | ".join(cells) + " |")
    for result in results:
        if "front" in result:
            print(
                "\n| margin | λ | gain of harmless | u [95 %] | E[helpful] | KL |\n"
                + "|---" * 6
                + "|"
            )
        for point in result.get("front", []):
            low, high = point["u_ci_low"]["harmless"], point["u_ci_high"]["harmless"]
            cells = [
                f"{point['levels']['harmless']:.1f}",
                f"{point['lambda_']['harmless']:.2f}",
                f"{point['gains']['harmless']:+.2f}",
                f"{point['u']['harmless']:+.2f} [{low:+.2f}, {high:+.2f}]",
                f"{point['reward']:+.2f}",
                f"{point['kl']:.2f}",
            ]
            print("| " + " | ".join(cells) + " |")
    for result in results:
        if result["reasons"]:
            print(f"{result['task']}: {result['reasons']}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("runs")
    runs.add_argument("output", type=Path)
    for name in ("policy", "helpful", "harmless", "fit", "test"):
        runs.add_argument(f"--{name}", type=Path, required=True)
    runs.add_argument(
        "--prompts", type=int, default=96, help="dual prompts, and as many test prompts"
    )
    runs.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    runs.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    commands.add_parser("table").add_argument("output", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "table":
        print_table([json.loads(line) for line in arguments.output.read_text().splitlines()])
        return
    play_runs(arguments)


if __name__ == "__main__":
    main()
