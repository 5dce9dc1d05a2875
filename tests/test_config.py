"""One dict, from which the flags are made."""

import subprocess
import sys
from dataclasses import fields

import pytest
from conftest import ROOT

import config as settings
import deploy_space
import export_model
import inspect_data
import prepare_data
import train_grpo
import train_reward
import validate_model
from phi2_grpo.common import cli

SCRIPTS = {
    "prepare_data": prepare_data,
    "inspect_data": inspect_data,
    "train_reward": train_reward,
    "train_grpo": train_grpo,
    "validate_model": validate_model,
    "deploy_space": deploy_space,
    "export_model": export_model,
}


def test_every_key_has_a_comment_and_is_read():
    assert set(cli._comments()) == set(settings.CONFIG), "each key needs a comment: it is the flag's help"
    read = set().union(*(module.KEYS for module in SCRIPTS.values()))
    assert read == set(settings.CONFIG), "a key that no script reads is a dead knob"
    sources = "".join(
        path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("phi2_grpo/*.py")] if path.name != "config.py"
    )
    from trl import GRPOConfig

    trl = {field.name for field in fields(GRPOConfig)}
    for key in settings.CONFIG:
        assert key in trl or f'config["{key}"]' in sources or f"config['{key}']" in sources or f'("{key}"' in sources \
            or f'"{key}")' in sources, f"{key} is declared but nothing uses it"  # fmt: skip


def test_presets_and_limits_name_known_keys_and_valid_values():
    assert set(settings.LIMITS) <= set(settings.CONFIG)
    for preset in settings.PRESETS.values():
        assert set(preset) <= set(settings.CONFIG)
        for key, value in {**settings.CONFIG, **preset}.items():
            assert type(value) is type(settings.CONFIG[key]), f"{key}: a preset changes its type"
            text = ",".join(value) if isinstance(value, list) else str(value)
            assert cli.parse_value(key, text) == value


def test_trainer_keys_bear_the_field_names():
    """A key that looks like TRL's or PEFT's must be theirs, or it would be dropped in silence."""
    from peft import LoraConfig
    from trl import GRPOConfig

    trl = {field.name for field in fields(GRPOConfig)}
    section = list(settings.CONFIG)[list(settings.CONFIG).index("max_steps") : list(settings.CONFIG).index("sample_steps")]
    assert set(section) <= trl
    for key in ("num_generations", "max_completion_length", "temperature", "top_p", "top_k", "report_to"):
        assert key in trl
    lora = {field.name for field in fields(LoraConfig)}
    for key in settings.CONFIG:
        if key.startswith("lora_"):
            assert key in lora or key.removeprefix("lora_") in lora


def test_order_is_config_then_preset_then_flags():
    parser = cli.make_parser("", train_grpo.KEYS)
    assert cli.parse(parser, [])[0] == settings.CONFIG
    assert cli.parse(parser, ["--preset", "tiny"])[0]["learning_rate"] == settings.PRESETS["tiny"]["learning_rate"]
    given = [
        "--preset",
        "tiny",
        "--learning_rate",
        "2e-5",
        "--lora_target_modules",
        "fc1, fc2",
        "--activation_checkpointing",
        "yes",
    ]
    config, _ = cli.parse(parser, given)
    assert config["learning_rate"] == 2e-5 and config["lora_target_modules"] == ["fc1", "fc2"]
    assert config["activation_checkpointing"] is True
    assert cli.parse(parser, ["--stop_on_collapse"])[0]["stop_on_collapse"] is True, "a switch needs no value"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--learning_rat", "1"], "did you mean --learning_rate"),
        (["--lerning_rate=1"], "did you mean --learning_rate"),
        (["--languages", "es"], "train_grpo.py does not read it"),
        (["--preset", "huge"], "takes one of: phi2, phi2-24gb, phi2-80gb, tiny"),
        (["--learning_rate", "fast"], "takes a number"),
        (["--learning_rate", "nan"], "finite"),
        (["--learning_rate", "inf"], "finite"),
        (["--learning_rate", "7"], "takes 1e-09 to 1.0"),
        (["--num_generations", "2.5"], "whole number"),
        (["--num_generations", "1"], "takes 2 to"),
        (["--activation_checkpointing", "perhaps"], "true or false"),
        (["--device", "tpu"], "takes one of: auto, cpu, cuda"),
        (["--dtype", "float16"], "takes one of: auto, bfloat16, float32"),
        (["--max_steps"], "expected one argument"),
        (["--output_dir", ""], "--output_dir is empty"),
        (["--model="], "--model is empty"),
        (["--stop_on_collapse", "perhaps"], "true or false"),
        (["0"], "--max_steps is '0'"),
        (["-5"], "-5"),
        (["many"], "whole number"),
        (["5", "--max_steps", "6"], "Give one of them"),
    ],
)
def test_wrong_flags(call, argv, expected):
    done = call("train_grpo", *argv)
    assert done.code == 2 and expected in done.err and "Traceback" not in done.err


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_answers_without_torch(name):
    code = (
        f"import sys, runpy; sys.argv = ['{name}.py', '--help']\n"
        f"try: runpy.run_path('{name}.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "slow = {'torch', 'numpy', 'rich', 'datasets', 'transformers'} & set(sys.modules)\n"
        "print('slow imports:', slow)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "slow imports: set()" in done.stdout, done.stdout + done.stderr
    assert f"python {name}.py" in done.stdout
