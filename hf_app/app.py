"""Chat with a small language model tuned by GRPO, and see it beside its base.

  python app.py                                  # the adapter in model_adapters/, its base from the Hub
  python app.py --adapter DIR --base DIR         # other folders
  python app.py --check                          # load, answer one question, print what answers, and end

Listens on this machine only, unless --host or --share says otherwise. APP_AUTH=user:password asks for a password.
"""

import argparse
import html
import json
import os
import re
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

DEFAULTS = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "TRANSFORMERS_VERBOSITY": "error",
            "GRADIO_TEMP_DIR": os.path.expanduser("~/.cache/gradio")}  # /tmp/gradio may be another user's  # fmt: skip
os.environ |= DEFAULTS | dict(os.environ)
local = f"{os.environ.get('no_proxy') or os.environ.get('NO_PROXY') or 'localhost'},127.0.0.1,localhost"  # Gradio calls itself
os.environ |= {"no_proxy": local, "NO_PROXY": local}
warnings.filterwarnings("ignore", category=FutureWarning)


def fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", metavar="DIR", help="folder of the adapter (default: model_adapters beside this file)")
    parser.add_argument("--base", default="", metavar="NAME", help="Hub id or folder (default: the one the adapter names)")
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1; 0.0.0.0 for the whole network)")
    parser.add_argument("--port", type=int, help="(default: the first free one from 7860 on)")
    parser.add_argument("--share", action="store_true", help="a public link through Gradio's servers, for a week")
    parser.add_argument("--check", action="store_true", help="load, answer one question, print what answers, and end")
    options = parser.parse_args(argv)
    if options.adapter and not Path(options.adapter).is_dir():
        fail(f"there is no folder {options.adapter}. Give an adapter's, or leave --adapter out.")
    user, _, password = os.environ.get("APP_AUTH", "").partition(":")
    options.auth = (user, password) if user else None
    if bool(user) != bool(password):
        fail("APP_AUTH must be user:password, both not empty.")
    if (options.port is not None or options.host) and not options.check:
        host, port = options.host or "127.0.0.1", options.port or 0
        try:
            socket.create_server((host.strip("[]"), port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
        except (OSError, OverflowError) as error:
            fail(f"cannot listen on {host}:{port}: {error}. Choose another --host or --port (1 to 65535), or leave them out.")
    return options


if __name__ == "__main__":
    OPTIONS = parse_options()  # here, because what comes next takes seconds

try:
    import spaces  # ZeroGPU's, only there; it must come before torch
except ImportError:
    spaces = None
ZERO_GPU = spaces is not None and spaces.config.Config.zero_gpu  # elsewhere the package does nothing

import gradio as gr
import torch
import transformers
from engine import BASE, LIMITS, MAX_CHARACTERS, MAX_SECONDS, RUNNING, TUNED, Answer, BadInput, Engine, NoBase, Settings

NOTE = '<div class="note">'  # cannot stand in an escaped text
EXAMPLES = [
    "Explain the theory of relativity to a 5 year old.",
    "Write a python function to calculate fibonacci numbers.",
    "What are the benefits of exercise?",
    "Tengo un problema con mi coche, hace un ruido extraño.",
]
GPU_START = 10  # seconds that ZeroGPU may take to bring the model onto its GPU
ONE_AT_A_TIME = {"concurrency_id": "model", "concurrency_limit": 1}  # one queue for chat, comparison and API
MAX_WAITING = 32  # people in the queue; more are told to come back

engine: Engine  # set by main, before the page opens; ZeroGPU's processes are forked with it


def gpu_seconds(messages: list[dict], model: str, settings: Settings) -> int:
    """How long ZeroGPU reserves its GPU for an answer, at 20 tokens a second. A visitor with less left is refused."""
    return GPU_START + settings.max_new_tokens // 20


def answer_seconds(settings: Settings) -> float:
    """How long an answer may take: on ZeroGPU within what is reserved."""
    return gpu_seconds([], TUNED, settings) - GPU_START // 2 if ZERO_GPU else MAX_SECONDS


def generate(messages: list[dict], model: str, settings: Settings) -> Iterator[Answer]:
    """On ZeroGPU this runs in a process of its own, which is killed after the reserved time; only a gr.Error keeps its text."""
    with shown_as_error():
        try:
            yield from engine.stream(messages, model, settings, answer_seconds(settings))
        except (MemoryError, torch.OutOfMemoryError):
            raise BadInput("There is not enough memory for this. Ask for a shorter answer.") from None


if spaces:
    generate = spaces.GPU(duration=gpu_seconds)(generate)


def answer(messages: list[dict], model: str, **given) -> Iterator[Answer]:
    """The answer as it grows. Raises BadInput for what the visitor can change."""
    settings = engine.settings(**given)
    engine.prompt(messages, settings.max_new_tokens)  # before a GPU is asked for
    yield from generate(messages, model, settings)


@contextmanager
def shown_as_error() -> Iterator[None]:
    """BadInput as a readable error, on the page and through the API; Gradio reads HTML in it."""
    try:
        yield
    except BadInput as error:
        raise gr.Error(html.escape(str(error), quote=False), title="Not like this", print_exception=False) from None


def ask(
    prompt: str,
    model: str = TUNED,
    max_new_tokens: int | None = None,
    sample: bool | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int = -1,
    stop: bool = True,
) -> Iterator[str]:
    """Answers one prompt; streams the text so far, the last of which is the whole answer.

    model: "tuned" or "base". max_new_tokens, sample, temperature, top_p: the adapter's own where left out; sample: false takes
    the likeliest token each time. seed: -1 takes a new one. stop: at the end of the first answer; false lets the model run on,
    as a base model does.
    """
    settings = sampling_settings((max_new_tokens, sample, temperature, top_p, seed, stop))
    with shown_as_error():
        for so_far in answer([{"role": "user", "content": prompt}], model, **settings):
            yield so_far.text


def plain(content: str | list) -> str:
    """The text of a chat message: a plain string from the API, a list of blocks from the page."""
    return content if isinstance(content, str) else "".join(block.get("text", "") for block in content)


def to_page(message: dict) -> dict:
    """A message with its text escaped, and the line about it, `metadata["log"]`, below."""
    line = (message.get("metadata") or {}).get("log")
    text = html.escape(plain(message["content"])) + (note(line) if line else "")
    # A block, not a string: of a string, Gradio removes the indentation.
    return {"role": message["role"], "content": [{"type": "text", "text": text}], "metadata": {}}


def from_page(message: dict) -> dict:
    """What `to_page` was given."""
    text, _, line = plain(message["content"]).partition(NOTE)
    metadata = {"log": html.unescape(line.removesuffix("</div>"))} if line else {}
    return {"role": message["role"], "content": html.unescape(text), "metadata": metadata}


def show_exact_text(chatbot: gr.Chatbot) -> gr.Chatbot:
    """gr.Chatbot reads HTML in messages even with render_markdown=False: escape on the way to the page, undo on the way back.
    By wrapping, not in a subclass: Gradio writes an app.pyi beside any file that defines a component."""
    to, back = chatbot.postprocess, chatbot.preprocess
    chatbot.postprocess = lambda messages: to([to_page(message) for message in messages or []])
    chatbot.preprocess = lambda payload: [from_page(message) for message in back(payload) or []]
    return chatbot


BUSY = gr.update(interactive=False, submit_btn=False, stop_btn=True)  # the question's box, while an answer is being written
READY = gr.update(interactive=True, submit_btn=True, stop_btn=False)


def submit(question: str, history: list[dict]) -> tuple[dict, list[dict]]:
    with shown_as_error():
        engine.check_question(question)
    return {**BUSY, "value": ""}, [*history, {"role": "user", "content": question}]


def submit_example(history: list[dict], chosen: gr.SelectData) -> tuple[dict, list[dict]]:
    return submit(chosen.value["text"], history)


def retry(history: list[dict], chosen: gr.RetryData) -> tuple[dict, list[dict]]:
    return BUSY, history[: chosen.index + 1]


def undo(history: list[dict], chosen: gr.UndoData) -> tuple[str, list[dict]]:
    return history[chosen.index]["content"], history[: chosen.index]  # the question goes back into the box


def chat(history: list[dict], earlier: bool, *sampling_params) -> Iterator[list[dict]]:
    """The conversation with the answer to its last question, as that grows; or with the error in the answer's place."""
    messages, so_far = past(history) + history[-1:] if earlier else history[-1:], Answer()
    try:
        for so_far in answer(messages, TUNED, **sampling_settings(sampling_params)):
            yield [*history, {"role": "assistant", "content": so_far.text, "metadata": {"log": so_far.summary()}}]
    except (BadInput, gr.Error) as error:
        log = f"Not answered{' to the end' * bool(so_far.text)}. {error_text(error)}"
        yield [*history, {"role": "assistant", "content": so_far.text, "metadata": {"log": log}}]


def error_text(error: BadInput | gr.Error) -> str:
    """ZeroGPU says with a gr.Error, in HTML, that a visitor's time is used up; ours is escaped for the page."""
    if isinstance(error, BadInput):
        return str(error)
    text = html.unescape(re.sub(r"<[^>]+>", "", str(error.message)))
    return text + " Log in to Hugging Face for more of it, or run the app on your own machine." * ("quota" in text)


def past(history: list[dict]) -> list[dict]:
    """The questions before the last, and their answers; one without an answer is passed over."""
    roles = [message["role"] for message in history]
    pairs = [history[i : i + 2] for i in range(len(history) - 1) if roles[i : i + 2] == ["user", "assistant"]]
    return [message for pair in pairs if pair[1]["content"] for message in pair]


def finish(history: list[dict]) -> tuple[list[dict], dict]:
    """After an answer, an error or Stop: the line below a part that was not finished says so, and the box is ready."""
    if history and (log := history[-1].get("metadata", {}).get("log", "")).endswith(RUNNING):
        history[-1]["metadata"]["log"] = log.removesuffix(RUNNING) + "stopped"
    return history, READY


def compare(question: str, *sampling_params) -> Iterator[list[str]]:
    """Base, then tuned, on the same question with the same seed."""
    settings = sampling_settings(sampling_params)
    panes = {model: ("", note(f"waits for its turn {RUNNING}")) for model in (BASE, TUNED)}
    with shown_as_error():
        yield [*panes[BASE], *panes[TUNED]]  # the answers to the question before go
        for model in panes:
            for so_far in answer([{"role": "user", "content": question}], model, **settings):
                panes[model], settings["seed"] = (so_far.text, note(so_far.summary())), so_far.seed
                yield [*panes[BASE], *panes[TUNED]]


def finish_panes(*notes: str) -> list[str]:
    return [note("stopped") if html.unescape(line).endswith(f"{RUNNING}</div>") else line for line in notes]


def note(line: str) -> str:
    return f"{NOTE}{html.escape(line)}</div>"


def sampling_settings(sampling_params: tuple) -> dict:
    """The parameters' values, in the page's order, by their names. A cleared number field means: the default."""
    names = ("max_new_tokens", "sample", "temperature", "top_p", "seed", "stop")
    return {name: value for name, value in zip(names, sampling_params, strict=True) if value is not None}


CSS = """
.gradio-container { width: 100% !important; max-width: 1080px !important; margin: 0 auto !important; }
.status { display: flex; gap: .6em; align-items: baseline; line-height: 1.5; }
.status .dot { flex: none; width: .7em; height: .7em; border-radius: 50%; }
.status.tuned .dot { background: #16a34a; } .status.base .dot { background: #d97706; }
.status.broken .dot { background: #dc2626; } .status a { margin-left: .9em; }
.status small, .note { color: color-mix(in srgb, var(--body-text-color) 68%, transparent); font-size: .85em; }
.note { min-height: 1.4em; margin-top: .4em; white-space: normal; }
#chat .md { white-space: pre-wrap; overflow-wrap: anywhere; } footer .divider { display: none !important; }
#card { overflow-x: auto; } #card th, #card td { overflow-wrap: normal; word-break: normal; }
"""


def status_line() -> str:
    on_hub = not Path(engine.base).exists()
    link = f'<a href="https://huggingface.co/{engine.base}" target="_blank" rel="noopener">{engine.base}</a>' * on_hub
    return (
        f'<div class="status {engine.kind}"><span class="dot"></span><span>{html.escape(engine.status)}'
        f"<br><small>{html.escape(engine.device)}{link}</small></span></div>"
    )


def make_page() -> gr.Blocks:
    own = engine.settings()
    title = engine.base_name.split("/")[-1] + " GRPO" * engine.tuned
    with gr.Blocks(title=title, analytics_enabled=False) as page:
        gr.Markdown(f"# {html.escape(title)}")
        gr.HTML(status_line(), elem_id="status", padding=False)
        parameters = gr.Accordion("Parameters", open=False, render=False)
        with parameters, gr.Row():
            with gr.Column(min_width=280):
                length = gr.Slider(1, engine.longest_answer, own.max_new_tokens, step=1, label="Longest answer, in tokens")
                stop = gr.Checkbox(True, label="Stop at the first answer", info="off: see how the model runs on")
                earlier = gr.Checkbox(True, label="Use earlier turns", info="Chat: the model sees the conversation so far")
            with gr.Column(min_width=280):
                sample = gr.Checkbox(own.sample, label="Sampling", info="off: always the likeliest token")
                temperature = gr.Slider(*LIMITS["temperature"], own.temperature, step=0.05, label="Temperature")
                top_p = gr.Slider(*LIMITS["top_p"], own.top_p, step=0.05, label="Top-p")
                seed = gr.Number(-1, precision=0, minimum=-1, maximum=2**31 - 1, label="Seed", info="-1: a new one each time")
        sampling_params = [length, sample, temperature, top_p, seed, stop]
        with gr.Tab("Chat"):
            conversation([earlier, *sampling_params])
        with gr.Tab("Compare"):
            if engine.tuned:
                comparison(sampling_params)
            else:
                gr.Markdown("There is nothing to compare: " + html.escape(engine.status))
        with gr.Tab("About"):
            about()
        parameters.render()
        gr.api(ask, api_name="ask", **ONE_AT_A_TIME)
    return page


def conversation(parameters: list) -> None:
    exact = {"render_markdown": False, "latex_delimiters": [], "allow_tags": False}
    look = {"height": "55vh", "min_height": 280, "show_label": False, "buttons": []}
    chatbot = gr.Chatbot(examples=[{"text": example} for example in EXAMPLES], elem_id="chat", **exact, **look)
    show_exact_text(chatbot)
    look = {"label": "Question", "show_label": False, "placeholder": "Ask something", "max_lines": 8}
    box = gr.Textbox(submit_btn=True, elem_id="ask", **look)
    at_once = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    asked = [
        # Through the queue, though it has nothing to wait for: the page shows the errors of queued events only.
        box.submit(submit, [box, chatbot], [box, chatbot], **{**at_once, "queue": True}),
        chatbot.example_select(submit_example, chatbot, [box, chatbot], **at_once),
        chatbot.retry(retry, chatbot, [box, chatbot], **at_once),
    ]
    answered = [
        event.success(chat, [chatbot, *parameters], chatbot, show_progress="full", api_visibility="private", **ONE_AT_A_TIME)
        for event in asked
    ]
    for event in answered:
        for ended in (event.then, event.failure):  # `then` alone would leave the box shut after an error
            ended(finish, chatbot, [chatbot, box], **at_once)
    for stop in (box.stop, chatbot.clear):
        stop(None, cancels=answered, api_visibility="private")
    chatbot.undo(undo, chatbot, [box, chatbot], **at_once)


def comparison(sampling_params: list) -> None:
    question = gr.Textbox(label="One question to both, with the same seed", value=EXAMPLES[2], max_lines=8)
    with gr.Row():
        go = gr.Button("Compare", variant="primary", min_width=100, elem_id="compare")
        halt = gr.Button("Stop", min_width=100, elem_id="halt")
    panes = []
    with gr.Row():
        for name in ("Base", "Tuned"):
            with gr.Column(min_width=300):
                look = {"lines": 8, "max_lines": 24, "interactive": False, "buttons": ["copy"]}
                panes += [gr.Textbox(label=name, elem_id=name.lower(), **look), gr.HTML(note(""), padding=False)]
    options = {"show_progress": "minimal", "api_visibility": "private", **ONE_AT_A_TIME}
    running = gr.on([go.click, question.submit], compare, [question, *sampling_params], panes, **options)
    for ended in (running.then, running.failure):
        ended(finish_panes, panes[1::2], panes[1::2], queue=False, show_progress="hidden", api_visibility="private")
    halt.click(None, cancels=[running], api_visibility="private")


def about() -> None:
    """The adapter's own model card, the prompt as sent, limits and privacy."""
    if card := model_card(engine.adapter / "README.md") if engine.tuned else "":
        gr.Markdown(card, elem_id="card")
        if (curve := engine.adapter / "reward.png").is_file():
            gr.Image(str(curve), show_label=False, buttons=[], container=False)
    prompt, _ = engine.prompt([{"role": "user", "content": EXAMPLES[2]}], engine.settings().max_new_tokens)
    gr.Textbox(prompt, label="A prompt, as the model sees it", lines=2, interactive=False)
    stops = ", ".join(json.dumps(stop.strip()) for stop in engine.defaults.stop_strings or [])
    gr.Markdown(
        f"""
An answer ends at the model's end token{f", or before the first of: {stops}" if stops else ""}. Switch
*Stop at the first answer* off to see what a model writes after that.

**Limits.** {MAX_CHARACTERS:,} characters of question; {engine.context:,} tokens of question and answer together, at most
{engine.longest_answer:,} of them answer; {answer_seconds(Settings(engine.longest_answer)):.0f} seconds an answer;
one answer at a time, {MAX_WAITING} waiting. A small model states false things fluently; tuning is for its reward alone.

**Privacy.** Nothing you write is stored or sent on: no log, no analytics. On a Space it passes through Hugging Face's servers.
"""
    )


def model_card(path: Path) -> str:
    """The text of a model card, without its YAML header, and without what would fetch an image or be read as HTML."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    return re.sub(r"!\[.*?\]\(.*?\)", "", text).replace("![", "[").replace("<", "&lt;")


def main(options: argparse.Namespace) -> None:
    global engine
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    try:
        engine = Engine(Path(options.adapter or Path(__file__).resolve().parent / "model_adapters"), options.base)
    except NoBase as error:
        fail(str(error))
    print(engine.status, engine.device, sep="\n", flush=True)
    try:
        if options.check:
            run_check(strict=bool(options.adapter))
        else:
            page = make_page().queue(max_size=MAX_WAITING, default_concurrency_limit=1, api_open=False)
            where = {"server_name": options.host, "server_port": options.port, "share": options.share, "auth": options.auth}
            # The page keeps nothing in a session, and each caller of the API opens one.
            rest = {"ssr_mode": False, "state_session_capacity": 100, "footer_links": ["api"], "run_history": False}
            fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
            page.launch(theme=gr.themes.Default(primary_hue="indigo", **fonts), css=CSS, **where, **rest)
    finally:
        engine.close()


def run_check(strict: bool) -> None:
    """Answers one question; exit code 2 where an adapter was asked for and is not what answered."""
    for model in (TUNED, BASE) if engine.tuned else (BASE,):
        *_, last = engine.stream([{"role": "user", "content": EXAMPLES[2]}], model, engine.settings(seed=0))
        print(f"\n{model}: {last.text}\n  ({last.summary()})")
    if engine.kind == "broken" or (strict and not engine.tuned):
        fail("the adapter did not answer; see above.")


if __name__ == "__main__":
    main(OPTIONS)
