"""Killed, interrupted, out of disk, in each other's way: what is on disk afterwards, and how it goes on."""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from benchmarks import kills
from phi2_grpo.common import files
from phi2_grpo.common.cli import Terminated, UserError
from phi2_grpo.data import store
from phi2_grpo.models.tokenizer import load_tokenizer
from phi2_grpo.training import checkpoints
from phi2_grpo.training.callbacks import GracefulStop
from phi2_grpo.training.trainer import EpochSampler


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of the finished run's checkpoints, of steps 4 and 6, without what it left at the end."""
    shutil.copytree(trained, tmp_path / "o")
    return tmp_path / "o"


# --- killed


@pytest.mark.slow
def test_killed_three_times_it_ends_the_same(call, quick, tmp_path):
    """Once in a save at least. (Thirty times: benchmarks/kills.py.)"""
    flags = (14, *quick, "--eval_prompts", 3)
    done = call("train_grpo", *kills.command(flags, tmp_path / "whole")[2:])
    assert done.code == 0, done.err
    found = kills.kill_and_resume(3, tmp_path / "killed", flags, seed=random.randrange(2**32))
    assert found["kills"] >= 2, found
    assert kills.same(tmp_path / "whole-final", tmp_path / "killed-final"), found
    assert [path.name for path in (tmp_path / "killed").iterdir() if path.name.startswith(".")] == [], (
        "nothing half-written is left"
    )


def test_killed_past_its_first_epochs(call, quick, micro, tmp_path, monkeypatch):
    """Eight prompts, two a step: three epochs of four steps, each in an order of its own, that a resumed run finds again."""
    rows = [json.loads(line) for line in (ROOT / "tiny" / "messages.jsonl").read_text(encoding="utf-8").splitlines()]
    roots = [row for row in rows if row["parent_id"] is None and len(row["text"]) < 90]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in roots[:8]), encoding="utf-8")
    how = ("--preset", "tiny", "--model", micro, "--dataset", tmp_path / "few.jsonl", "--validation_fraction", 0)
    assert call("prepare_data", *how, "--data_dir", tmp_path / "d").code == 0
    flags = (12, *quick, "--data_dir", tmp_path / "d", "--eval_prompts", 0)
    epochs, plain = [], EpochSampler.__iter__
    monkeypatch.setattr(EpochSampler, "__iter__", lambda self: epochs.append(self.epoch) or plain(self))
    assert call("train_grpo", *kills.command(flags, tmp_path / "whole")[2:]).code == 0
    output = tmp_path / "killed"
    for steps in (5, 9):  # as a kill leaves it, in the second epoch and in the third
        assert call("train_grpo", *kills.command((steps, *flags[1:]), output, "--resume")[2:]).code == 0
    assert call("train_grpo", *kills.command(flags, output, "--resume")[2:]).code == 0
    assert epochs == [0, 1, 2, 0, 1, 1, 2, 2], "the whole run, then its three parts"
    assert kills.same(tmp_path / "whole-final", tmp_path / "killed-final")


def test_each_epoch_has_an_order_of_its_own():
    sampler, orders = EpochSampler(range(8), 2, batch_size=2, seed=3), []
    for epoch in (0, 1, 2, 1):
        sampler.epoch = epoch
        orders.append(list(sampler))
    assert orders[1] == orders[3] and len({*map(tuple, orders)}) == 3
    assert all(sorted(order) == sorted([*range(8)] * 2) for order in orders)


def test_a_reward_of_another_content_is_another_run(call, quick, tmp_path):
    reward, moved = tmp_path / "mine.py", tmp_path / "elsewhere.py"
    reward.write_text("def mine(answers, **_):\n    return [float(len(a)) for a in answers]\n")
    own = (*quick, "--eval_prompts", 0, "--save_steps", 1, "--output_dir", tmp_path / "o")
    assert call("train_grpo", 1, *own, "--rewards", f"{reward}:mine").code == 0
    shutil.copyfile(reward, moved)
    check = ("train_grpo", 2, *own, "--resume", "--check")
    assert call(*check, "--rewards", f"{moved}:mine").code == 0, "the same file by another path"
    reward.write_text("def mine(answers, **_):\n    return [-float(len(a)) for a in answers]\n")
    done = call(*check, "--rewards", f"{reward}:mine")
    assert done.code == 2 and "the reward mine x 1 has another content now" in done.err, done.err


def test_a_killed_prepare_leaves_old_or_new_data_or_says_so(micro, prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "d")
    tokenizer = load_tokenizer({"model": str(micro), "model_revision": "main"})
    config = {
        **json.loads((prepared / "funnel.json").read_text())["settings"],
        "model": str(micro),
        "data_dir": str(tmp_path / "d"),
    }
    command = [
        sys.executable,
        "prepare_data.py",
        "--preset",
        "tiny",
        "--model",
        str(micro),
        "--max_prompt_tokens",
        "100",
        "--data_dir",
        str(tmp_path / "d"),
        "--overwrite",
    ]
    scratch = tmp_path / "d" / ".oasst1_prompts.incoming"
    for pause in (0.0, 0.3):
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
            while not scratch.exists() and process.poll() is None:
                time.sleep(0.001)
            time.sleep(pause)
            process.kill()
        try:
            assert len(store.load_prompts(config, tokenizer)[0]["train"]) > 100
        except UserError as error:
            assert "--overwrite" in str(error)
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    assert not scratch.exists() and store.load_prompts(config, tokenizer)[0]


# --- checkpoints that are not whole


@pytest.mark.parametrize("harm", ["truncated", "missing", "a byte changed", "run.json cut"])
def test_a_broken_checkpoint_is_passed_over(call, quick, run, harm):
    newest = run / "checkpoint-6"
    match harm:
        case "truncated":
            os.truncate(newest / "adapter_model.safetensors", 100)
        case "missing":
            (newest / "optimizer.pt").unlink()
        case "a byte changed":
            weights = bytearray((newest / "adapter_model.safetensors").read_bytes())
            weights[-1] ^= 1
            (newest / "adapter_model.safetensors").write_bytes(weights)
        case "run.json cut":
            text = (newest / "run.json").read_text()
            (newest / "run.json").write_text(text[: len(text) // 2])
    assert [path.name for path in checkpoints.complete_checkpoints(run)] == ["checkpoint-4"]
    done = call("train_grpo", 6, *quick, "--output_dir", run, "--resume", "--save_steps", 2, "--check")
    said = " ".join(done.out.replace("│", " ").split())
    assert done.code == 0 and "resuming at checkpoint-4 (checkpoint-6 passed over: not whole)" in said, done.err


def test_what_is_there_and_not_whole_is_not_removed_unasked(call, quick, run):
    """Another program's checkpoints are refused; one's own that were damaged, until --overwrite."""
    shutil.rmtree(run / "checkpoint-4")
    (run / "checkpoint-6" / "README.md").write_text("my notes")  # what is for people may be changed
    assert [path.name for path in checkpoints.complete_checkpoints(run)] == ["checkpoint-6"]
    for harm, expected, flags in (
        (lambda path: path.write_text("{}"), "is not whole", ((), ("--resume",))),
        (lambda path: path.unlink(), "no checkpoint of this program's", ((), ("--resume",), ("--overwrite",))),
    ):
        harm(run / "checkpoint-6" / "run.json")
        for more in flags:
            done = call("train_grpo", 8, *quick, "--output_dir", run, *more)
            assert done.code == 2 and expected in done.err, done.err
    assert (run / "checkpoint-6" / "optimizer.pt").exists()
    shutil.rmtree(run / "checkpoint-6")
    done = call("train_grpo", 8, *quick, "--output_dir", run, "--resume", "--overwrite")
    assert done.code == 2 and "Give one of them" in done.err


def test_a_finished_adapter_is_no_place_for_checkpoints(call, quick, final, tmp_path):
    """Nor is anything else than a run's own result replaced by it, with --overwrite or without."""
    own = shutil.copytree(final, tmp_path / "own")
    for more in ((), ("--overwrite",), ("--resume",)):
        done = call("train_grpo", 1, *quick, "--output_dir", own, *more)
        assert done.code == 2 and "is a finished adapter, not a place" in done.err, done.err
    done = call("train_reward", *quick[:6], "--reward_dir", own, "--overwrite")
    assert done.code == 2 and "and it stays" in done.err, done.err
    assert (own / "metrics.jsonl").read_text() == (final / "metrics.jsonl").read_text()


def test_a_link_to_a_larger_disk_stays_a_link(tmp_path):
    (tmp_path / "large").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "large" / "final")  # to nothing yet
    for text in ("one", "two"):
        with files.atomic_folder(tmp_path / "link") as folder:
            (folder / "a").write_text(text)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "large" / "final" / "a").read_text() == text
    assert [path.name for path in (tmp_path / "large").iterdir()] == ["final"] and len(list(tmp_path.iterdir())) == 2


def test_a_read_only_folder(call, quick, micro, final, tmp_path):
    """A file system that takes nothing: said by each script before anything slow starts, and by no traceback."""
    place = tmp_path / "still"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", str(place)], capture_output=True).returncode:
        pytest.skip("no right to mount a tmpfs")
    try:
        for name, flags in (
            ("train_grpo", (1, *quick, "--output_dir", place / "o")),
            ("train_reward", (*quick[:6], "--reward_dir", place / "o")),
            ("prepare_data", ("--preset", "tiny", "--model", micro, "--data_dir", place / "o")),
            ("validate_model", (*quick[:6], "--adapter", final, "--validation_dir", place / "o")),
            ("export_model", ("--model", micro, "--adapter", final, "--out", place / "o")),
        ):
            done = call(name, *flags)
            assert done.code == 2 and "Traceback" not in done.err, (name, done.err)
            where = "beside" if name in ("validate_model", "export_model") else "to"  # their lock is asked for first
            assert f"cannot write {where}" in done.err and "Read-only file system" in done.err, (name, done.err)
    finally:
        subprocess.run(["umount", str(place)])


def test_the_step_counts_and_not_the_clock(call, quick, trained, run):
    """A clock that went back between the checkpoints, and a metrics.jsonl cut in mid-line."""
    os.utime(run / "checkpoint-6", (1, 1))
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text()[:-25])
    options = (*quick, "--output_dir", run, "--resume", "--save_steps", 2, "--sample_steps", 3)
    done = call("train_grpo", 8, *options)
    assert done.code == 0 and "resuming at checkpoint-6" in done.out, done.err
    assert [path.name for path in checkpoints.complete_checkpoints(run)] == ["checkpoint-6", "checkpoint-8"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9))


def test_old_checkpoints_go_when_the_new_one_is_whole(call, quick, run, monkeypatch):
    """The save of step 8 fails half-way: what was there before is still there."""
    from phi2_grpo.training.trainer import Trainer

    def full(self, *_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Trainer, "_save_rng_state", full)
    options = (*quick, "--output_dir", run, "--resume", "--save_steps", 2)
    done = call("train_grpo", 8, *options)
    assert done.code == 2 and "no room is left on the disk" in done.err and "Traceback" not in done.err, done.err
    assert "checkpoint-6 is whole: go on with --resume" in done.err
    assert sorted(path.name for path in run.glob("*checkpoint*")) == ["checkpoint-4", "checkpoint-6"]
    assert not (run / ".incoming").exists(), "room is given back"
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    assert call("train_grpo", 8, *options).code == 0
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]


def test_a_disk_that_is_really_full(call, quick, tmp_path):
    """A file system of 3 MB: the first checkpoints fit, a later one does not; with room it goes on."""
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(place)], capture_output=True).returncode:
        pytest.skip("no right to mount a tmpfs")
    try:
        how = (*quick, "--output_dir", place / "o", "--save_steps", 1, "--save_total_limit", 9, "--eval_prompts", 0)
        done = call("train_grpo", 60, *how)
        assert done.code == 2 and "no room is left" in done.err and "--resume" in done.err, done.err
        assert "Traceback" not in done.err
        left = checkpoints.complete_checkpoints(place / "o")
        assert left and not (place / "o" / ".incoming").exists()
        assert subprocess.run(["mount", "-o", "remount,size=60m", str(place)]).returncode == 0
        step = checkpoints.step_of(left[-1])
        done = call("train_grpo", step + 1, *how, "--resume")
        assert done.code == 0 and f"resuming at checkpoint-{step}" in done.out, done.err
    finally:
        subprocess.run(["umount", str(place)])


def test_a_disk_that_is_full_elsewhere(call, micro, prepared, tmp_path):
    """While data is prepared: the old data stays whole. While a picture is drawn: no half of it is left."""
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(place)], capture_output=True).returncode:
        pytest.skip("no right to mount a tmpfs")
    try:
        shutil.copytree(prepared, place / "d")
        options = ("--preset", "tiny", "--model", micro, "--data_dir", place / "d")
        (place / "filler").write_bytes(bytes(shutil.disk_usage(place).free - 30_000))
        done = call("prepare_data", *options, "--max_prompt_tokens", 100, "--overwrite")
        assert done.code == 2 and done.err.startswith("error: no room is left") and "Traceback" not in done.err, done.err
        done = call("inspect_data", *options)
        assert done.code == 0 and "No picture: cannot write" in done.out, done.err
        assert sorted(path.name for path in (place / "d").iterdir()) == sorted(path.name for path in prepared.iterdir())
    finally:
        subprocess.run(["umount", str(place)])


# --- interrupted


def test_ctrl_c_after_a_tee_is_gone(quick, tmp_path):
    """In `... | tee log` Ctrl-C reaches both, and tee is gone at once: the step is finished and saved all the same.

    On a terminal, besides, whose alphabet has no "±", and that is a notebook's.
    """
    command = [sys.executable, "train_grpo.py", "500", *map(str, quick), "--output_dir", str(tmp_path / "o")]
    pipes = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "env": {**os.environ, "PYTHONIOENCODING": "ascii", "MPLBACKEND": "a notebook's"},
    }
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process:
        for line in process.stdout:
            if re.match(r" +3/500 ", line):
                break
        process.stdout.close()
        process.stderr.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert checkpoints.complete_checkpoints(tmp_path / "o")


def test_the_second_signal_stops_at_once(capsys):
    asked = GracefulStop()
    with asked.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert asked.asked == signal.SIGTERM and "once more stops at once" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
    with pytest.raises(Terminated):
        asked.raise_if_asked()
    GracefulStop().raise_if_asked()


# --- other settings


def test_what_may_change_and_what_may_not(call, quick, run, tmp_path):
    resume = ("train_grpo", "--check", *quick, "--resume", "--output_dir", run)
    assert call(*resume, "--max_steps", 50, "--save_steps", 7, "--sample_steps", 2, "--report_to", "none").code == 0
    assert call(*resume, "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2).code == 0
    done = call(*resume, "--learning_rate", "1e-5", "--seed", 7, "--rewards", "ending", "--lora_r", 8)
    assert done.code == 2 and "Traceback" not in done.err
    for part in (
        "learning_rate was 0.001, is 1e-05",
        "seed was 0, is 7",
        "lora_r was 16, is 8",
        "rewards were length x 1, are ending x 1",
    ):
        assert part in done.err, done.err
    done = call(*resume, "--per_device_train_batch_size", 16)
    assert done.code == 2 and "an update had 8 completions (1 process(es)), has 16 (1)" in done.err, done.err


def test_other_prompts_are_another_run(call, quick, micro, run, tmp_path):
    how = ("--preset", "tiny", "--model", micro, "--max_prompt_tokens", 60, "--data_dir", tmp_path / "d")
    assert call("prepare_data", *how).code == 0
    done = call("train_grpo", "--check", *quick, "--resume", "--output_dir", run, "--data_dir", tmp_path / "d")
    assert done.code == 2 and "others than those it was trained on" in done.err, done.err


def test_a_schedule_that_ends_may_not_be_made_longer():
    then = {"config": {"max_steps": 10, "lr_scheduler_type": "linear"}}
    assert checkpoints.changed_settings(then, {"max_steps": 20, "lr_scheduler_type": "linear"}, 1) == [
        "max_steps was 10, is 20"
    ]
    then["config"]["lr_scheduler_type"] = "constant"
    assert checkpoints.changed_settings(then, {"max_steps": 20, "lr_scheduler_type": "constant"}, 1) == []
    then = {"rewards": [{"name": "length", "weight": 1.0, "digest": None}], "dtype": "float32", "model_commit": "a"}
    now = {**then, "rewards": [{"name": "length", "weight": 1.0}]}
    assert checkpoints.changed_settings(then, {}, 1, now) == []
    assert checkpoints.changed_settings(then, {}, 1, {**now, "dtype": "bfloat16", "model_commit": "b"}) == [
        "dtype was float32, is bfloat16", "model_commit was a, is b"
    ]  # fmt: skip
    assert checkpoints.changed_settings({"config": {"model": "."}}, {"model": str(Path.cwd())}, 1) == [], "the same folder"


# --- in each other's way


@pytest.mark.parametrize("name", ["train_grpo", "train_reward", "prepare_data", "validate_model"])
def test_two_in_one_folder(call, quick, micro, prepared, final, tmp_path, name):
    flags = {
        "train_grpo": (1, *quick, "--output_dir", tmp_path / "o"),
        "train_reward": (*quick[:6], "--report_to", "none", "--reward_dir", tmp_path / "o"),
        "prepare_data": ("--preset", "tiny", "--model", micro, "--data_dir", tmp_path / "o"),
        "validate_model": (*quick[:6], "--adapter", final, "--validation_dir", tmp_path / "o"),
    }[name]
    with files.lock_folder(tmp_path / "o"):
        done = call(name, *flags)
    assert done.code == 2 and "another run is writing to" in done.err and "Traceback" not in done.err, done.err
    assert not (tmp_path / "o" / "checkpoint-1").exists()


# --- nothing let in, nothing let out


def test_a_pickled_base_is_not_read(call, quick, micro, tmp_path):
    shutil.copytree(micro, tmp_path / "base")
    torch.save(load_file(tmp_path / "base" / "model.safetensors"), tmp_path / "base" / "pytorch_model.bin")
    (tmp_path / "base" / "model.safetensors").unlink()
    done = call("train_grpo", 1, *quick, "--model", tmp_path / "base", "--output_dir", tmp_path / "o")
    assert done.code == 2 and "safetensors" in done.err and "Traceback" not in done.err, done.err


def test_a_pickled_adapter_is_not_read(call, quick, final, tmp_path):
    shutil.copytree(final, tmp_path / "a")
    torch.save(load_file(tmp_path / "a" / "adapter_model.safetensors"), tmp_path / "a" / "adapter_model.bin")
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    for name, flags in (("train_grpo", ("--init_adapter", tmp_path / "a")), ("validate_model", ("--adapter", tmp_path / "a"))):
        options = quick if name == "train_grpo" else quick[:6]
        where = ("--output_dir", tmp_path / "o") if name == "train_grpo" else ("--validation_dir", tmp_path / "v")
        done = call(name, *options, *flags, *where)
        assert done.code == 2 and "adapter_model.safetensors missing" in done.err, done.err


SECRETS = {
    "HF_TOKEN": "hf_Zq7PlantedTokenOfTheHub",
    "WANDB_API_KEY": "planted0wandb0key0of0forty0characters000",
    "AWS_SECRET_ACCESS_KEY": "PlantedSecretOfACloud",
}


def test_a_base_of_the_hub_and_secrets_in_the_environment(quick, micro, tmp_path):
    """Offline, from a cache as the Hub's library lays it out: its commit is recorded. Tokens in the environment of a training and
    a validation: in no file, no message. And the tracker, in a folder of this machine, is quiet about itself."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "hub" / "models--someone--micro"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    shutil.copytree(micro, cache / "snapshots" / commit)
    place = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "TRACKIO_DIR": str(tmp_path / "tracks")}
    base, data_dir = ("--preset", "tiny", "--model", "someone/micro"), map(str, quick[4:6])
    tracked = [*base, *data_dir, *(option for option in map(str, quick[6:]) if option not in ("--report_to", "none"))]
    printed = ""
    for command in (
        ["train_grpo.py", "1", *tracked, "--output_dir", str(tmp_path / "o")],
        ["validate_model.py", *base, *map(str, quick[4:6]), "--adapter", str(tmp_path / "o-final"), "--validation_dir",
         str(tmp_path / "v"), "--max_prompts", "2"],
    ):  # fmt: skip
        environment = {**os.environ, **SECRETS, **place}
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        printed += done.stdout + done.stderr
    run = json.loads((tmp_path / "o-final" / "run.json").read_text())
    assert run["model_commit"] == commit and run["config"]["model_revision"] == "main"
    assert "trackio project" not in printed.lower() and "upload" not in printed.lower()
    assert list((tmp_path / "tracks").glob("phi2-grpo*")), "its table stands in TRACKIO_DIR"
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 30
    for secret in SECRETS.values():
        assert secret not in printed
        assert not [path for path in written if secret.encode() in path.read_bytes()]
