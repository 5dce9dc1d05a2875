"""Several processes: the update of one, one prints and writes, and what happens when one is gone. On the CPU, by gloo."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from conftest import ROOT, WEIGHTS, free_port, ok, read_json, refused, rows_of, script
from safetensors.torch import load_file

from phi2_grpo.training import checkpoints

pytestmark = pytest.mark.slow
FIXED = "tests/fixed_completions.py"
ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
ENVIRONMENT["OMP_NUM_THREADS"] = "1"  # the threads of several processes would compete for the same cores
TORCHRUN = ("-m", "torch.distributed.run")
HALF = ("--per_device_train_batch_size", 4)  # of the 8 completions of an update


def start(*command) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, env=ENVIRONMENT, **pipes)


def end(process: subprocess.Popen, seconds: float | None = None) -> SimpleNamespace:
    out, err = process.communicate(timeout=seconds)
    return SimpleNamespace(code=process.returncode, out=out, err=err)


def launch(processes: int, *command) -> subprocess.Popen:
    return start(*TORCHRUN, "--nproc_per_node", processes, "--master_port", free_port(), *command)


def launch_machines(*command, processes=(1, 1)) -> list[subprocess.Popen]:
    """Two machines, on loopback."""
    where = (*TORCHRUN, "--nnodes", 2, "--master_addr", "127.0.0.1", "--master_port", free_port())
    return [start(*where, "--node_rank", rank, "--nproc_per_node", processes[rank], *command) for rank in range(2)]


def wait_for_a_checkpoint(output: Path) -> None:
    started = time.monotonic()
    while not checkpoints.complete_checkpoints(output):
        assert time.monotonic() - started < 120
        time.sleep(0.05)


def test_several_processes_make_the_update_of_one(quick, tmp_path):
    """The same completions, in groups that lie across the processes; checkpoints, rows and lines once."""
    own = (2, *quick, "--num_generations", 8, "--warmup_steps", 0, "--eval_prompts", 0, "--save_steps", 1)
    ok(end(start(FIXED, *own, "--output_dir", tmp_path / "1")))
    expected = load_file(tmp_path / "1-final" / WEIGHTS)
    for processes in (2, 4):
        output, final = tmp_path / f"{processes}", tmp_path / f"{processes}-final"
        flags = ("--per_device_train_batch_size", 8 // processes, "--output_dir", output)
        printed = ok(end(launch(processes, FIXED, *own, *flags))).out
        for a, b in zip(rows_of(tmp_path / "1-final"), rows_of(final), strict=True):
            for key in ("reward", "reward_std", "grad_norm", "completions/mean_length", "answers/tokens", "answers/ended"):
                assert a[key] == pytest.approx(b[key], rel=1e-3), key
        for name, weight in load_file(final / WEIGHTS).items():
            assert (weight - expected[name]).abs().mean() < 2e-5, name
        assert len(re.findall(r"^ +\d/2 ", printed, re.MULTILINE)) == 2 and printed.count("Preflight") == 1
        complete = checkpoints.complete_checkpoints(output)
        assert [path.name for path in complete] == ["checkpoint-1", "checkpoint-2"]
        assert len([*complete[-1].glob("rng_state_*.pth")]) == processes
        assert read_json(final / "run.json")["processes"] == processes


def test_a_run_by_two_processes_and_on_by_one(quick, tmp_path):
    """With a reward that never differs: an alert that both see and one prints. Resumed with the same completions an update."""
    (tmp_path / "same.py").write_text("def same(answers, **_):\n    return [1.0 for _ in answers]\n")
    own = (*quick, "--save_steps", 2, "--eval_steps", 2, "--eval_prompts", 4, "--report_to", "trackio")
    own = (*own, "--rewards", f"{tmp_path}/same.py:same", "--output_dir", tmp_path / "o")
    printed = ok(end(launch(2, "train_grpo.py", 6, *own, *HALF))).out
    assert printed.count("held out: reward") == 4 and printed.count("warning: frac_reward_zero_std is 1") == 1
    resumed = ("train_grpo", 7, *own, "--resume")
    refused(script(*resumed, "--check", *HALF), "was 8, is 4")
    ok(script(*resumed))
    assert [row["step"] for row in rows_of(tmp_path / "o-final")] == list(range(1, 8))


def test_a_refusal_is_printed_once(quick, tmp_path):
    """The first process is refused; the launcher ends the others with it."""
    done = end(launch(2, "train_grpo.py", 1, *quick, *HALF, "--output_dir", tmp_path / "o", "--num_generations", 5))
    assert done.code != 0 and done.err.count("not a multiple of num_generations 5") == 1


def test_sigterm_to_the_launcher_saves_the_same_step_everywhere(quick, tmp_path):
    own = ("train_grpo.py", 500, *quick, *HALF, "--output_dir", tmp_path / "o", "--save_steps", 2)
    with launch(2, *own) as process:
        wait_for_a_checkpoint(tmp_path / "o")
        process.send_signal(signal.SIGTERM)
        error = end(process, 60).err
    assert "--resume" in error and error.count("interrupted.") == 1, error


def test_a_machine_that_dies(quick, tmp_path):
    """It is killed in mid-step: the other ends in bounded time and says how to go on; then both go on."""
    own = (*quick, *HALF, "--output_dir", tmp_path / "o", "--save_steps", 2)
    first, second = launch_machines("train_grpo.py", 500, *own)
    wait_for_a_checkpoint(tmp_path / "o")
    for process in [*psutil.Process(second.pid).children(recursive=True), second]:
        process.kill()
    end(second)
    done = end(first, 120)
    assert done.code != 0 and "another process of this run is gone" in done.err and "--resume" in done.err, done.err
    step = checkpoints.step_of(checkpoints.newest_complete(tmp_path / "o"))
    for process in launch_machines("train_grpo.py", step + 1, *own, "--resume"):
        ok(end(process, 120))
    assert [row["step"] for row in rows_of(tmp_path / "o-final")] == list(range(1, step + 2))


def test_machines_with_unequal_numbers_of_processes(quick, tmp_path):
    own = (2, *quick, *HALF, "--output_dir", tmp_path / "o")
    for process in launch_machines("train_grpo.py", *own, processes=(1, 2)):
        ok(end(process, 120))
    assert read_json(tmp_path / "o-final" / "run.json")["processes"] == 3
    assert [row["step"] for row in rows_of(tmp_path / "o-final")] == [1, 2]
