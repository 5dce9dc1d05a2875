"""One model in memory, two voices: the base with its adapter on (tuned) or off (base). Loads, prompts, generates, trims.

Knows nothing of the page and nothing of the project around it: what the model needs stands in the standard files of the
adapter folder (adapter_config.json, the tokenizer with its chat template, generation_config.json).
"""

import copy
import json
import queue
import secrets
import threading
import time
import unicodedata
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

PHI2 = "microsoft/phi-2"

# For a base model without an adapter, which has neither: the question-answer format of Phi-2's model card, and where Phi-2
# runs on after its answer. With an adapter, its own template and stop strings rule.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{{ 'Instruct: ' + message['content'] | trim + '\\n' }}
{%- elif message['role'] == 'assistant' -%}{{ 'Output: ' + message['content'] | trim }}{{ '' if loop.last else '\\n' }}
{%- else -%}{{ message['content'] | trim + '\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Output:' }}{%- endif -%}"""
STOP_STRINGS = ["\nInstruct:", "\nOutput:", "\nUser:", "\nHuman:", "\nExercise:", *(f"\nExercise {n}" for n in range(1, 10))]

MAX_CHARACTERS = 20_000  # of a question; far over any context here, and cheap to refuse
MAX_NEW_TOKENS = 512  # of an answer, where the context allows it
MAX_SECONDS = 180.0  # of an answer: a Phi-2 on two CPU cores writes about 2 tokens a second
TEMPERATURE, TOP_P = (0.05, 2.0), (0.05, 1.0)  # lowest and highest
TUNED, BASE = "tuned", "base"
RUNNING = "…"


class BadInput(ValueError):
    """Something the asker can mend; the text says what was given, what the rule is and what to do."""


class NoBase(Exception):
    """There is no model to answer with."""


class BadAdapter(Exception):
    """The adapter cannot be used; the text is the reason."""


@dataclass(frozen=True)
class Settings:
    """How to draw an answer. `check` says what each may be."""

    max_new_tokens: int = 256
    sample: bool = True  # draw from the distribution, or always take the likeliest token
    temperature: float = 0.7
    top_p: float = 0.9
    seed: int = -1  # -1 draws a new one, which the answer tells
    stop: bool = True  # at the end of the first answer, or let the model run on

    def check(self, longest: int) -> None:
        """Raises BadInput for a value out of range; `longest` is the most tokens an answer may have."""
        limits = {"max_new_tokens": (1, longest), "temperature": TEMPERATURE, "top_p": TOP_P, "seed": (-1, 2**31 - 1)}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            whole = isinstance(low, int)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not low <= value <= high or (whole and value != int(value)):  # NaN is in no range, nor infinity
                kind = "a whole number" if whole else "a number"
                raise BadInput(f"{name} is {value!r}, but it takes {kind} from {low} to {high}.")
        for name in ("sample", "stop"):
            if not isinstance(getattr(self, name), bool):
                raise BadInput(f"{name} is {getattr(self, name)!r}, but it takes true or false.")


@dataclass(frozen=True)
class Answer:
    """An answer so far; `why` says why it ended, and is empty while it is being written."""

    text: str = ""
    tokens: int = 0  # of `text`
    seconds: float = 0.0
    speed: float = 0.0  # tokens drawn per second
    seed: int = 0
    why: str = ""
    left_out: int = 0  # earlier messages that the context had no room for

    def summary(self) -> str:
        """`87 tokens · 9.1 tokens/s · ended by itself · seed 7`; while it is being written, `12 tokens · 9.0 tokens/s · …`"""
        parts = [f"{self.tokens} token{'' if self.tokens == 1 else 's'}", f"{self.speed:.1f} tokens/s", self.why or RUNNING]
        parts += [f"seed {self.seed}"] if self.why else []
        parts += [f"{self.left_out} earlier messages left out"] if self.left_out else []
        return " · ".join(parts)


@dataclass(frozen=True)
class Status:
    """What answers. `kind` is tuned, base (there is no adapter) or broken (there is one, not loaded)."""

    kind: str
    text: str
    device: str


class _Tokens(BaseStreamer):
    """What `generate` draws, as a queue of token ids; None is the end."""

    def __init__(self):
        self.queue: queue.Queue[int | None] = queue.Queue()
        self._prompt_is_next = True

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_is_next:
            self.queue.put(int(value))
        self._prompt_is_next = False

    def end(self) -> None:
        """The thread that generates says when it is done, also where `generate` failed."""


class _Brake(StoppingCriteria):
    """Stops `generate` at the next token once nobody listens any more, or when the time is up."""

    def __init__(self, seconds: float, *stops: threading.Event):
        self.seconds, self.stops = seconds, stops
        self.started = time.perf_counter()
        self.late = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_) -> torch.Tensor:
        self.late = time.perf_counter() - self.started > self.seconds
        stop = self.late or any(stop.is_set() for stop in self.stops)
        return torch.full((len(input_ids),), stop, device=input_ids.device)


def trim(text: str, stop_strings: list[str], finished: bool) -> tuple[str, str]:
    """The answer in a decoded completion: what stands before the first stop string, and that string.

    While it is being written, an end that could still become a stop string or a whole character is held back.
    """
    found = min(((i, stop) for stop in stop_strings if (i := text.find(stop)) >= 0), default=None)
    if found:
        return text[: found[0]].strip(), found[1].strip()
    if not finished:
        text = text.rstrip("�")
        held = (n for stop in stop_strings for n in range(1, len(stop)) if text.endswith(stop[:n]))
        text = text[: len(text) - max(held, default=0)]
    return text.strip(), ""


def clean(text: str) -> str:
    """A question without control characters (line breaks and tabs stay) and lone surrogates, which no tokenizer takes."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs")).strip()


class Engine:
    """A base model, its tokenizer, and the adapter if there is one.

    Args:
        adapter: folder of a PEFT adapter; where it is not there or cannot be used, the base answers and `status` says why.
        base: Hub id or folder of the base; default: the one that the adapter names, else Phi-2.

    Raises NoBase where no base can be loaded.
    """

    def __init__(self, adapter: Path, base: str = ""):
        self.adapter = Path(adapter)
        self._lock = threading.Lock()  # PEFT's switch between tuned and base is the model's, so it is everybody's
        self._closing = threading.Event()
        self._run: _Run | None = None  # the latest
        problem, config = None, None
        try:
            config = _look_at(self.adapter)
        except BadAdapter as error:
            problem = str(error)
        named = config.base_model_name_or_path if config else None
        self.base = base or named or PHI2
        self.revision = config.revision if config and self.base == named else None
        self._load_base()
        if config:
            try:
                self._load_adapter()
            except BadAdapter as error:
                problem = str(error)
            if problem:  # PEFT may have changed the base before it failed
                self.model = None  # no two at once: memory may have room for one
                self._load_base()
        self.model.to(self._device)  # after all is loaded: on ZeroGPU, CUDA is said to be there and comes with the first call
        self.tuned = isinstance(self.model, PeftModel)
        self.status = self._status(problem)

    def _load_base(self) -> None:
        where = {} if Path(self.base).exists() else {"revision": self.revision or "main"}
        for cached in (True, False):  # a model in the cache needs no network, and no wait for one that is not there
            try:
                config = AutoConfig.from_pretrained(self.base, local_files_only=cached, **where)
                with torch.device("meta"):
                    size = AutoModelForCausalLM.from_config(config).num_parameters()
                self._device, dtype = _device_and_dtype(size)
                options = {"dtype": dtype, "attn_implementation": "sdpa", "local_files_only": cached, **where}
                options["use_safetensors"] = True  # a pickle may run code
                self.model = AutoModelForCausalLM.from_pretrained(self.base, **options).eval()
                self.tokenizer = AutoTokenizer.from_pretrained(self.base, local_files_only=cached, **where)
                break
            except Exception as error:  # transformers, safetensors and torch raise a dozen kinds for what they cannot read
                if cached and where:
                    continue
                gone = Path(self.base).is_absolute() and not Path(self.base).exists()
                reason = "the folder is gone" if gone else _first_line(error)
                offline = "" if gone else " Without network a Hub model must be in the cache."
                raise NoBase(
                    f"the base model {self.base} cannot be loaded: {reason}\n"
                    f"  Give a Hub id or a local folder: --base.{offline}"
                ) from None
        self.tokenizer.chat_template = self.tokenizer.chat_template or CHAT_TEMPLATE
        # Most chat models name several end tokens; a Phi-2 runs on, which others do not.
        self.ends = _ends(self.tokenizer.eos_token_id, self.model.generation_config.eos_token_id)
        stops = STOP_STRINGS if self.tokenizer.chat_template == CHAT_TEMPLATE else None
        self.defaults = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.9, stop_strings=stops)

    def _load_adapter(self) -> None:
        try:
            tokenizer = self.tokenizer
            if (self.adapter / "tokenizer.json").is_file():
                tokenizer = AutoTokenizer.from_pretrained(str(self.adapter))
                tokenizer.chat_template = tokenizer.chat_template or self.tokenizer.chat_template
            defaults = self.defaults
            if (self.adapter / "generation_config.json").is_file():
                defaults = GenerationConfig.from_pretrained(str(self.adapter))
            with safe_open(self.adapter / "adapter_model.safetensors", "pt") as weights:
                saved = set(weights.keys())
                finite = all(weights.get_tensor(key).isfinite().all() for key in saved)
            model = PeftModel.from_pretrained(self.model, str(self.adapter), torch_device="cpu").eval()
            expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
        except Exception as error:  # PEFT, safetensors, tokenizers and json raise a dozen kinds
            reason = _first_line(error).replace(str(self.adapter), self.adapter.name)  # a public page shows no paths
            raise BadAdapter(f"it does not fit {self.base_name}, or is broken: {reason}") from None
        self.layers = sum(hasattr(module, "lora_A") for module in model.modules())
        if not finite:
            raise BadAdapter("it holds weights that are no finite numbers: its training diverged")
        missing, unexpected = expected - saved, saved - expected - model.state_dict().keys()
        if missing or unexpected or not self.layers:  # PEFT passes over both
            raise BadAdapter(
                f"{len(unexpected)} of its weights have no place in {self.base_name}, and {len(missing)} are missing: made for "
                "another base, or saved otherwise"
            )
        self.model, self.tokenizer, self.defaults = model, tokenizer, defaults

    def _status(self, problem: str | None) -> Status:
        name = self.adapter.name
        if self.tuned:
            steps = read_json(self.adapter / "run.json").get("steps")
            done = f", {steps:,} steps" if isinstance(steps, int) else ""
            found = ("tuned", f"Tuned: {self.base_name} with adapter {name}, {self.layers} LoRA layers{done}")
        elif problem:
            found = ("broken", f"Base model only: {self.base_name}. Adapter {name} found, not loaded: {problem}")
        else:
            found = ("base", f"Base model only: {self.base_name}. No adapter in {name}/")
        return Status(*found, self._describe_device())

    def _describe_device(self) -> str:
        dtype = str(self.model.dtype).removeprefix("torch.")
        if self.model.device.type == "cuda":
            return f"{torch.cuda.get_device_name()}, {dtype}"
        slow = ", about 2 tokens/s on two cores: long answers take minutes"
        return f"CPU, {dtype}{slow if self.model.num_parameters() > 1e9 else ''}"

    def close(self) -> None:
        """Ends what is being generated, and waits for it: torch must not be unloaded under a running thread."""
        self._closing.set()
        if self._run:
            self._run.join(timeout=10)

    @property
    def base_name(self) -> str:
        """The Hub id, or the name of a local folder without the path to it."""
        return Path(self.base).name if Path(self.base).exists() else self.base

    @property
    def context(self) -> int:
        """The longest text that the model can hold, prompt and answer together, in tokens."""
        return getattr(self.model.config, "max_position_embeddings", None) or 2048

    @property
    def longest_answer(self) -> int:
        """The most tokens an answer may have; half of the context is for the question."""
        return min(MAX_NEW_TOKENS, self.context // 2)

    def settings(self, **given) -> Settings:
        """The adapter's own way to sample, with `given` over it. Raises BadInput for a value out of range."""
        own = Settings(
            max_new_tokens=min(self.defaults.max_new_tokens or 256, self.longest_answer),
            sample=bool(self.defaults.do_sample),
            temperature=_within(self.defaults.temperature or 0.7, TEMPERATURE),
            top_p=_within(self.defaults.top_p or 1.0, TOP_P),
        )
        settings = replace(own, **given)
        settings.check(self.longest_answer)
        whole = {name: int(getattr(settings, name)) for name in ("max_new_tokens", "seed")}  # 64.0 is 64
        return replace(settings, **whole)

    def check_question(self, question: str) -> None:
        """Raises BadInput for a question that is none, or far too long."""
        if not isinstance(question, str):
            raise BadInput(f"The prompt is {question!r}, but it takes a text.")
        if len(question) > MAX_CHARACTERS:
            raise BadInput(f"The question has {len(question):,} characters, and {MAX_CHARACTERS:,} are the limit. Shorten it.")
        if not clean(question):
            raise BadInput("The question is empty. Write something to answer.")

    def prompt(self, messages: list[dict], max_new_tokens: int) -> tuple[str, int]:
        """The prompt as the model sees it, and how many of the earlier messages had no room (the oldest go first).

        Raises BadInput where the last message is empty, or too long by itself.
        """
        self.check_question(messages[-1]["content"])
        messages = [{"role": message["role"], "content": clean(message["content"])} for message in messages]
        room = self.context - max_new_tokens
        for left_out in range(0, len(messages), 2):  # a question and its answer at a time
            text = self.tokenizer.apply_chat_template(messages[left_out:], tokenize=False, add_generation_prompt=True)
            length = len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            if length <= room:
                return text, left_out
        raise BadInput(
            f"The question has {length:,} tokens, and there is room for {room:,}: the model holds {self.context:,}, and the "
            f"answer may take {max_new_tokens:,} of them. Shorten it, or ask for a shorter answer."
        )

    def stream(
        self, messages: list[dict], model: str = TUNED, settings: Settings | None = None, seconds: float | None = None
    ) -> Iterator[Answer]:
        """Answers the last of `messages` ({"role", "content"}, oldest first); yields the answer as it grows.

        Yields at least five times a second, so that whoever listens can leave at once: closing this ends the generation at
        its next token; so do `seconds` (MAX_SECONDS). Where there is no adapter, the base answers. Raises BadInput before the
        first answer.
        """
        settings = settings or self.settings()
        if model not in (TUNED, BASE):
            raise BadInput(f"model is {model!r}, but it takes {TUNED!r} or {BASE!r}.")
        text, left_out = self.prompt(messages, settings.max_new_tokens)
        seed = settings.seed if settings.seed >= 0 else secrets.randbelow(2**31)
        stop, tokens = threading.Event(), _Tokens()
        run = self._run = _Run(self, text, model, replace(settings, seed=seed), stop, tokens, seconds or MAX_SECONDS)
        run.start()
        stops = (self.defaults.stop_strings or []) if settings.stop else []
        ids: list[int] = []
        answer = Answer(seed=seed, left_out=left_out)
        try:
            drawn: list[int | None] = []
            while None not in drawn and not answer.why:
                drawn = _take(tokens.queue)
                ids += [token for token in drawn if token is not None]
                answer = self._answer(ids, stops, run, answer, finished=False)
                if not answer.why:
                    yield answer
            if run.error:
                raise run.error
            yield answer if answer.why else self._answer(ids, stops, run, answer, finished=True)
        finally:
            stop.set()

    def _answer(self, ids: list[int], stops: list[str], run: "_Run", so_far: Answer, finished: bool) -> Answer:
        text, met = trim(self.tokenizer.decode(ids, skip_special_tokens=True), stops, finished)
        seconds = time.perf_counter() - run.brake.started
        why = ""
        if met:
            why = f"stopped before it ran on into {met!r}"
        elif finished:
            ended = ids and ids[-1] in run.end_ids
            why = "ended by itself" if ended else "cut off at the time limit" if run.brake.late else "cut off at the limit"
        count = len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return replace(so_far, text=text, tokens=count, seconds=seconds, speed=len(ids) / max(seconds, 1e-9), why=why)


def _take(tokens: queue.Queue) -> list[int | None]:
    """All that is there; waits for the first of it, but not for long."""
    taken = []
    try:
        taken.append(tokens.get(timeout=0.2))
        while True:
            taken.append(tokens.get_nowait())
    except queue.Empty:
        return taken


class _Run(threading.Thread):
    """One call of `generate`. It holds the model's lock itself, so that one who leaves need not wait for its end."""

    def __init__(self, engine: Engine, text: str, model: str, settings: Settings, stop: threading.Event, tokens: _Tokens,
                 seconds: float):  # fmt: skip
        super().__init__(daemon=True)
        self.engine, self.text, self.adapter_on, self.settings = engine, text, model == TUNED, settings
        self.stop, self.tokens = stop, tokens
        self.brake = _Brake(seconds, stop, engine._closing)
        self.error: Exception | None = None
        self.end_ids = _ends(*engine.ends, engine.defaults.eos_token_id)

    def run(self) -> None:
        engine, settings = self.engine, self.settings
        config = copy.deepcopy(engine.defaults)
        config.update(max_new_tokens=settings.max_new_tokens, do_sample=settings.sample, eos_token_id=self.end_ids)
        config.update(pad_token_id=self.end_ids[0], stop_strings=None)  # `trim` stops, and knows what to hold back
        if settings.sample:
            config.update(temperature=settings.temperature, top_p=settings.top_p)
        else:
            config.update(temperature=None, top_p=None, top_k=None)
        try:
            with engine._lock:
                if self.stop.is_set():
                    return
                off = engine.tuned and not self.adapter_on
                inputs = engine.tokenizer(self.text, return_tensors="pt", add_special_tokens=False).to(engine.model.device)
                inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
                torch.manual_seed(settings.seed)
                self.brake.started = time.perf_counter()
                with engine.model.disable_adapter() if off else nullcontext():
                    engine.model.generate(
                        **inputs, generation_config=config, streamer=self.tokens, stopping_criteria=[self.brake]
                    )
        except Exception as error:  # told to whoever listens, in their thread
            self.error = error
        finally:
            self.tokens.queue.put(None)


def _device_and_dtype(size: int) -> tuple[torch.device, torch.dtype]:
    """bfloat16 where the card has it or memory is short; Phi-2 overflows in float16, so that is never chosen."""
    if torch.cuda.is_available():
        ampere = torch.cuda.get_device_capability() >= (8, 0)
        return torch.device("cuda"), torch.bfloat16 if ampere else torch.float32
    # On two CPU cores a Phi-2 is twice as fast in bfloat16 and takes 6 GB instead of 12; a tiny model gains nothing.
    return torch.device("cpu"), torch.bfloat16 if size > 1e9 else torch.float32


def _ends(*named: int | list[int] | None) -> list[int]:
    """The end tokens that any of `named` is or holds, each once."""
    return list(dict.fromkeys(end for one in named if one is not None for end in (one if isinstance(one, list) else [one])))


def _within(value: float, limits: tuple[float, float]) -> float:
    return min(max(value, limits[0]), limits[1])


def _look_at(folder: Path) -> PeftConfig | None:
    """The config of the adapter in `folder`, None where there is no adapter at all. Raises BadAdapter."""
    if not folder.is_dir() or not any(path for path in folder.iterdir() if not path.name.startswith(".")):
        return None
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        path = folder / name
        if not path.is_file() or not path.stat().st_size:
            raise BadAdapter(f"{name} is missing or empty")
        with path.open("rb") as file:
            if file.read(30).startswith(b"version https://git-lfs"):
                raise BadAdapter(f"{name} is a Git LFS pointer, not the file itself (git lfs pull fetches it)")
    try:
        config = PeftConfig.from_pretrained(str(folder))
        if config.peft_type != "LORA":
            raise BadAdapter(f"it is an adapter of the kind {config.peft_type}, and only LoRA is read here")
        return config
    except BadAdapter:
        raise
    except Exception as error:
        raise BadAdapter(f"adapter_config.json cannot be read: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    """What an error says, in one line; a heading ("Error(s) in loading state_dict:") is passed over."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[1] if lines[0].endswith(":") and len(lines) > 1 else lines[0]


def read_json(path: Path) -> dict:
    """A JSON object from disk; {} where there is none, for it only adorns."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
