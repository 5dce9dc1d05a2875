"""Killed, out of disk, out of memory, in each other's way: what is on disk afterwards, and how it goes on."""

import errno
import os
import random
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import WEIGHTS, ok, read_json, refused, rows_of, script
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler

from benchmarks import kills
from phi2_grpo.common import files
from phi2_grpo.common.cli import Terminated, UserError
from phi2_grpo.training import checkpoints, outputs, trainer
from phi2_grpo.training.callbacks import GracefulStop
from phi2_grpo.training.trainer import Trainer


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of the finished run's checkpoints, of steps 4 and 6, without what it left at the end."""
    return shutil.copytree(trained, tmp_path / "o")


def names(output: Path) -> list[str]:
    return [path.name for path in checkpoints.list_checkpoints(output)]


@pytest.mark.slow
def test_killed_three_times_it_ends_the_same(call, quick, micro, tmp_path):
    """Once in a save at least, past its first epochs of eight prompts, two a step. (Thirty times: benchmarks/kills.py.)"""
    (tmp_path / "few.txt").write_text("".join(f"Why is {i} so?\n" for i in range(10)))
    data = ("--data_dir", tmp_path / "d")
    ok(call("prepare_data", "--model", micro, "--dataset", tmp_path / "few.txt", *data, "--validation_fraction", 0.2))
    flags = (14, *quick, *data, "--eval_prompts", 2)
    ok(call("train_grpo", *kills.command(flags, tmp_path / "whole")[2:]))
    found = kills.kill_and_resume(3, tmp_path / "killed", flags, seed=random.randrange(2**32))
    assert found["kills"] >= 2, found
    assert kills.same(tmp_path / "whole-final", tmp_path / "killed-final"), found
    assert checkpoints.list_checkpoints(tmp_path / "killed") == checkpoints.complete_checkpoints(tmp_path / "killed")


def test_each_epoch_has_an_order_of_its_own(monkeypatch):
    monkeypatch.setattr(GRPOTrainer, "_run_epoch", lambda self, epoch: list(self.sampler))
    trainer = object.__new__(Trainer)
    trainer.sampler = RepeatSampler(range(8), 2, batch_size=2, seed=3)
    orders = [trainer._run_epoch(epoch=epoch) for epoch in (0, 1, 2, 1)]
    assert orders[1] == orders[3] and len({*map(tuple, orders)}) == 3
    assert all(sorted(order) == sorted([*range(8)] * 2) for order in orders)


def test_after_a_training_that_diverged_no_resume_is_advised(run):
    """It would diverge again, and refuses a lower learning rate."""
    text = object.__new__(Trainer)._end(UserError("the gradient is not finite"), run)
    assert f"--init_adapter {run / 'checkpoint-'}" in text and "--resume" not in text


class Killed(BaseException):
    """As kill -9 in the middle of a save: nothing that comes after it runs."""


def test_killed_inside_a_save_the_last_complete_checkpoint_stays(call, quick, run, tmp_path, monkeypatch):
    """Resumed with a smaller save_steps, killed inside each of its first saves, before run.json is written."""
    options = (*quick, "--output_dir", run, "--sample_steps", 3)
    write_adapter_files = outputs.write_adapter_files

    def killed(folder, *arguments, **keywords):
        write_adapter_files(folder, *arguments, **keywords)
        (folder / "run.json").unlink()
        raise Killed

    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(outputs, "write_adapter_files", killed)
            call("train_grpo", 8, *options, "--resume", "--save_steps", 1)
        assert names(run) == ["checkpoint-4", "checkpoint-6", "checkpoint-7"]
        assert checkpoints.newest_complete(run).name == "checkpoint-6"
    assert "resuming at checkpoint-6" in ok(call("train_grpo", 8, *options, "--resume", "--save_steps", 1)).out
    assert names(run) == ["checkpoint-7", "checkpoint-8"]
    ok(call("train_grpo", 8, *quick, "--output_dir", tmp_path / "straight", "--save_steps", 2))
    ends = [(tmp_path / f"{name}-final" / WEIGHTS).read_bytes() for name in ("o", "straight")]
    assert ends[0] == ends[1]


def test_a_removal_that_is_killed_leaves_an_incomplete_checkpoint(run, monkeypatch):
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    checkpoints.remove(run / "checkpoint-4")
    assert names(run) == ["checkpoint-4", "checkpoint-6"] and checkpoints.complete_checkpoints(run) == [run / "checkpoint-6"]


def test_a_save_that_fails_leaves_the_complete_checkpoints(call, quick, run, monkeypatch):
    def full(self, *_):
        raise OSError(errno.ENOSPC, "No space left on device")

    options = (*quick, "--output_dir", run, "--resume", "--save_steps", 2)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_rng_state", full)
        refused(call("train_grpo", 8, *options), "no room is left on a disk", "checkpoint-6", "--resume")
    assert names(run) == ["checkpoint-4", "checkpoint-6"], "room is given back"
    assert call("train_grpo", 8, *options).code == 0 and names(run) == ["checkpoint-6", "checkpoint-8"]


def test_the_step_counts_and_not_the_clock(call, quick, run):
    """A clock that went back between the checkpoints, and a metrics.jsonl cut in mid-line."""
    os.utime(run / "checkpoint-6", (1, 1))
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text()[:-25])
    done = call("train_grpo", 8, *quick, "--output_dir", run, "--resume", "--save_steps", 2, "--sample_steps", 3)
    assert done.code == 0 and "resuming at checkpoint-6" in done.out, done.err
    assert names(run) == ["checkpoint-6", "checkpoint-8"]
    assert [row["step"] for row in rows_of(run)] == list(range(1, 9))


@pytest.mark.parametrize(("where", "error", "says"), [
    ("_generate_single_turn", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate."), "--rollout_batch_size"),
    ("training_step", RuntimeError("[pytorch/third_party/gloo/pair.cc:553] Connection closed by peer"), "another process")])  # fmt: skip
def test_what_ends_a_run_and_is_no_bug(call, quick, tmp_path, monkeypatch, where, error, says):
    original = getattr(Trainer, where)

    def fails(self, *arguments, **keywords):
        if self.state.global_step == 2:
            raise error
        return original(self, *arguments, **keywords)

    options = (*quick, "--output_dir", tmp_path / "o", "--save_steps", 1 if says == "another process" else 50)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, where, fails)
        refused(call("train_grpo", 3, *options), says, "checkpoint-2 is complete")
    if says == "--rollout_batch_size":
        ok(call("train_grpo", 3, *options, "--resume"))


def test_the_second_signal_stops_at_once(capsys):
    stop = GracefulStop()
    with stop.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert stop.asked == signal.SIGTERM and "stops at once" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
    with pytest.raises(Terminated):
        stop.raise_if_asked()
    GracefulStop().raise_if_asked()


def test_a_launcher_s_own_second_signal_is_none(monkeypatch):
    """A scheduler's SIGTERM reaches launcher and processes, and the launcher's the processes again."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    stop = GracefulStop()
    with stop.listening():
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
        assert stop.asked == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(("world", "steps", "says"), [("2", [4], "LOCAL_RANK is not"), ("1", [4, 6], "different checkpoints")])
def test_processes_that_are_no_one_run(run, monkeypatch, world, steps, says):
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setattr(trainer, "gather_object", lambda _: steps)
    one = SimpleNamespace(args=SimpleNamespace(output_dir=run, max_steps=9), accelerator=SimpleNamespace(num_processes=1))
    with pytest.raises(UserError, match=says):
        Trainer.run(one, None, run / "checkpoint-4")


@pytest.mark.parametrize("kind", [Trainer, trainer.RewardModelTrainer])
def test_a_run_begins_without_dropout(monkeypatch, tmp_path, kind):
    """Also where the rate is a number, which TRL passes over."""
    monkeypatch.setattr(trainer.progress, "silence_printing", lambda _: None)
    model = torch.nn.Linear(1, 1)
    model.dropout = 0.1
    one = SimpleNamespace(args=SimpleNamespace(output_dir=tmp_path, max_steps=1, should_save=False), model=model, train=lambda **_: None,
                          accelerator=SimpleNamespace(num_processes=1), add_callback=print, state=SimpleNamespace(global_step=1))  # fmt: skip
    kind.run(one, None, None)
    assert model.dropout == 0


def test_a_tracker_that_refuses_says_how_to_go_on(run):
    error = type("UsageError", (Exception,), {"__module__": "wandb.errors"})("api_key not configured")
    text = Trainer._end(SimpleNamespace(), error, run)
    assert "api_key not configured" in text and "wandb login" in text and "checkpoint-6 is complete" in text
    assert not Trainer._end(SimpleNamespace(), ValueError("a bug"), run)


def test_what_may_change_and_what_may_not(call, quick, micro, run, tmp_path):
    resume = ("train_grpo", "--check", *quick, "--resume", "--output_dir", run)
    ok(call(*resume, "--max_steps", 50, "--save_steps", 7, "--sample_steps", 2, "--report_to", "none"))
    ok(call(*resume, "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2))
    changed = ("learning_rate: was 0.001, is 1e-05", "seed: was 0, is 7", "lora_r: was 16, is 8", "length x 1", "ending x 1")
    refused(call(*resume, "--learning_rate", "1e-5", "--seed", 7, "--rewards", "ending", "--lora_r", 8), *changed)
    other = ("--preset", "tiny", "--model", micro, "--max_prompt_tokens", 60, "--data_dir", tmp_path / "d")
    ok(call("prepare_data", *other))
    more = ("--data_dir", tmp_path / "d", "--per_device_train_batch_size", 16)
    refused(call(*resume, *more), "was 8, is 16", "the prompts in", "--overwrite")
    refused(call(*resume, "--overwrite"), "--resume", "--overwrite")


def mine(weight: float, digest: str) -> dict:
    return {"rewards": [{"name": "mine", "weight": weight, "digest": digest}]}


@pytest.mark.parametrize(("then", "now", "facts", "changed"), [
    ({"config": {"max_steps": 10, "lr_scheduler_type": "linear"}}, {"max_steps": 20}, {}, ["max_steps: was 10, is 20"]),
    ({"dtype": "float32"}, {}, {"dtype": "bfloat16"}, ["dtype: was float32, is bfloat16"]),
    ({"model_commit": None}, {}, {"model_commit": "b"}, []),
    ({**mine(1, "aa"), "config": {"rewards": ["old.py:mine"]}}, {"rewards": ["new.py:mine"]}, mine(1, "aa"), []),
    (mine(1, "aa"), {}, mine(1, "bb"), ["rewards: was mine, is mine with another content"]),
    (mine(1, "aa"), {}, mine(2, "aa"), ["rewards: was mine x 1 aa, is mine x 2 aa"])])  # fmt: skip
def test_settings_that_a_resumed_run_may_not_change(then, now, facts, changed):
    assert checkpoints.changed_settings(then, now, facts) == changed


def test_two_in_one_folder(call, quick, tmp_path):
    with files.lock_folder(tmp_path / "o"):
        refused(call("train_grpo", 1, *quick, "--output_dir", tmp_path / "o"), "another run is writing to")
    assert not (tmp_path / "o" / "checkpoint-1").exists()


SECRETS = {"HF_TOKEN": "hf_Zq7PlantedTokenOfTheHub", "WANDB_API_KEY": "planted0wandb0key0of0forty0characters000",
           "AWS_SECRET_ACCESS_KEY": "PlantedSecretOfACloud"}  # fmt: skip


@pytest.mark.slow
def test_a_base_of_the_hub_and_secrets_in_the_environment(quick, micro, tmp_path):
    """Offline, from a cache as the Hub's library lays it out: its commit is recorded. Tokens in the environment of a training and
    a validation: in no file, no message. And the tracker, in a folder of this machine, is quiet about itself."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "hub" / "models--someone--micro"
    files.write_text(cache / "refs" / "main", commit)
    shutil.copytree(micro, cache / "snapshots" / commit)
    place = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "TRACKIO_DIR": str(tmp_path / "tracks")}
    base = ("--preset", "tiny", "--model", "someone/micro", *quick[4:6])
    tracked = [flag for flag in quick[6:] if flag not in ("--report_to", "none")]
    printed = ""
    for command in (
        ["train_grpo", 1, *base, *tracked, "--output_dir", tmp_path / "o"],
        ["validate_model", *base, "--adapter", tmp_path / "o-final", "--validation_dir", tmp_path / "v", "--max_prompts", 2],
    ):
        done = ok(script(*command, **SECRETS, **place))
        printed += done.out + done.err
    facts = read_json(tmp_path / "o-final" / "run.json")
    assert facts["model_commit"] == commit and facts["config"]["model_revision"] == "main"
    for noise in ("trackio project", "upload", "unable to fetch", "could not find a config"):  # trackio's, and PEFT's
        assert noise not in printed.lower()
    assert list((tmp_path / "tracks").glob("phi2-grpo*")), "its table stands in TRACKIO_DIR"
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 30
    for secret in SECRETS.values():
        assert secret not in printed and not [path for path in written if secret.encode() in path.read_bytes()]
