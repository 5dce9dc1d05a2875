"""The app under ZeroGPU's own package (`spaces`), which says that CUDA is there before it is. No GPU is needed for that."""

import os
import subprocess
import sys
from unittest.mock import Mock

import pytest
from conftest import ROOT

pytest.importorskip("spaces")

EMULATED = """
import sys
import torch
torch.version.cuda = torch.version.cuda or "12.8"  # spaces asks for these; a CPU build of torch has none
if not hasattr(torch._C, "_cuda_init"):
    torch._C._cuda_init, torch.cuda._is_in_bad_fork = None, bool
sys.path.insert(0, "hf_app")
import app
assert torch.cuda.is_available() and app.ZERO_GPU
from pathlib import Path
app.engine = app.Engine(Path(sys.argv[1]), sys.argv[2])
print("STATUS", app.engine.kind, app.engine.model.device.type)
for tokens in (1, 512):
    settings = app.Settings(max_new_tokens=tokens)
    print("SECONDS", app.answer_seconds(settings), app.gpu_seconds([], "tuned", settings))
app.make_page()
"""


def test_the_adapter_is_loaded_and_an_answer_ends_in_time(final, micro):
    """Loaded on the CPU, then handed to the GPU; an answer's limit lies within what is reserved for it."""
    env = {**os.environ, "SPACES_ZERO_GPU": "true", "SPACES_ZERO_DEVICE_API_URL": "http://127.0.0.1:1"}
    command = [sys.executable, "-c", EMULATED, str(final), str(micro)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "STATUS tuned cuda" in done.stdout, (done.stdout, done.stderr)
    limits = [tuple(map(float, line.split()[1:])) for line in done.stdout.splitlines() if line.startswith("SECONDS")]
    assert len(limits) == 2 and all(0 < answer < reserved <= 120 for answer, reserved in limits), limits


def test_a_visitor_whose_time_is_used_up_is_told_so_in_words(monkeypatch):
    """As spaces raises it, with HTML in it; the question stays, and the line below it says what to do."""
    import app
    import gradio as gr

    used_up = gr.Error("You have exceeded your <b>free</b> ZeroGPU quota (71s requested vs. 3s left).")
    monkeypatch.setattr(app, "answer", Mock(side_effect=used_up))
    talk = [{"role": "user", "content": "Why?"}]
    *_, (question, said) = app.chat(talk, False, 8, True, 1.0, 1.0, 0, True)
    line = said["metadata"]["log"]
    assert question == talk[0] and line.startswith("Not answered. You have exceeded your free ZeroGPU quota (71s")
    assert "run the app on your own machine" in line


def test_errors_of_the_gpu_process_are_readable(monkeypatch):
    """Only a gr.Error does: spaces makes a bare class name of any other."""
    import app
    import gradio as gr
    import torch

    engine = Mock(stream=Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory")))
    monkeypatch.setattr(app, "engine", engine, raising=False)
    with pytest.raises(gr.Error, match="not enough memory"):
        list(app.generate([], "tuned", app.Settings()))
