"""One dict, from which the flags are made; and what ends a script."""

import errno
import importlib
import shlex
import subprocess
import sys
from dataclasses import fields

import pytest
from conftest import ROOT, refused
from peft import LoraConfig
from trl import GRPOConfig

import config as settings
import train_grpo
from phi2_grpo.common import cli

SCRIPTS = [path.stem for path in sorted(ROOT.glob("*.py")) if path.stem != "config"]


def test_every_key_has_a_comment_and_is_read():
    assert set(cli._comments()) == set(settings.CONFIG), "each key needs a comment: it is the flag's help"
    keys = set().union(*(importlib.import_module(name).KEYS for name in SCRIPTS))
    assert keys == set(settings.CONFIG), "a key that no script reads"
    paths = [*ROOT.glob("*.py"), *ROOT.glob("phi2_grpo/*/*.py")]
    sources = "".join(path.read_text() for path in paths if path.stem != "config")
    trl = {field.name for field in fields(GRPOConfig)}
    unused = [key for key in settings.CONFIG if key not in trl and sources.count(f'"{key}"') < 2]  # beside KEYS
    assert not unused, "declared, but nothing uses it"


def test_presets_and_limits_name_known_keys_and_valid_values():
    assert set(settings.LIMITS) <= set(settings.CONFIG) and set(settings.TYPE_LIMITS) == {int, float}
    for preset in settings.PRESETS.values():
        assert set(preset) <= set(settings.CONFIG)
        for key, value in {**settings.CONFIG, **preset}.items():
            assert type(value) is type(settings.CONFIG[key]), f"{key}: a preset changes its type"
            assert cli.parse_value(key, ",".join(value) if isinstance(value, list) else str(value)) == value


def test_a_tilde_is_expanded_in_a_path_alone(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    values = {key: cli.parse_value(key, "~/x") for key in ("data_dir", "adapter", "model", "format_regex", "system_prompt")}
    assert list(values.values()) == ["/home/me/x"] * 3 + ["~/x"] * 2


def test_printed_commands_name_a_python_that_has_the_packages(monkeypatch, tmp_path):
    own = tmp_path / ".venv" / "bin" / "python"
    own.parent.mkdir(parents=True)
    own.touch(0o755)
    monkeypatch.setattr(sys, "executable", str(own))
    monkeypatch.setenv("PATH", "/bin")
    assert cli.python_command() == str(own)
    monkeypatch.chdir(tmp_path)  # as under make, which activates nothing
    assert cli.python_command() == ".venv/bin/python"
    monkeypatch.setenv("PATH", str(own.parent))
    elsewhere = f"python {shlex.quote(f'{ROOT}/x.py')}"
    assert cli.python_command() == "python" and cli.script_command("x.py") == elsewhere


def test_trainer_keys_bear_the_field_names():
    """A key that looks like TRL's or PEFT's must be theirs, or it would be dropped in silence."""
    trl, keys = {field.name for field in fields(GRPOConfig)}, list(settings.CONFIG)
    assert set(keys[keys.index("max_steps") : keys.index("sample_steps")]) <= trl
    assert {"num_generations", "max_completion_length", "temperature", "top_p", "top_k", "report_to"} <= trl
    lora = {field.name for field in fields(LoraConfig)}
    assert all(key in lora or key.removeprefix("lora_") in lora for key in keys if key.startswith("lora_"))


def test_order_is_config_then_preset_then_flags():
    parser = cli.make_parser("", train_grpo.KEYS)
    assert cli.parse(parser, [])[0] == settings.CONFIG
    assert cli.parse(parser, ["--preset", "tiny"])[0] == settings.CONFIG | settings.PRESETS["tiny"]
    flags = "--preset tiny --learning_rate 2e-5 --lora_target_modules fc1,fc2 --activation_checkpointing true"
    given = {"learning_rate": 2e-5, "lora_target_modules": ["fc1", "fc2"], "activation_checkpointing": True}
    expected = settings.CONFIG | settings.PRESETS["tiny"] | given | {"stop_on_collapse": True}
    assert cli.parse(parser, [*flags.split(), "--stop_on_collapse"])[0] == expected


@pytest.mark.parametrize(("flags", "expected"), [
    ("--lerning_rate=1", ["--lerning_rate", "--learning_rate"]),  # the value, and the nearest flag
    ("--languages es", ["--languages", "train_grpo.py"]),
    ("--preset huge", ["huge", "phi2-24gb", "tiny"]),  # the value, and the rule
    ("--learning_rate fast", ["'fast'", "a number"]), ("--learning_rate 7", ["'7'", "1e-09 to 1.0"]),
    ("--num_generations 2.5", ["'2.5'", "whole number"]),
    ("--activation_checkpointing perhaps", ["'perhaps'", "true or false"]),
    ("--device tpu", ["'tpu'", "auto, cpu, cuda"]), ("--max_steps", ["--max_steps", "--help"]),
    ("--model=", ["--model", "''"]), ("--output_dir \udcff", ["--output_dir"]), ("0", ["--max_steps", "'0'"]), ("mine.py:f", ["MAX_STEPS", "spaces"]), ("1 reply", ["quotation marks"])])  # fmt: skip
def test_wrong_flags(call, flags, expected):
    refused(call("train_grpo", *flags.split(" ")), *expected)


@pytest.mark.parametrize(("error", "code", "expected"), [
    (cli.UserError("do this"), 2, "do this"), (OSError(errno.ENOSPC, "No space left on device"), 2, "Make room"),
    (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), 2, "Make room"),
    (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "/x"), (MemoryError(), 2, "--per_device_train_batch_size"),
    (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory."), 2, "--max_completion_length"),
    (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), 2, "--max_completion_length"),
    (KeyboardInterrupt(), 130, "interrupted"), (cli.Terminated(), 143, "interrupted"),
    (KeyError("a bug"), KeyError, "")])  # which keeps its traceback  # fmt: skip
def test_what_ends_a_script(capfd, error, code, expected):
    assert "make setup" in cli.explain(ModuleNotFoundError("No module named 'torch'"))

    def main():
        with cli.load_errors("the model x"):  # what is explained better elsewhere passes through it
            if not isinstance(error, KeyError):
                raise error
        raise error

    with pytest.raises(SystemExit if isinstance(code, int) else code) as stopped:
        cli.run(main)
    assert not isinstance(code, int) or stopped.value.code == code
    assert expected in capfd.readouterr().err


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_answers_without_torch(name):
    code = f"import sys, runpy; sys.argv = ['{name}.py', '--help']\ntry: runpy.run_path('{name}.py', run_name='__main__')\n"
    code += "except SystemExit: pass\n"
    code += "print('slow imports:', {'torch', 'numpy', 'rich', 'datasets', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "slow imports: set()" in done.stdout and f"python {name}.py" in done.stdout, done.stdout + done.stderr
