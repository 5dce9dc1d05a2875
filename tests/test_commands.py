"""Every command that a script prints runs as printed: in folders with spaces and colons, and with another base."""

import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, make_micro

from config import CONFIG, PRESETS
from phi2_grpo.common import cli


@pytest.fixture(scope="module")
def drive(tmp_path_factory):
    """A folder as people have it."""
    folder = tmp_path_factory.mktemp("m") / "My Drive" / "it's a run: 2"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def base(drive):
    return make_micro(drive / "a base")


def printed(text: str, script: str) -> str:
    """The command for `script` in a text, which stands on one line."""
    (found,) = set(re.findall(rf"python {script}.py.*", text))
    return found


def as_printed(command: str, *more) -> subprocess.CompletedProcess:
    """By a shell, from the repo's root."""
    line = command.replace("python ", f"{shlex.quote(sys.executable)} ", 1) + "".join(f" {shlex.quote(str(m))}" for m in more)
    return subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)


def test_from_no_data_to_a_validation(call, drive, base):
    own = ("--preset", "tiny", "--model", base, "--data_dir", drive / "data")
    missing = call("inspect_data", *own)
    assert missing.code == 2
    done = as_printed(printed(missing.err, "prepare_data"))
    assert done.returncode == 0, done.stderr
    assert call("inspect_data", *own).code == 0
    quick = ("--max_completion_length", 12, "--target_tokens", 6, "--per_device_train_batch_size", 8, "--report_to", "none")
    trained = call("train_grpo", 1, *own, *quick, "--eval_prompts", 0, "--output_dir", drive / "run")
    assert trained.code == 0, trained.err
    more = ("--max_prompts", 2, "--samples_per_prompt", 1, "--validation_dir", drive / "v")
    done = as_printed(printed(trained.out, "validate_model"), *more)
    assert done.returncode == 0, done.stderr
    assert (drive / "v" / "report.md").is_file()


def test_from_a_reward_model_to_a_training_on_it(call, drive, base):
    own = ("--preset", "tiny", "--model", base, "--data_dir", drive / "data")
    call("prepare_data", *own, "--overwrite")
    small = ("--reward_epochs", 1, "--report_to", "none")
    trained = call("train_reward", *own, *small, "--reward_dir", drive / "a judge: mine", "--overwrite")
    assert trained.code == 0, trained.err
    done = as_printed(printed(trained.out, "train_grpo"), "--check", "--report_to", "none")
    assert done.returncode == 0, done.stderr


def test_the_remedy_for_another_tokenizer(call, drive, base):
    """Prepared with settings of its own, which stay as they were."""
    own = ("--preset", "tiny", "--data_dir", drive / "other data")
    assert call("prepare_data", *own, "--model", base, "--max_prompt_tokens", 60, "--languages", "en,es").code == 0
    other = shutil.copytree(base, drive / "another base")
    template = other / "chat_template.jinja"
    template.write_text(template.read_text().replace("Instruct: ", "Question: "))
    refused = call("inspect_data", *own, "--model", other)
    command = printed(refused.err, "prepare_data")
    assert "--max_prompt_tokens 60" in command and "--languages en,es" in command
    assert as_printed(command).returncode == 0
    assert call("inspect_data", *own, "--model", other).code == 0


def test_a_command_names_what_is_not_as_its_preset_has_it():
    tiny = {**CONFIG, **PRESETS["tiny"]}
    assert cli.prepare_command(tiny) == "python prepare_data.py --preset tiny"
    assert cli.prepare_command({**CONFIG, "model": "a b"}, overwrite=True) == "python prepare_data.py --model 'a b' --overwrite"
    assert cli.prepare_command({**tiny, "data_dir": "./x"}) == "python prepare_data.py --preset tiny --data_dir ./x"
