"""The main job on a micro model: what moves, what is written, what can be repeated and resumed."""

import inspect
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ADAPTER_FILES, ROOT, WEIGHTS, ok, read_json, refused, rows_of
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from phi2_grpo.common import files
from phi2_grpo.common.cli import UserError
from phi2_grpo.models import base
from phi2_grpo.rewards import collapse
from phi2_grpo.rollout import engine
from phi2_grpo.training import checkpoints, checks, model_card, outputs
from phi2_grpo.training.trainer import Trainer, training_arguments


def weights_of(folder):
    return load_file(folder / WEIGHTS)


def equal(first, second) -> bool:
    return (first / WEIGHTS).read_bytes() == (second / WEIGHTS).read_bytes()


def test_every_lora_weight_moves_and_no_base_weight_does(call, quick, micro, tmp_path, monkeypatch):
    trainers, train = [], Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda self, **options: trainers.append(self) or train(self, **options))
    # The third step is seen: in the first, B is zero and A gets no gradient. Constant learning rate, without warm-up.
    ok(call("train_grpo", 3, *quick, "--output_dir", tmp_path / "o", "--warmup_steps", 0, "--save_steps", 1))
    before, after = (weights_of(tmp_path / "o" / f"checkpoint-{step}") for step in (2, 3))
    assert len(after) == 2 * 6 * 2, "A and B of six kinds in two layers"
    assert not [name for name in after if torch.equal(after[name], before[name])], "these did not move"
    fresh = AutoModelForCausalLM.from_pretrained(micro).state_dict()
    for name, parameter in trainers[0].model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name
        if not parameter.requires_grad:
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(parameter, fresh[plain]), f"{name} moved"


def test_final_folder_describes_itself(trained, final):
    assert {path.name for path in final.iterdir()} == ADAPTER_FILES, "no pickles, nothing missing"
    run = read_json(final / "run.json")
    assert run["finished"] and run["steps"] == 6 and run["config"]["max_steps"] == 6 and run["preset"] == "tiny"
    assert set(run["versions"]) >= {"torch", "trl", "peft"} and run["data"]["fingerprint"] and run["seconds"] > 0
    rows = rows_of(final)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6] == [row["step"] for row in rows_of(trained)]
    assert {"reward", "reward_std", "frac_reward_zero_std", "answers/tokens", "answers/ended", "kl", "step_time", "grad_norm",
            "rewards/length/mean", "rewards/length/en", "rewards/length/es"} <= set().union(*rows)  # fmt: skip
    assert rows[0]["kl"] == 0, "dropout is off, and the untrained adapter is the base"
    card = (final / "README.md").read_text()
    assert f"{sum(row['reward'] for row in rows[-3:]) / 3:.3g}" in card and "AutoPeftModelForCausalLM" in card
    assert (final / "reward.png").read_bytes().startswith(b"\x89PNG")
    generation = read_json(final / "generation_config.json")
    assert "\nInstruct:" in generation["stop_strings"] and generation["max_new_tokens"] == 256, "half of the context"


def test_the_model_card_s_code_runs_and_its_licence_is_the_base_s(final, monkeypatch, capsys):
    """The example, as it stands there, on the folder it stands in."""
    facts = read_json(final / "run.json")
    for model, license in (("microsoft/phi-2", "mit"), ("smollm2", "apache-2.0"), ("tiny", "mit"), ("some/base", "")):
        card = model_card.adapter_card({**facts, "config": {**facts["config"], "model": model}}, 6, 1.0, {}, finished=True)
        assert re.findall("^license: (.+)$", card, re.MULTILINE) == [license] * bool(license)
    code = re.search(r"```python\n(.+?)```", (final / "README.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(final)
    exec(code, {})
    assert capsys.readouterr().out.endswith("\n"), "it prints an answer, which a model of this size may leave empty"


def test_checkpoints_are_adapter_folders_with_the_trainer_s_state(trained, final):
    assert [path.name for path in checkpoints.list_checkpoints(trained)] == ["checkpoint-4", "checkpoint-6"], "save_total_limit"
    for checkpoint in checkpoints.complete_checkpoints(trained):
        names = {path.name for path in checkpoint.iterdir()}
        assert names >= ADAPTER_FILES | {"optimizer.pt", "trainer_state.json", "rng_state.pth"}
        assert read_json(checkpoint / "run.json")["finished"] is False
    assert not (trained / "README.md").exists()
    os.umask(mask := os.umask(0))
    for folder in (final, trained / "checkpoint-6"):
        assert (folder / WEIGHTS).stat().st_mode & 0o777 == 0o666 & ~mask, "others may read it"


def test_what_is_printed(trained):
    printed = (trained.parent / "printed.txt").read_text()
    lines = re.findall(r"^ +\d/6 .+", printed, re.MULTILINE)
    assert len(lines) == 6 and all(len(line) <= 80 and len(line.split()) == 9 for line in lines), "one a step, on a terminal"
    assert "step 3, highest reward" in printed and "step 6, lowest reward" in printed


def test_same_seed_same_adapter_and_another_seed_another(call, quick, trained, final, tmp_path):
    """Bit for bit on the CPU; and a run stopped at step 4 and resumed ends with the same adapter as one never stopped."""
    options = (*quick, "--save_steps", "2", "--sample_steps", "3")
    ok(call("train_grpo", "4", *options, "--output_dir", tmp_path / "a"))
    assert "resuming at checkpoint-4" in ok(call("train_grpo", "6", *options, "--output_dir", tmp_path / "a", "--resume")).out
    assert equal(final, tmp_path / "a-final")
    assert [row["step"] for row in rows_of(tmp_path / "a-final")] == [1, 2, 3, 4, 5, 6], "no gap, no double"
    other = call("train_grpo", "1", *options, "--output_dir", tmp_path / "b", "--seed", "1", "--eval_prompts", 0)
    assert other.code == 0 and "held out" not in other.out
    assert rows_of(tmp_path / "b")[0]["reward"] != rows_of(trained)[0]["reward"]


def test_a_run_is_replaced_only_when_asked(call, quick, trained, final, tmp_path):
    refused(call("train_grpo", 2, *quick, "--output_dir", trained), "--resume", "--overwrite")
    assert checkpoints.newest_complete(trained).name == "checkpoint-6"
    shutil.copytree(final, tmp_path / "o-final")  # a finished adapter alone counts too
    refused(call("train_grpo", "--check", *quick, "--output_dir", tmp_path / "o"), "--overwrite")


def test_what_is_not_a_run_s_stays(call, quick, final, tmp_path):
    """--output_dir may be any folder of the user's; what stands there beside a run stays."""
    own, output = shutil.copytree(final, tmp_path / "own"), tmp_path / "o"
    (output / "checkpoint-old").mkdir(parents=True)
    (output / "thesis.txt").write_text("years of work")
    ok(call("train_grpo", 1, *quick, "--output_dir", output, "--eval_prompts", 0))
    ok(call("train_grpo", 2, *quick, "--output_dir", output, "--eval_prompts", 0, "--overwrite"))
    left = {path.name for path in output.iterdir()}
    assert left == {"thesis.txt", "checkpoint-old", "checkpoint-2", "metrics.jsonl"}
    for name, content in (("metrics", "metrics.jsonl"), ("theirs", "checkpoint-3/model.bin"), ("new-final", "thesis.txt")):
        files.write_text(tmp_path / name / content, '{"mine": 1}\n')
        places = (tmp_path / name.removesuffix("-final"), tmp_path / f"{name.removesuffix('-final')}-final")
        for resume, overwrite in ((False, False), (False, True), (True, False)):
            with pytest.raises(UserError, match=str(tmp_path / name)):
                checks.output_folder(*places, "config", resume, overwrite)
        assert (tmp_path / name / content).read_text() == '{"mine": 1}\n'
    with pytest.raises(UserError):  # a finished adapter is no place for checkpoints
        checks.output_folder(own, tmp_path / "own-final", "config", False, True)
    assert (own / "reward.png").exists()
    assert checkpoints.final_folder({"output_dir": "."}).name.endswith("-final")


def test_a_setting_left_empty_is_the_library_s_own(tmp_path):
    config = {"vllm_server_base_url": "", "output_dir": str(tmp_path / "o"), "report_to": "none"}
    assert training_arguments(GRPOConfig, config, torch.device("cpu"), torch.float32).vllm_server_base_url is None


def test_where_the_weights_are_sharded_trl_rolls_out(call, quick, tmp_path, monkeypatch):
    """No engine is made, for its views of the weights would keep a whole base on each process."""
    monkeypatch.setattr(base, "is_sharded", lambda: True)
    monkeypatch.setattr(engine, "make_engine", lambda *_: pytest.fail("an engine was made"))
    ok(call("train_grpo", 1, *quick, "--output_dir", tmp_path / "o", "--eval_prompts", 0))
    assert len(rows_of(tmp_path / "o-final")) == 1


def test_a_finished_run_may_be_resumed_and_made_longer(call, quick, trained, final, tmp_path):
    shutil.copytree(trained, tmp_path / "o")
    for steps in (6, 7):  # the first has nothing left to train
        done = ok(call("train_grpo", steps, *quick, "--output_dir", tmp_path / "o", "--resume"))
        assert rows_of(tmp_path / "o-final")[-1]["step"] == steps, done.out
    (tmp_path / "o-final" / "README.md").write_text("validated")
    ok(call("train_grpo", 7, *quick, "--output_dir", tmp_path / "o", "--resume"))
    assert (tmp_path / "o-final" / "README.md").read_text() == "validated", "the result stays as it is"
    shutil.copy(final / WEIGHTS, tmp_path / "o-final")
    ok(call("train_grpo", 7, *quick, "--output_dir", tmp_path / "o", "--resume"))
    assert (tmp_path / "o-final" / "README.md").read_text() != "validated", "another run's result is replaced"
    assert files.read_run(trained / "checkpoint-6")["seconds"] < files.read_run(tmp_path / "o-final")["seconds"]


def test_check_trains_nothing_and_prints_a_path_as_it_stands(call, quick, tmp_path):
    """Square brackets are rich's markup, a word between colons is its emoji."""
    done = ok(call("train_grpo", "--check", *quick, "--output_dir", tmp_path / "[bold]" / "[" / "a:heart:]"))
    words = done.out.replace("│", " ").split()
    assert list(tmp_path.iterdir()) == [] and "[bold]/[/a:heart:]" in "".join(words)
    parts = ("CPU", "12 modules", "8 completions an update = 2 prompts x 4", "length x 1 (0.", "weights", "for checkpoints")
    assert all(part in " ".join(words) for part in parts), words


def test_init_adapter_starts_there_and_keeps_the_base_as_reference(call, quick, tmp_path):
    ok(call("train_grpo", 3, *quick, "--lora_r", 3, "--lora_alpha", 5, "--eval_prompts", 0, "--output_dir", tmp_path / "a"))
    start, end = tmp_path / "a-final", tmp_path / "o-final"
    options = (*quick, "--init_adapter", start, "--learning_rate", "1e-9", "--eval_prompts", 0, "--output_dir", tmp_path / "o")
    ok(call("train_grpo", 1, *options))
    config, data = (read_json(end / "run.json")[key] for key in ("config", "data"))
    assert data["earlier"] == [read_json(start / "run.json")["data"]["fingerprint"]]
    assert (config["lora_r"], config["lora_alpha"]) == (3, 5), "the adapter's, not the flags'"
    assert "LoRA: r 3, alpha 5" in (end / "README.md").read_text()
    assert rows_of(end)[0]["kl"] > 0, "the KL is to the base, not to the adapter it started from"
    before, after = weights_of(start), weights_of(end)
    assert all(torch.allclose(before[key], after[key], atol=1e-6) for key in before)
    ok(call("train_grpo", 2, *options, "--resume"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), *(pytest.param(number, 143, marks=pytest.mark.slow)
                                              for number in (signal.SIGTERM, signal.SIGHUP))])  # fmt: skip
def test_interrupted(quick, tmp_path, number, code):
    """The step is finished and saved; what reads the output, as a tee, may be gone, and its alphabet may have no ±."""
    flags = map(str, (500, *quick, "--output_dir", tmp_path / "o", "--save_steps", 2))
    # A shell's background job, as a CI may be, ignores SIGINT and hands that down; nohup SIGHUP.
    options = {"cwd": ROOT, "text": True, "preexec_fn": lambda: signal.signal(number, signal.SIG_DFL),
               "env": {**os.environ, "PYTHONIOENCODING": "ascii", "MPLBACKEND": "a notebook's", "OMP_NUM_THREADS": "1"},
               "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}  # fmt: skip
    with subprocess.Popen([sys.executable, "train_grpo.py", *flags], **options) as process:
        waited = time.monotonic()
        while not checkpoints.newest_complete(tmp_path / "o") and time.monotonic() - waited < 120:
            time.sleep(0.1)
        process.stdout.close()
        process.send_signal(number)
        error = process.stderr.read()
        assert process.wait(60) == code and "--resume" in error and "Traceback" not in error, error
    assert checkpoints.newest_complete(tmp_path / "o") and not (tmp_path / "o-final").exists()


def test_the_curve_of_an_odd_run(tmp_path):
    """One step, or values that were not finite: still a picture and valid JSON."""
    config = {"target_tokens": 8, "rewards": ["length:1.0"]}
    odd = {"reward": 0.5, "reward_std": 0.1, "kl": float("nan"), "answers/tokens": 3.0, "step": 1}
    rows = outputs.log_rows([odd, {"loss": 1}], "reward")
    assert rows == [{**odd, "kl": None}]
    unknown = {"eval_low": None, "eval_high": None}
    evaluations = [{"step": 0, "eval_reward": None, **unknown}, {"step": 1, "eval_reward": 0.5, **unknown}]
    outputs.draw_curve(rows, config, tmp_path / "x.png", evaluations)
    assert (tmp_path / "x.png").stat().st_size > 1000
    assert outputs.first_and_last(rows, "reward") == (0.5, 0.5) and outputs.first_and_last(rows, "kl") is None


def test_evaluated_on_held_out_prompts_while_it_trains(call, quick, tmp_path):
    """At the start, every eval_steps and the end; and a run that evaluates more often ends with the same weights."""
    runs = {}
    for often in (2, 100):
        flags = ("--eval_steps", often, "--eval_prompts", 9, "--seed", 3, "--rewards", "length,ending")
        assert "held out: reward" in ok(call("train_grpo", 4, *quick, "--output_dir", tmp_path / str(often), *flags)).out
        runs[often] = tmp_path / f"{often}-final"
    rows = rows_of(runs[2], "evaluation.jsonl")
    assert [row["step"] for row in rows] == [0, 2, 4] and len(rows_of(runs[100], "evaluation.jsonl")) == 2
    assert all(row["eval_low"] <= row["eval_reward"] <= row["eval_high"] and len(row["answers"]) == 3 for row in rows)
    parts = [row["eval_rewards/length"] + row["eval_rewards/ending"] for row in rows]
    assert [row["eval_reward"] for row in rows] == pytest.approx(parts, abs=1e-3)
    assert equal(*runs.values())


def test_a_collapse_stops_the_run_and_names_a_checkpoint_from_before(call, quick, tmp_path, monkeypatch):
    # The mean of the last five steps' numbers: at step 9 it is 7.
    monkeypatch.setattr(collapse, "COLLAPSE", {"step": (0, 6.5, "made up for this test")})
    flags = (20, *quick, "--eval_prompts", 0, "--save_steps", 4, "--save_total_limit", 2, "--output_dir", tmp_path / "o")
    done = call("train_grpo", *flags, "--stop_on_collapse")
    assert done.code == 2 and "Traceback" not in done.err and not (tmp_path / "o-final").exists(), done.err
    stopped = checkpoints.step_of(checkpoints.newest_complete(tmp_path / "o"))
    assert stopped == 9 and "step 9" in done.err and "checkpoint-4 " in done.err and "--init_adapter" in done.err
    assert ["collapse", "step"] in rows_of(tmp_path / "o")[-1]["alerts"]
    done = call("train_grpo", 12, *flags[1:], "--resume")
    assert done.code == 0 and "made up" not in done.out, "gone on with, without --stop_on_collapse, and not said again"
    assert ["collapse", "step"] in rows_of(tmp_path / "o-final")[stopped - 1]["alerts"]
    names = [path.name for path in checkpoints.list_checkpoints(tmp_path / "o")]
    assert names == ["checkpoint-9", "checkpoint-12"], "save_total_limit holds again"


def test_the_private_methods_that_are_replaced():
    """What the project rests on in TRL 1.16 and transformers 5; if this fails, read the new trainer."""
    signatures = {"_generate_single_turn": "prompt_ids images multimodal_fields num_generations has_tool_images",
                  "_get_train_sampler": "dataset", "_save_checkpoint": "model trial"}  # fmt: skip
    for name, parameters in signatures.items():
        assert list(inspect.signature(getattr(GRPOTrainer, name)).parameters)[1:] == parameters.split(), name
    assert "epoch" in inspect.signature(GRPOTrainer._run_epoch).parameters
    assert "logits_to_keep" in inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters
