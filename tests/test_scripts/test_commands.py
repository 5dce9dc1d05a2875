"""Every command that a script prints runs as printed: in folders with spaces and colons, and with another base."""

import re
import shlex

import pytest
from conftest import make_micro

from config import CONFIG, PRESETS
from phi2_grpo.common import cli


@pytest.fixture(scope="module")
def drive(tmp_path_factory):
    """A folder as people have it, with a base in it."""
    folder = tmp_path_factory.mktemp("m") / "My Drive" / "it's a run: 2"
    folder.mkdir(parents=True)
    make_micro(folder / "a base")
    return folder


@pytest.fixture
def call_printed(call):
    """Runs the command for `script` that stands on one line of a text, split as a shell splits it."""

    def run(text: str, script: str, *more):
        (command,) = set(re.findall(rf"python {script}.py.*", text))
        done = call(script, *shlex.split(command)[2:], *more)
        assert done.code == 0, done.err

    return run


def test_from_no_data_to_a_validation(call, call_printed, drive):
    own = ("--preset", "tiny", "--model", drive / "a base", "--data_dir", drive / "data")
    missing = call("inspect_data", *own)
    assert missing.code == 2
    call_printed(missing.err, "prepare_data")
    quick = ("--max_completion_length", 12, "--target_tokens", 6, "--per_device_train_batch_size", 8, "--report_to", "none")
    trained = call("train_grpo", 1, *own, *quick, "--eval_prompts", 0, "--output_dir", drive / "run")
    assert trained.code == 0, trained.err
    more = ("--max_prompts", 2, "--samples_per_prompt", 1, "--validation_dir", drive / "v")
    call_printed(trained.out, "validate_model", *more)
    assert (drive / "v" / "report.md").is_file()


def test_from_a_reward_model_to_a_training_on_it(call, call_printed, drive):
    own = ("--preset", "tiny", "--model", drive / "a base", "--data_dir", drive / "data")
    assert call("prepare_data", *own, "--overwrite").code == 0
    flags = ("--reward_epochs", 1, "--report_to", "none", "--reward_dir", drive / "a reward: mine")
    trained = call("train_reward", *own, *flags)
    assert trained.code == 0, trained.err
    call_printed(trained.out, "train_grpo", "--check", "--report_to", "none")


def test_a_command_names_what_is_not_as_its_preset_has_it():
    tiny = {**CONFIG, **PRESETS["tiny"]}
    assert cli.prepare_command(tiny) == "python prepare_data.py --preset tiny"
    assert cli.prepare_command({**CONFIG, "model": "a b"}, overwrite=True) == "python prepare_data.py --model 'a b' --overwrite"
    assert cli.prepare_command({**tiny, "data_dir": "./x"}) == "python prepare_data.py --preset tiny --data_dir ./x"
