"""Several processes: the update of one, one voice, one writer, and what happens when one is gone. On the CPU, by gloo."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT
from safetensors.torch import load_file

from phi2_grpo.common import files
from phi2_grpo.training import checkpoints

ALONE = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
ALONE["OMP_NUM_THREADS"] = "1"  # the threads of several processes would fight for the same cores


def torchrun(*command) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *map(str, command)]


def run(command: list, **options):
    return subprocess.run([*map(str, command)], cwd=ROOT, env=ALONE, capture_output=True, text=True, **options)


def start(command: list) -> subprocess.Popen:
    return subprocess.Popen(command, cwd=ROOT, env=ALONE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def launch(processes: int, *command, **options):
    return run(torchrun("--nproc_per_node", processes, "--master_port", free_port(), *command), **options)


def machine(rank: int, port: int, *command, processes: int = 1) -> subprocess.Popen:
    """One of two machines, on loopback."""
    where = ("--nnodes", 2, "--node_rank", rank, "--master_addr", "127.0.0.1", "--master_port", port)
    return start(torchrun(*where, "--nproc_per_node", processes, *command))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow  # beside another worker its processes would slow the browser's tests down
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_make_the_update_of_one(quick, tmp_path, processes):
    """The same completions, the same global batch of 8 in groups of 8 that lie across the processes; checkpoints, rows and lines once."""
    how = (2, *quick, "--num_generations", 8, "--warmup_steps", 0, "--eval_prompts", 0, "--save_steps", 1)
    one = run([sys.executable, "tests/spread.py", *how, "--output_dir", tmp_path / "one"])
    assert one.returncode == 0, one.stderr
    many = launch(
        processes, "tests/spread.py", *how, "--per_device_train_batch_size", 8 // processes, "--output_dir", tmp_path / "many"
    )
    assert many.returncode == 0, many.stderr
    for a, b in zip(rows_of(tmp_path / "one-final"), rows_of(tmp_path / "many-final"), strict=True):
        for key in ("reward", "reward_std", "grad_norm", "completions/mean_length", "answers/tokens", "answers/ended"):
            assert a[key] == pytest.approx(b[key], rel=1e-3), key
    ones, manys = (load_file(tmp_path / f"{side}-final" / "adapter_model.safetensors") for side in ("one", "many"))
    for name, weight in ones.items():
        assert (weight - manys[name]).abs().mean() < 2e-5, name
    assert len(re.findall(r"^ +\d/2 ", many.stdout, re.MULTILINE)) == 2 and many.stdout.count("Before the start") == 1
    whole = checkpoints.complete_checkpoints(tmp_path / "many")
    assert [path.name for path in whole] == ["checkpoint-1", "checkpoint-2"]
    states = {path.name for path in whole[-1].glob("rng_state*")}
    assert states == {f"rng_state_{rank}.pth" for rank in range(processes)}
    assert json.loads((tmp_path / "many-final" / "run.json").read_text())["processes"] == processes


@pytest.mark.slow
def test_a_real_run_by_two_processes_and_on_by_one(quick, tmp_path):
    """Sampling, held-out evaluation and saving in each other's company; then resumed by one process with the same global batch."""
    how = (*quick, "--save_steps", 2, "--eval_steps", 2, "--eval_prompts", 4, "--output_dir", tmp_path / "o")
    done = launch(2, "train_grpo.py", 2, *how, "--per_device_train_batch_size", 4)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held out: reward") == 2
    alone = [sys.executable, "train_grpo.py", 3, *how, "--resume"]
    refused = run([*alone, "--check", "--per_device_train_batch_size", 4])
    assert refused.returncode == 2 and "was 8, is 4" in refused.stderr
    resumed = run(alone)
    assert resumed.returncode == 0, resumed.stderr
    assert [row["step"] for row in rows_of(tmp_path / "o-final")] == [1, 2, 3]


@pytest.mark.slow
def test_an_alarm_is_said_once_and_raised_on_the_tracker(quick, tmp_path):
    """All processes see it; transformers opens the tracker in the first alone."""
    (tmp_path / "flat.py").write_text("def flat(answers, **_):\n    return [1.0 for _ in answers]\n")
    how = ("--per_device_train_batch_size", 4, "--rewards", f"{tmp_path}/flat.py:flat", "--report_to", "trackio")
    done = launch(2, "train_grpo.py", 6, *quick, *how, "--output_dir", tmp_path / "o")
    assert done.returncode == 0 and done.stdout.count("warning: frac_reward_zero_std is 1") == 1, done.stderr


@pytest.mark.slow
def test_a_refusal_is_said_once(quick, tmp_path):
    done = launch(2, "train_grpo.py", 1, *quick, "--num_generations", 5, "--output_dir", tmp_path / "o")
    assert done.returncode != 0 and done.stderr.count("not a multiple of num_generations 5") == 1


@pytest.mark.slow
def test_sigterm_to_the_launcher_saves_the_same_step_everywhere(quick, tmp_path):
    options = (*quick, "--per_device_train_batch_size", 4, "--output_dir", tmp_path / "o", "--save_steps", 2)
    with start(torchrun("--nproc_per_node", 2, "--master_port", free_port(), "train_grpo.py", 500, *options)) as process:
        wait_for_a_checkpoint(tmp_path / "o")
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)
    assert "--resume" in error and error.count("interrupted.") == 1, error
    assert checkpoints.complete_checkpoints(tmp_path / "o")


@pytest.mark.slow
def test_a_machine_that_dies_and_one_that_goes_on(quick, tmp_path):
    """Two agents on loopback as two machines; one is killed in mid-step: the other ends in bounded time, and says how to go on."""
    options = (*quick, "--per_device_train_batch_size", 4, "--output_dir", tmp_path / "o", "--save_steps", 2)
    port = free_port()
    first, second = (machine(rank, port, "train_grpo.py", 500, *options) for rank in range(2))
    wait_for_a_checkpoint(tmp_path / "o")
    for process in [*psutil.Process(second.pid).children(recursive=True), second]:
        process.kill()
    second.communicate()
    started = time.monotonic()
    _, error = first.communicate(timeout=120)
    assert first.returncode != 0 and time.monotonic() - started < 120
    assert "another process of this run is gone" in error and "--resume" in error, error
    step = checkpoints.step_of(checkpoints.complete_checkpoints(tmp_path / "o")[-1])
    port = free_port()
    both = [machine(rank, port, "train_grpo.py", step + 1, *options, "--resume") for rank in range(2)]
    for process in both:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
    assert [row["step"] for row in rows_of(tmp_path / "o-final")] == list(range(1, step + 2))


@pytest.mark.slow
def test_a_machine_that_never_comes_and_a_port_in_use():
    """torchrun's own messages, which launch/README.md quotes, in bounded time."""
    job = ("--nproc_per_node", 1, "--master_addr", "127.0.0.1", "train_grpo.py", "--preset", "tiny", "--check")
    alone = ("--nnodes", 2, "--node_rank", 0, "--master_port", free_port(), "--rdzv-conf", "timeout=5")
    done = run(torchrun(*alone, *job), timeout=60)
    assert done.returncode != 0 and "1/2 clients joined" in done.stderr
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run(torchrun("--master_port", taken.getsockname()[1], *job), timeout=60)
    assert done.returncode != 0 and "address already in use" in done.stderr


@pytest.mark.slow
def test_machines_with_unequal_numbers_of_processes(quick, tmp_path):
    """One process on one machine and two on the other; then refused where an update could not be divided."""

    def both(*flags) -> list[tuple[int, str]]:
        port = free_port()
        machines = [machine(rank, port, "train_grpo.py", 2, *quick, *flags, processes=1 + rank) for rank in range(2)]
        ends = [process.communicate(timeout=120) for process in machines]
        return [(process.returncode, error) for process, (_, error) in zip(machines, ends, strict=True)]

    for code, error in both("--per_device_train_batch_size", 4, "--output_dir", tmp_path / "o"):
        assert code == 0, error
    assert json.loads((tmp_path / "o-final" / "run.json").read_text())["processes"] == 3
    assert [row["step"] for row in rows_of(tmp_path / "o-final")] == [1, 2]
    ends = both("--per_device_train_batch_size", 5, "--output_dir", tmp_path / "p")
    assert all(code != 0 for code, _ in ends) and "x 3 process(es) = 15 completions" in ends[0][1], ends


@pytest.mark.slow
def test_a_folder_in_use_is_refused_soon(quick, tmp_path):
    """The first process is refused; the others, which wait for it, are ended with it."""
    started = time.monotonic()
    with files.lock_folder(tmp_path / "o"):
        done = launch(2, "train_grpo.py", 1, *quick, "--per_device_train_batch_size", 4, "--output_dir", tmp_path / "o")
    assert done.returncode != 0 and done.stderr.count("another run is writing to") == 1, done.stderr
    assert time.monotonic() - started < 30


def wait_for_a_checkpoint(output: Path) -> None:
    waited = time.monotonic()
    while not checkpoints.complete_checkpoints(output):
        assert time.monotonic() - waited < 120
        time.sleep(0.05)
