"""Each check before a start by itself."""

import os
import re
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoConfig
from trl import RewardConfig

import train_grpo
import train_reward
from config import CONFIG, PRESETS
from phi2_grpo.common.cli import UserError, check_one_process
from phi2_grpo.common.progress import QuietTrackio
from phi2_grpo.training import checks
from phi2_grpo.training.preflight import preflight, preflight_reward
from phi2_grpo.training.trainer import training_arguments

TINY = {**CONFIG, **PRESETS["tiny"]}
CPU = torch.device("cpu")
PREFLIGHTS = {preflight: train_grpo, preflight_reward: train_reward}


@pytest.fixture
def config(micro, prepared, tmp_path) -> dict:
    """Settings that pass every check."""
    own = {"model": str(micro), "data_dir": str(prepared), "output_dir": str(tmp_path / "o"), "reward_dir": str(tmp_path / "r")}
    return TINY | own | {"report_to": "none"}


def test_a_run_that_is_all_warm_up_says_so(config):
    for steps, warmup, said in ((10, 5, True), (11, 5, False), (3, 0, False)):
        _, text = checks.settings(config | {"max_steps": steps, "warmup_steps": warmup})
        assert ("--warmup_steps 0" in text) is said


def test_a_target_binds_only_where_a_reward_asks_for_it(config):
    short = config | {"target_tokens": 50}
    with pytest.raises(UserError, match="rewards: .*at least --max_completion_length 100"):
        preflight(short, resume=False, overwrite=False).raise_errors()
    preflight(short | {"rewards": ["ending"]}, resume=False, overwrite=False).raise_errors()


@pytest.mark.parametrize(("size", "steps", "group", "remedy"), [(1, 1, 4, "--per_device_train_batch_size 4"),
    (3, 4, 8, "--per_device_train_batch_size 4"), (16, 1, 2, "num_generations")])  # there are 5 prompts  # fmt: skip
def test_the_remedy_for_a_batch_works(size, steps, group, remedy):
    config = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "num_generations": group}
    with pytest.raises(UserError, match=remedy):
        checks.batch(config, {"train": range(5)})
    key, _, value = remedy.removeprefix("--").partition(" ")
    assert checks.batch({**config, key: int(value or 4)}, {"train": range(5)})[0]


@pytest.mark.parametrize("asked", ["bf16", "fp16"])
def test_mixed_precision_is_ours_and_not_a_launchers(monkeypatch, tmp_path, asked):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    arguments = training_arguments(RewardConfig, TINY, CPU, torch.float32, output_dir=str(tmp_path))
    assert arguments.mixed_precision == os.environ["ACCELERATE_MIXED_PRECISION"] == "no"


def test_a_gpu_needs_a_process_of_its_own(monkeypatch):
    """TRL's trainer would split batches over all visible GPUs."""
    monkeypatch.setattr(checks, "choose_device", lambda _: (torch.device("cuda", 0), torch.bfloat16))
    monkeypatch.setattr(checks.outputs, "hardware_name", str)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(UserError, match="2 GPUs.*CUDA_VISIBLE_DEVICES=0.*accelerate launch"):
        checks.device(TINY)


@pytest.mark.parametrize(("compiler", "include", "ready"), [("/usr/bin/gcc", "python", True), (None, "python", False),
    ("/usr/bin/gcc", "nothing", False)])  # fmt: skip
def test_a_gpu_needs_what_triton_compiles_with(monkeypatch, tmp_path, compiler, include, ready):
    (tmp_path / "python").mkdir()
    (tmp_path / "python" / "Python.h").touch()
    monkeypatch.setattr(checks, "choose_engine", lambda *_: ("fast", ""))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: compiler if name == "gcc" else None)
    monkeypatch.setattr("sysconfig.get_path", lambda *_: str(tmp_path / include))
    with nullcontext() if ready else pytest.raises(UserError, match="gcc python3-dev"):
        checks.rollout(TINY, SimpleNamespace(config=SimpleNamespace(model_type="phi")), torch.device("cuda", 0))


def test_no_process_alone_evaluates_sharded_weights(monkeypatch):
    """Whoever rolls out."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for use_vllm in (True, False):
        with pytest.raises(UserError, match="--eval_prompts 0"):
            checks.rollout(TINY | {"use_vllm": use_vllm}, None, CPU)


@pytest.mark.parametrize(("kind", "refused"), [("phi", False), ("gpt_neo", True), ("xlstm", True)])
def test_a_base_that_trl_scores_otherwise_than_it_samples(micro, monkeypatch, kind, refused):
    policy = SimpleNamespace(config=SimpleNamespace(model_type=kind))
    monkeypatch.setattr(checks, "choose_engine", lambda *_: ("fast", ""))
    with pytest.raises(UserError, match=f"for {kind} models") if refused else nullcontext():
        assert checks.rollout(TINY, policy, CPU)[0] == "fast"


def test_a_base_that_can_carry_no_reward_model(monkeypatch):
    monkeypatch.setattr(checks, "meta_model", lambda _: SimpleNamespace(config=AutoConfig.for_model("granite")))
    with pytest.raises(UserError, match="kind granite. Take another base"):
        checks.reward_head(TINY)


def test_on_the_dashboard_a_row_stands_at_its_step():
    callback = QuietTrackio()
    callback._trackio, callback.setup = Mock(), Mock()
    callback.on_log(None, SimpleNamespace(is_world_process_zero=True, global_step=7), None, logs={"loss": 1.0, "train_loss": 9})
    assert callback.setup.called and callback._trackio.log.call_args == (({"train/loss": 1.0},), {"step": 7})


def test_a_folder_called_like_a_tracker_is_no_package(monkeypatch, tmp_path):
    (tmp_path / "wandb").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="pip install wandb"):
        checks.tracker({"report_to": "wandb"})
    assert checks.tracker({"report_to": "trackio"})[0]


def test_the_checks_of_a_reward_model(monkeypatch, config):
    ready = preflight_reward(config, resume=False, overwrite=False)
    ready.raise_errors()
    batch = config["per_device_train_batch_size"] * config["gradient_accumulation_steps"]
    assert ready.steps == config["reward_epochs"] * -(-len(ready.pairs["train"]) // batch)
    monkeypatch.setattr(checks, "free_memory", lambda _: 150_000_000)
    ready = preflight_reward(config, resume=False, overwrite=False)
    (text,) = (check.text for check in ready.results if check.name == "memory")
    assert f"this does: --per_device_train_batch_size {batch // 2} " in text
    monkeypatch.setattr(checks, "free_memory", lambda _: 0)
    flags = {kind: re.search(r"lower --(\w+)", kind(config, False, True).results[-2].text)[1] for kind in PREFLIGHTS}
    assert all(flag in PREFLIGHTS[kind].KEYS for kind, flag in flags.items()), flags
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="train_reward.py runs in one process"):
        check_one_process("train_reward.py")
