"""What the tests share: a way to call a script, a micro model made on the spot, and data prepared for it."""

import importlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import closing, redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"  # real rows and the real tokenizer, where a checkout has them beside it
sys.path[:0] = [str(ROOT), str(ROOT / "hf_app")]
os.environ |= {"HF_HUB_OFFLINE": "1", "no_proxy": "*", "NO_PROXY": "*"}  # no test may reach out, nor ask a proxy for loopback
os.environ["HF_DATASETS_CACHE"] = os.path.join(ROOT, ".pytest_cache", "datasets")  # without what was fetched for real
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # torch's threads of two workers would fight for the same cores
os.environ |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}  # as common/setup.py, which is too late here
WEIGHTS = "adapter_model.safetensors"
# What a finished adapter consists of.
ADAPTER_FILES = {"adapter_config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md",
                 "generation_config.json", "run.json", "metrics.jsonl", "evaluation.jsonl", "reward.png"}  # fmt: skip
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def script(name: str, *arguments: str, **environment: str) -> SimpleNamespace:
    """Run a script as the shell would, in a new process, from the repo's root; `environment` is laid over this one's."""
    command, options = [sys.executable, f"{name}.py", *map(str, arguments)], {"capture_output": True, "text": True}
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, timeout=1800, **options)
    return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr)


def refused(done: SimpleNamespace, *expected: str) -> None:
    """A script ended with one message that has the `expected` parts, exit code 2 and no traceback."""
    assert done.code == 2, (done.code, done.out, done.err)
    assert done.err.startswith("error: ") and "Traceback" not in done.err, done.err
    flat = " ".join(done.err.split())
    assert all(part in flat for part in expected), flat


def ok(done: SimpleNamespace) -> SimpleNamespace:
    """A script ended well."""
    assert done.code == 0, (done.out, done.err)
    return done


def rows_of(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def change_json(path: Path, **values) -> None:
    path.write_text(json.dumps({**read_json(path), **values}))


def change_weights(new):
    """What changes an adapter's folder: its tensors, a dict, become `new` of them."""
    from safetensors.torch import load_file, save_file

    return lambda folder: save_file(new(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def run_main(name: str, *arguments) -> SimpleNamespace:
    """Run a script's main in this process: the same code without the seconds that importing torch takes."""
    from phi2_grpo.common import cli

    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2)]
    code = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(streams[0]), redirect_stderr(streams[1]):
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        try:
            cli.run(importlib.import_module(name).main)
        except SystemExit as stop:
            code = stop.code
    out, err = (stream.buffer.getvalue().decode() for stream in streams)
    return SimpleNamespace(code=code, out=out, err=err)


@pytest.fixture
def call(monkeypatch):
    """run_main without the picture of the curve, which takes half a second (the fixture `trained` draws it)."""
    monkeypatch.setattr("phi2_grpo.training.outputs.draw_curve", lambda rows, config, path, evaluations: path.touch())
    return run_main


def make_micro(folder: Path, seed: int = 0, texts: list[str] | None = None, **shape) -> Path:
    """A random Phi of a few thousand parameters with a byte-level tokenizer, saved as a base model is."""
    import torch
    from transformers import PhiConfig, PhiForCausalLM

    from phi2_grpo.models import embedded

    torch.manual_seed(seed)
    tokenizer = embedded.train_tokenizer(texts or ["How do I keep a plant alive? Water it once a week. ¿Por qué? 为什么"])
    end, shape = tokenizer.eos_token_id, {**SHAPE, "max_position_embeddings": 512, **shape}
    config = PhiConfig(vocab_size=len(tokenizer), **shape, resid_pdrop=0.1, bos_token_id=end, eos_token_id=end)
    model = PhiForCausalLM(config)
    # It writes plain letters, and ends about one answer in eight at each token: so that rewards differ.
    bias = [0.0 if tokenizer.decode([i]).isascii() else -9.0 for i in range(len(tokenizer))]
    bias[end] = 3.0
    model.lm_head.bias.data = torch.tensor(bias)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_adapter(base: Path, folder: Path, **options) -> Path:
    """An adapter as PEFT alone saves it, with an effect."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    options = {"r": 4, "target_modules": ["q_proj", "fc1"], "task_type": "CAUSAL_LM", "init_lora_weights": False, **options}
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**options)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def micro(tmp_path_factory) -> Path:
    return make_micro(tmp_path_factory.mktemp("micro") / "base")


@pytest.fixture(scope="session")
def tokenizer(micro):
    from phi2_grpo.models.tokenizer import load_tokenizer

    return load_tokenizer({"model": str(micro), "model_revision": "main"})


@pytest.fixture(scope="session")
def prepared(micro, tmp_path_factory) -> Path:
    """The tiny sample prepared for the micro model's tokenizer."""
    data_dir = tmp_path_factory.mktemp("data") / "prepared"
    ok(run_main("prepare_data", "--preset", "tiny", "--model", micro, "--data_dir", data_dir, "--max_prompt_tokens", 100))
    return data_dir


@pytest.fixture(scope="session")
def quick(micro, prepared) -> tuple:
    """Flags of a run that takes seconds: micro model, short completions, no tracker."""
    return ("--preset", "tiny", "--model", micro, "--data_dir", prepared, "--max_completion_length", "12", "--target_tokens",
            "6", "--per_device_train_batch_size", "8", "--num_generations", "4", "--report_to", "none", "--eval_prompts", "4")  # fmt: skip


@pytest.fixture(scope="session")
def trained(quick, tmp_path_factory) -> Path:
    """A finished run of six steps with checkpoints at 2, 4 and 6; its output_dir."""
    output = tmp_path_factory.mktemp("run") / "grpo"
    done = ok(run_main("train_grpo", 6, *quick, "--output_dir", output, "--save_steps", 2, "--sample_steps", 3))
    (output.parent / "printed.txt").write_text(done.out)
    return output


@pytest.fixture(scope="session")
def final(trained) -> Path:
    """The finished adapter of that run."""
    return trained.with_name(f"{trained.name}-final")


@pytest.fixture(scope="session")
def loud(final, tmp_path_factory) -> Path:
    """That adapter with its effect made large: tuned and base answer differently, which six steps hardly reach."""
    folder = shutil.copytree(final, tmp_path_factory.mktemp("loud") / "grpo-final")
    change_weights(lambda t: {name: value * (60 if "lora_B" in name else 1) for name, value in t.items()})(folder)
    change_json(folder / "generation_config.json", max_new_tokens=512)
    return folder


@pytest.fixture(scope="session")
def engine(loud, micro):
    """The app's engine, with that adapter."""
    from engine import Engine

    with closing(Engine(loud, str(micro))) as running:
        yield running


@pytest.fixture(scope="session")
def roomy(tmp_path_factory) -> Path:
    """The micro base with Phi-2's context (its positions are computed, not learnt)."""
    return make_micro(tmp_path_factory.mktemp("roomy") / "base", max_position_embeddings=2048)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class AppServer:
    """`tests/serve_app.py` in a process of its own."""

    def __init__(self, adapter: Path, base: Path, folder: Path):
        self.port, self.journal, self.log = free_port(), folder / "journal", folder / "log"
        self.url = f"http://127.0.0.1:{self.port}"
        self.journal.touch()
        command = [sys.executable, ROOT / "tests" / "serve_app.py", adapter, base, self.journal, "--port", str(self.port)]
        with self.log.open("w") as log:
            settings = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=settings, cwd=folder)
        deadline = time.monotonic() + 90
        while "Running on" not in self.log.read_text():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def steps(self) -> int:
        """Tokens drawn so far."""
        return self.journal.read_text().count("token")

    def idle_within(self, seconds: float) -> bool:
        """Whether all generation ends in that time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            before = self.steps()
            time.sleep(0.3)
            if self.steps() == before:
                return True
        return False

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture(scope="session")
def server(loud, roomy, tmp_path_factory):
    """The app, with a model that says what a test wants (tests/serve_app.py)."""
    with closing(AppServer(loud, roomy, tmp_path_factory.mktemp("server"))) as running:
        yield running
