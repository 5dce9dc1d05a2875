"""The app without a browser: its engine, and its command."""

import re
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import engine as app_engine
import pytest
import torch
from conftest import ROOT, WEIGHTS, change_json, change_weights, make_micro, script
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from config import LIMITS
from phi2_grpo.models import answers, lora
from phi2_grpo.models.tokenizer import CHAT_TEMPLATE, SAMPLE_PROMPTS

CONFIG = "adapter_config.json"
PLANT = [{"role": "user", "content": "How do I keep a plant alive?"}]


def ask(engine, question: str | list[dict] = PLANT, model="tuned", **given):
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
    *_, last = engine.stream(messages, model, engine.settings(**given))
    return last


def test_what_stands_alone_says_the_same_as_the_project():
    """hf_app imports nothing of the project, so these facts stand twice; this holds them together."""
    assert app_engine.CHAT_TEMPLATE == CHAT_TEMPLATE and app_engine.STOP_STRINGS == answers.STOP_STRINGS
    assert app_engine.CHANGES_BASE == lora.CHANGES_BASE
    assert (LIMITS["chat_temperature"], LIMITS["chat_top_p"]) == (app_engine.LIMITS["temperature"], app_engine.LIMITS["top_p"])
    source = (ROOT / "hf_app" / "app.py").read_text()
    assert all(repr(prompt).strip("'") in source for prompt in SAMPLE_PROMPTS)
    for file in (ROOT / "hf_app").glob("*.py"):
        assert not re.search(r"^\s*(from|import) (phi2_grpo|config)\b", file.read_text(), re.MULTILINE), file


def test_an_adapter_s_own_settings_out_of_range_do_not_stop_the_app(engine, monkeypatch):
    monkeypatch.setattr(engine.defaults, "temperature", 3.0)
    monkeypatch.setattr(engine.defaults, "top_p", 0.01)
    own = engine.settings()
    assert (own.temperature, own.top_p) == (2.0, 0.05)


def test_a_pickled_base_is_not_read(micro, tmp_path):
    base = shutil.copytree(micro, tmp_path / "base")
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with pytest.raises(app_engine.NoBase, match="safetensors"):
        app_engine.Engine(tmp_path / "none", str(base))


@pytest.mark.parametrize(("text", "finished", "expected"), [
    (" Four.\nInstruct: and", False, ("Four.", "Instruct:")), (" é�", False, ("é", "")),
    (" Four.\nInstr", False, ("Four.", "")),  # may become a stop
    (" Four.\nInstr", True, ("Four.\nInstr", "")),  # did not
    (" Four.\nInstructors help", False, ("Four.\nInstructors help", "")),
    (" Exercise 3", True, ("Exercise 3", "")),  # not at a line's start
    (" a\nExercise 3 b\nInstruct: c", True, ("a", "Exercise 3"))])  # fmt: skip
def test_trimming_holds_back_what_may_become_a_stop(text, finished, expected):
    assert app_engine.trim(text, ["\nInstruct:", "\nExercise 3"], finished) == expected


@pytest.mark.parametrize("model", ["tuned", "base"])
def test_both_answer_as_a_direct_run_of_the_libraries(engine, loud, micro, model):
    """Token for token what PEFT, or a base that no adapter was ever put on, draws with the same seed."""
    tokenizer = AutoTokenizer.from_pretrained(loud)
    plain = AutoModelForCausalLM.from_pretrained(micro, dtype=torch.float32)
    direct = PeftModel.from_pretrained(plain, loud).eval() if model == "tuned" else plain.eval()
    inputs = tokenizer.apply_chat_template(PLANT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    config = GenerationConfig.from_pretrained(loud)
    for seed in range(3):
        torch.manual_seed(seed)
        output = direct.generate(**inputs, generation_config=config, tokenizer=tokenizer, max_new_tokens=30)
        text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert ask(engine, seed=seed, max_new_tokens=30, model=model).text == text.split("\nInstruct:")[0].strip()


def test_the_base_s_own_ways_to_sample_and_beams_are_not_used(engine, loud, micro, tmp_path):
    base, adapter = shutil.copytree(micro, tmp_path / "base"), shutil.copytree(loud, tmp_path / "adapter")
    change_json(base / "generation_config.json", repetition_penalty=9.0, do_sample=True, top_k=1)
    change_json(adapter / "generation_config.json", num_beams=4)
    other = app_engine.Engine(adapter, str(base))
    for model in ("tuned", "base"):
        assert all(ask(other, seed=i, model=model).text == ask(engine, seed=i, model=model).text for i in range(3))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<|end|>\n{% endfor %}"  # names a turn's end, as Qwen's
    tokenizer.save_pretrained(base)
    assert app_engine.Engine(tmp_path / "none", str(base)).eos_ids[-1] == tokenizer.convert_tokens_to_ids("<|end|>")


@pytest.mark.parametrize(("capability", "free", "expected"), [
    ((8, 6), 9e9, ("cuda", torch.bfloat16)), ((7, 5), 13e9, ("cuda", torch.float32)), ((7, 5), 9e9, ("cpu", torch.bfloat16)),
    ((7, 0), 32e9, ("cpu", torch.bfloat16))])  # fmt: skip
def test_a_gpu_that_is_too_small_or_too_old_is_not_taken(monkeypatch, capability, free, expected):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    monkeypatch.setattr("torch.cuda.get_arch_list", lambda: ["sm_75", "sm_80", "compute_120"])
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (free, 2 * free))
    device, dtype = app_engine.choose_device(2_700_000_000)
    assert (device.type, dtype) == expected


def test_base_and_tuned_do_not_mix_under_concurrent_use(engine):
    alone = {(model, seed): ask(engine, model=model, seed=seed).text for model in ("tuned", "base") for seed in range(4)}
    assert any(alone["tuned", seed] != alone["base", seed] for seed in range(4)), "the two must differ for this to prove much"
    with ThreadPoolExecutor(4) as pool:
        jobs = [(of, pool.submit(ask, engine, model=of[0], seed=of[1])) for of in [*alone] * 3]
        assert all(job.result().text == alone[of] for of, job in jobs)


def test_parameters_take_effect(engine):
    assert len({ask(engine, seed=seed).text for seed in range(6)}) > 1
    assert len({ask(engine).seed for _ in range(3)}) == 3, "-1 draws a new seed each time"
    assert ask(engine, sample=False, seed=1).text == ask(engine, sample=False, seed=2).text
    assert ask(engine, max_new_tokens=1).tokens <= 1
    assert ask(engine, temperature=0.05, seed=1).text == ask(engine, temperature=0.05, seed=2).text


def test_earlier_turns_are_seen_and_the_oldest_leave_first(engine):
    said = (("user", "first"), ("assistant", "one"), ("user", "second"))
    talk = [{"role": role, "content": text} for role, text in said]
    assert engine.prompt(talk, 16) == ("Instruct: first\nOutput: one\nInstruct: second\nOutput:", 0)
    long = [{"role": role, "content": "plant " * 60} for role in ("user", "assistant") * 4]
    long.append({"role": "user", "content": "now"})
    text, left_out = engine.prompt(long, 200)
    assert 0 < left_out < len(long) and left_out % 2 == 0 and text.endswith("Instruct: now\nOutput:")
    assert f"{left_out} earlier messages left out" in ask(engine, long, max_new_tokens=200, seed=0).summary()


@pytest.mark.parametrize(("question", "given", "expected"), [
    ("\x00\x01\x7f", {}, "empty"),  # control characters are no question
    ("x" * 100_000, {}, "100,000 characters, and 20,000 are the limit"),
    ("plant " * 2_000, {}, "there is room for"),
    ("Why?", {"temperature": 0.0}, "temperature is 0.0, but it takes a number from 0.05 to 2.0"),
    ("Why?", {"temperature": float("nan")}, "temperature is nan"),
    ("Why?", {"temperature": "hot"}, "temperature is 'hot'"),
    ("Why?", {"max_new_tokens": 10_000}, "a whole number from 1 to 256"),
    ("Why?", {"max_new_tokens": 2.5}, "max_new_tokens is 2.5"), ("Why?", {"seed": -2}, "seed is -2"),
    ("Why?", {"model": "gpt"}, "model is 'gpt'")])  # fmt: skip
def test_bad_input_to_the_engine(engine, question, given, expected):
    with pytest.raises(app_engine.BadInput, match=re.escape(expected)):
        ask(engine, question, **given)


def test_odd_questions_are_answered(engine):
    for question in ("\u202eשלום\u202c עולם", "👋🏽" * 50, "a\u0000b", "\ud800a", "\r\n a \r", "<|endoftext|> a"):
        assert ask(engine, question, max_new_tokens=4).finish_reason


def test_the_time_limit_ends_an_answer(engine, monkeypatch):
    monkeypatch.setattr(app_engine, "MAX_SECONDS", 0.0)
    ends = [ask(engine, "Why?", max_new_tokens=200, seed=seed) for seed in range(6)]
    assert all(last.tokens <= 1 for last in ends) and any(last.finish_reason == "cut off at the time limit" for last in ends)


BROKEN = {
    "gone": (shutil.rmtree, "base", "No adapter in"),
    "empty": (lambda folder: [path.unlink() for path in folder.iterdir()], "base", "No adapter in"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), "broken", "adapter_config.json is missing"),
    "pointer": (lambda folder: (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1"), "broken", "LFS"),
    "corrupt": (lambda folder: (folder / WEIGHTS).write_bytes(b"x" * 1000), "broken", "is broken"),
    "config is no JSON": (lambda folder: (folder / CONFIG).write_text("{"), "broken", "cannot be read"),
    "other target": (lambda folder: change_json(folder / CONFIG, target_modules=["fc1"]), "broken", "made for another base"),
    "tokenizer is no JSON": (lambda folder: (folder / "tokenizer.json").write_text("{"), "broken", "is broken"),
    "biases": (lambda folder: change_json(folder / CONFIG, bias="all"), "broken", "bias none"),
    "pickle": (lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"), "broken", f"{WEIGHTS} is missing"),
    "other base": (lambda folder: None, "broken", "size mismatch"),
    "NaN": (change_weights(lambda t: {k: v * float("nan") for k, v in t.items()}), "broken", "not finite"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_without_a_complete_adapter_it_starts_and_is_the_base(final, micro, tmp_path, how):
    harm, kind, reason = BROKEN[how]
    folder = shutil.copytree(final, tmp_path / "adapter")
    base = make_micro(tmp_path / "wide", hidden_size=48) if how == "other base" else micro
    harm(folder)
    running = app_engine.Engine(folder, str(base))
    assert running.kind == kind and reason in running.status and not running.tuned
    assert str(tmp_path) not in running.status, "a public page does not show paths of the machine"
    fresh = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    inputs = torch.arange(1, 20)[None]
    with torch.no_grad():
        assert torch.equal(running.model(inputs).logits, fresh(inputs).logits)
    assert ask(running, model="tuned", max_new_tokens=5, seed=0).finish_reason
    running.close()


@pytest.fixture
def command(capsys, monkeypatch):
    """The command in this process: exit code, and what was printed."""
    import app

    def run(*arguments) -> SimpleNamespace:
        code = 0
        try:
            app.main(app.parse_options([*map(str, arguments)]))
        except SystemExit as stop:
            code = stop.code
        return SimpleNamespace(code=code, **capsys.readouterr()._asdict())

    monkeypatch.delenv("APP_AUTH", raising=False)
    return run


def test_check_answers_and_ends(command, final, micro):
    done = command("--adapter", final, "--base", micro, "--check")
    assert done.code == 0, done.err
    assert "Tuned: base with the adapter grpo-final, LoRA on 12 modules" in done.out
    assert "tuned: " in done.out and "base: " in done.out and not done.err


@pytest.mark.parametrize(("arguments", "expected"), [
    (("--base", "/nope/base"), "the base model /nope/base cannot be loaded"),
    (("--port", "70000"), "cannot listen on 127.0.0.1:70000"),
    (("--port", "TAKEN"), "cannot listen on 127.0.0.1"),
    (("--host", "192.0.2.1"), "cannot listen on 192.0.2.1"),
    (("--adapter", "EMPTY", "--base", "MICRO", "--check"), "the adapter did not answer"),
    (("--adapter", "/nope"), "no folder /nope")])  # fmt: skip
def test_bad_commands(command, micro, tmp_path, arguments, expected):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        given = {"TAKEN": taken.getsockname()[1], "MICRO": micro, "EMPTY": tmp_path}
        done = command(*(given.get(argument, argument) for argument in arguments))
    assert done.code == 2 and expected in done.err


def test_the_password(command, monkeypatch, final, micro):
    """It reaches the server; half of one is refused, in a process of its own, and not repeated."""
    import app
    import gradio

    launched = {}
    monkeypatch.setattr(gradio.Blocks, "launch", lambda self, **given: launched.update(given))
    monkeypatch.setenv("APP_AUTH", "me:secret")
    done = command("--adapter", final, "--base", micro)
    assert done.code == 0 and launched["auth"] == ("me", "secret") == app.parse_options([]).auth
    assert "secret" not in done.out + done.err
    done = script("hf_app/app", APP_AUTH="nopassword")
    assert done.code == 2 and "APP_AUTH must be user:password" in done.err and "Traceback" not in done.err
    assert "nopassword" not in done.err
