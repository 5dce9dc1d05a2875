"""The main job on a micro model: what moves, what is written, what can be repeated and resumed."""

import inspect
import json
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from trl import GRPOTrainer

from phi2_grpo.training import checkpoints, outputs

SELF_DESCRIBING = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json",
                   "chat_template.jinja", "generation_config.json", "README.md", "run.json", "metrics.jsonl", "evaluation.jsonl", "reward.png"}  # fmt: skip


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_lora_weight_moves_and_no_base_weight_does(call, quick, micro, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    kept = {}
    original = GRPOTrainer.train

    def train(self, *arguments, **keywords):
        kept["model"] = self.model
        kept["before"] = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        return original(self, *arguments, **keywords)

    monkeypatch.setattr(GRPOTrainer, "train", train)
    # Three steps: in the first, B is zero and A gets no gradient; constant learning rate, without warm-up.
    done = call("train_grpo", 3, *quick, "--output_dir", tmp_path / "o", "--warmup_steps", 0)
    assert done.code == 0, done.err
    fresh = AutoModelForCausalLM.from_pretrained(micro).state_dict()
    lora = 0
    for name, parameter in kept["model"].named_parameters():
        if "lora_" in name:
            lora += 1
            assert parameter.requires_grad and not torch.equal(parameter, kept["before"][name]), f"{name} did not move"
        else:
            assert not parameter.requires_grad
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(parameter, fresh[plain]), f"{name} moved"
    assert lora == 2 * 6 * 2, "A and B of six kinds in two layers"


def test_final_folder_describes_itself(trained):
    final = trained.with_name("grpo-final")
    assert {path.name for path in final.iterdir()} == SELF_DESCRIBING, "no pickles, nothing missing"
    run = json.loads((final / "run.json").read_text())
    assert run["finished"] and run["steps"] == 6 and run["config"]["max_steps"] == 6 and run["preset"] == "tiny"
    assert set(run["versions"]) >= {"torch", "trl", "peft"} and run["data"]["fingerprint"] and run["seconds"] > 0
    rows = rows_of(final)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6] == [row["step"] for row in rows_of(trained)]
    wanted = {"reward", "reward_std", "frac_reward_zero_std", "answers/tokens", "answers/ended", "kl", "step_time", "grad_norm",
              "rewards/length/mean", "rewards/length/en", "rewards/length/es"}  # fmt: skip
    assert wanted <= set().union(*rows)
    assert rows[0]["kl"] == 0, "dropout is off, and the untrained adapter is the base"
    card = (final / "README.md").read_text()
    assert f"{sum(row['reward'] for row in rows[-3:]) / 3:.3g}" in card and "AutoPeftModelForCausalLM" in card
    assert (final / "reward.png").read_bytes().startswith(b"\x89PNG")
    generation = json.loads((final / "generation_config.json").read_text())
    assert "\nInstruct:" in generation["stop_strings"] and generation["max_new_tokens"] == 256, "half of the context"


def test_the_card_s_code_runs(trained, monkeypatch, capsys):
    """The model card's example, as it stands there, on the folder it stands in."""
    final = trained.with_name("grpo-final")
    code = re.search(r"```python\n(.+?)```", (final / "README.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(final)
    exec(code, {})
    assert capsys.readouterr().out.endswith("\n"), "it prints an answer, which a model of this size may leave empty"


def test_checkpoints_are_whole_adapter_folders(trained):
    names = sorted(path.name for path in trained.glob("checkpoint-*"))
    assert names == ["checkpoint-4", "checkpoint-6"], "save_total_limit 2"
    for name in names:
        present = {path.name for path in (trained / name).iterdir()}
        assert SELF_DESCRIBING | {"optimizer.pt", "trainer_state.json", "rng_state.pth"} <= present
        assert json.loads((trained / name / "run.json").read_text())["finished"] is False
    assert not (trained / "README.md").exists()


def test_what_is_printed(trained):
    printed = (trained.parent / "printed.txt").read_text()
    coverage = "12 modules (dense 2, fc1 2, fc2 2, k_proj 2, q_proj 2, v_proj 2)"
    assert coverage in " ".join(printed.translate({ord(c): " " for c in "│┃"}).split())
    assert len(re.findall(r"^ +\d/6 +\d\.\d{3}", printed, re.MULTILINE)) == 6, "a line a step"
    assert "step 3, best: reward" in printed and "step 6, worst: reward" in printed
    assert "Mean reward, first to last steps" in printed
    assert all(len(line) <= 80 for line in printed.splitlines() if "/6" in line), "fits a terminal"
    assert "Traceback" not in printed and "Warning" not in printed


def test_same_seed_same_adapter_and_another_seed_another(call, quick, trained, tmp_path):
    """Bit for bit on the CPU; and a run stopped at step 4 and resumed ends with the same adapter as one never stopped."""
    options = (*quick, "--save_steps", "2", "--sample_steps", "3")
    reference = load_file(trained.with_name("grpo-final") / "adapter_model.safetensors")
    first = call("train_grpo", "4", *options, "--output_dir", tmp_path / "a")
    assert first.code == 0, first.err
    resumed = call("train_grpo", "6", *options, "--output_dir", tmp_path / "a", "--resume")
    assert resumed.code == 0 and "resuming at checkpoint-4" in resumed.out, resumed.err
    ended = load_file(tmp_path / "a-final" / "adapter_model.safetensors")
    assert reference.keys() == ended.keys() and all(torch.equal(reference[key], ended[key]) for key in reference)
    assert [row["step"] for row in rows_of(tmp_path / "a-final")] == [1, 2, 3, 4, 5, 6], "no gap, no double"
    other = call("train_grpo", "2", *options, "--output_dir", tmp_path / "b", "--seed", "1")
    assert other.code == 0
    assert rows_of(tmp_path / "b")[0]["reward"] != rows_of(tmp_path / "a")[0]["reward"]


def test_a_run_is_not_overwritten_unasked(call, quick, trained, tmp_path):
    refused = call("train_grpo", 2, *quick, "--output_dir", trained)
    assert refused.code == 2 and "--resume" in refused.err and "--overwrite" in refused.err
    assert (trained / "checkpoint-6" / "run.json").exists()
    # A finished adapter alone counts too; a checkpoint that was never finished does not.
    output = tmp_path / "o"
    shutil.copytree(trained.with_name("grpo-final"), tmp_path / "o-final")
    assert "holds a run" in call("train_grpo", "--check", *quick, "--output_dir", output).err
    (output / "checkpoint-2").mkdir(parents=True)
    shutil.rmtree(tmp_path / "o-final")
    assert checkpoints.complete_checkpoints(str(output)) == []
    done = call("train_grpo", "--check", *quick, "--output_dir", output, "--resume")
    assert done.code == 0 and "no whole checkpoint: starting at step 0" in " ".join(done.out.split())


def test_only_the_run_is_removed(call, quick, tmp_path):
    """--output_dir may be any folder of the user's; what stands there beside a run stays."""
    (tmp_path / "o" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "o" / "checkpoint-old").mkdir()
    (tmp_path / "o" / "thesis.txt").write_text("years of work")
    done = call("train_grpo", 1, *quick, "--output_dir", tmp_path / "o", "--overwrite")
    assert done.code == 0, done.err
    assert (tmp_path / "o" / "thesis.txt").read_text() == "years of work" and (tmp_path / "o" / "checkpoint-old").exists()
    assert not (tmp_path / "o" / "checkpoint-2").exists()
    assert checkpoints.final_folder({"output_dir": "."}).name.endswith("-final")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "metrics.jsonl").write_text('{"mine": 1}\n')
    for more in ((), ("--overwrite",), ("--resume",)):
        done = call("train_grpo", 1, *quick, "--output_dir", tmp_path / "mine", *more)
        assert done.code == 2 and "is no run's, and would be written over" in done.err, done.err
    assert (tmp_path / "mine" / "metrics.jsonl").read_text() == '{"mine": 1}\n'
    (tmp_path / "new-final").mkdir()  # an empty folder may be taken
    done = call("train_grpo", "--check", *quick, "--output_dir", tmp_path / "new")
    assert done.code == 0, done.err


def test_a_setting_left_empty_is_the_library_s_own(tmp_path):
    from trl import GRPOConfig

    from phi2_grpo.training.trainer import training_arguments

    config = {"vllm_server_base_url": "", "output_dir": str(tmp_path / "o"), "learning_rate": 0.5, "report_to": "none"}
    found = training_arguments(GRPOConfig, config, torch.device("cpu"), torch.float32, max_steps=3)
    assert found.vllm_server_base_url is None and (found.learning_rate, found.max_steps, found.run_name) == (0.5, 3, "o")


def test_where_the_weights_are_spread_trl_rolls_out(call, quick, tmp_path, monkeypatch):
    """No engine is made, for its views of the weights would keep a whole base on each process."""
    from phi2_grpo.models import base
    from phi2_grpo.rollout import engine

    monkeypatch.setattr(base, "is_sharded", lambda: True)
    monkeypatch.setattr(engine, "make_engine", lambda *_: pytest.fail("an engine was made"))
    done = call("train_grpo", 1, *quick, "--output_dir", tmp_path / "o")
    assert done.code == 2 and "give --eval_prompts 0" in done.err, done.err
    done = call("train_grpo", 1, *quick, "--output_dir", tmp_path / "o", "--eval_prompts", 0)
    assert done.code == 0 and len(rows_of(tmp_path / "o-final")) == 1, done.err


def test_a_folder_that_is_no_run_is_never_replaced(call, quick, tmp_path):
    (tmp_path / "o-final").mkdir()
    (tmp_path / "o-final" / "thesis.txt").write_text("years of work")
    done = call("train_grpo", 1, *quick, "--output_dir", tmp_path / "o", "--overwrite")
    assert done.code == 2 and "it stays" in done.err and (tmp_path / "o-final" / "thesis.txt").exists()


def test_a_finished_run_may_be_resumed_and_made_longer(call, quick, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "o")
    for steps in ("6", "7"):  # the first has nothing left to do
        done = call("train_grpo", steps, *quick, "--output_dir", tmp_path / "o", "--resume")
        assert done.code == 0, done.err
        assert rows_of(tmp_path / "o-final")[-1]["step"] == int(steps), done.out
    (tmp_path / "o-final" / "README.md").write_text("validated")
    done = call("train_grpo", 7, *quick, "--output_dir", tmp_path / "o", "--resume")
    assert done.code == 0 and "Nothing is left to train" in done.out, done.err
    assert (tmp_path / "o-final" / "README.md").read_text() == "validated", "the result stays as it is"
    shutil.copy(trained.with_name("grpo-final") / "adapter_model.safetensors", tmp_path / "o-final")
    assert call("train_grpo", 7, *quick, "--output_dir", tmp_path / "o", "--resume").code == 0
    assert (tmp_path / "o-final" / "README.md").read_text() != "validated", "another run's result is replaced"
    run = json.loads((tmp_path / "o-final" / "run.json").read_text())
    assert run["seconds"] > json.loads((trained / "checkpoint-6" / "run.json").read_text())["seconds"]


def test_check_trains_nothing(call, quick, tmp_path):
    done = call("train_grpo", "--check", *quick, "--output_dir", tmp_path / "o")
    text = " ".join(done.out.replace("│", " ").split())
    assert done.code == 0 and list(tmp_path.iterdir()) == []
    for part in (
        "CPU",
        "12 modules",
        "8 completions an update = 2 prompts x 4",
        "length x 1 (0.",
        "weights",
        "for checkpoints",
    ):
        assert part in text


def test_init_adapter_starts_there_and_keeps_the_base_as_reference(call, quick, tmp_path):
    first = call("train_grpo", "3", *quick, "--lora_r", 3, "--lora_alpha", 5, "--output_dir", tmp_path / "a")
    assert first.code == 0, first.err
    final = tmp_path / "a-final"
    options = (*quick, "--init_adapter", final, "--learning_rate", "1e-9", "--output_dir", tmp_path / "o")
    done = call("train_grpo", "1", *options)
    assert done.code == 0, done.err
    config = json.loads((tmp_path / "o-final" / "run.json").read_text())["config"]
    assert (config["lora_r"], config["lora_alpha"]) == (3, 5), "the adapter's, not the flags'"
    assert "LoRA r=3, alpha=5" in (tmp_path / "o-final" / "README.md").read_text()
    assert call("train_grpo", "2", *options, "--resume").code == 0
    assert call("train_grpo", "1", *options, "--overwrite").code == 0
    assert rows_of(tmp_path / "o-final")[0]["kl"] > 0, "the KL is to the base, not to the adapter it started from"
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (final, tmp_path / "o-final"))
    assert all(torch.allclose(before[key], after[key], atol=1e-6) for key in before)
    assert any(value.abs().max() > 1e-5 for key, value in after.items() if "lora_B" in key)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGHUP, 143, marks=pytest.mark.slow),
    ],
)
def test_interrupted(quick, tmp_path, number, code):
    command = [
        sys.executable,
        "train_grpo.py",
        "500",
        *map(str, quick),
        "--output_dir",
        str(tmp_path / "o"),
        "--save_steps",
        "2",
    ]
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell's background job, as a CI may be, ignores SIGINT and hands that down.
    heeding = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen(command, **options, **heeding) as process:
        waited = time.monotonic()
        while not checkpoints.complete_checkpoints(str(tmp_path / "o")) and time.monotonic() - waited < 120:
            time.sleep(0.1)
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    assert process.returncode == code and "--resume" in error and "Traceback" not in error
    assert "stopping after this step, with a checkpoint" in error
    assert checkpoints.complete_checkpoints(str(tmp_path / "o")) and not (tmp_path / "o-final").exists()


def test_curve_and_card_of_an_odd_run(tmp_path):
    """One step, or values that were not finite: still a picture and valid JSON."""
    config = {"target_tokens": 8, "rewards": ["length:1.0"]}
    odd = {"reward": 0.5, "reward_std": 0.1, "kl": float("nan"), "answers/tokens": 3.0, "step": 1}
    rows = outputs.log_rows([odd, {"loss": 1}], "reward")
    assert rows == [{"reward": 0.5, "reward_std": 0.1, "kl": None, "answers/tokens": 3.0, "step": 1}]
    for part in (rows, []):
        outputs.draw_curve(part, config, tmp_path / "x.png", [])
        assert (tmp_path / "x.png").stat().st_size > 1000
    assert outputs.first_and_last(rows, "reward") == (0.5, 0.5) and outputs.first_and_last(rows, "kl") is None


def test_evaluated_on_held_out_prompts_while_it_trains(call, quick, trained, tmp_path):
    """At the start, every eval_steps and the end; and a run that evaluates more often ends with the same weights."""
    runs = {}
    for eval_steps in (2, 100):
        output = tmp_path / str(eval_steps)
        done = call(
            "train_grpo", 4, *quick, "--output_dir", output, "--eval_steps", eval_steps, "--eval_prompts", 9, "--seed", 3
        )
        assert done.code == 0 and "held out: reward" in done.out, done.err
        runs[eval_steps] = output.with_name(f"{output.name}-final")
    rows = [json.loads(line) for line in (runs[2] / "evaluation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 2, 4] and (runs[100] / "evaluation.jsonl").read_text().count("\n") == 2
    assert all(row["eval_low"] <= row["eval_reward"] <= row["eval_high"] and len(row["answers"]) == 3 for row in rows)
    weights = [load_file(folder / "adapter_model.safetensors") for folder in runs.values()]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    training = [json.loads(line) for line in (runs[2] / "metrics.jsonl").read_text().splitlines()]
    for row in training:
        parts = [row[f"seconds/{part}"] for part in ("rollout", "rewards", "log_probs", "update")]
        assert all(seconds > 0 for seconds in parts) and sum(parts) == pytest.approx(row["step_time"], rel=0.2)
    assert "held out" not in call("train_grpo", 1, *quick, "--output_dir", tmp_path / "n", "--eval_prompts", 0).out


def test_the_private_methods_that_are_timed_and_replaced():
    """FACTS of TRL 1.16 that the project rests on; if this fails, read the new trainer."""
    for name in ("_calculate_rewards", "_get_per_token_logps_and_entropies", "_save_checkpoint"):
        assert callable(getattr(GRPOTrainer, name))
    assert list(inspect.signature(GRPOTrainer._generate_single_turn).parameters) == [
        "self", "prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images"]  # fmt: skip
