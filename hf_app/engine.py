"""One model in memory: the base with its adapter on (tuned) or off (base).

Imports nothing of the page or of the project: what the model needs stands in the standard files of the adapter folder.
"""

import copy
import os
import queue
import secrets
import threading
import time
import unicodedata
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, StoppingCriteria

# For a base that has no template: the format of Phi-2's model card, and where Phi-2 runs on. An adapter brings its own.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{{ 'Instruct: ' + message['content'] | trim + '\\n' }}
{%- elif message['role'] == 'assistant' -%}{{ 'Output: ' + message['content'] | trim }}{{ '' if loop.last else '\\n' }}
{%- else -%}{{ message['content'] | trim + '\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Output:' }}{%- endif -%}"""
STOP_STRINGS = ["\nInstruct:", "\nOutput:", "\nUser:", "\nHuman:", "\nExercise:", *(f"\nExercise {n}" for n in range(1, 10))]

CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # values of init_lora_weights
MAX_CHARACTERS = 20_000  # of a question; far over any context here, and cheap to refuse
MAX_NEW_TOKENS = 512  # of an answer, where the context allows it
MAX_SECONDS = 180.0  # of an answer: a Phi-2 on two CPU cores writes about 2 tokens a second
LIMITS = {"temperature": (0.05, 2.0), "top_p": (0.05, 1.0), "seed": (-1, 2**31 - 1)}  # lowest and highest
TUNED, BASE = "tuned", "base"
RUNNING = "…"


class BadInput(ValueError):
    """Something the visitor can change; the text says what was given, what the rule is and what to do."""


class NoBase(Exception):
    """There is no model to answer with; the text says why."""


class BadAdapter(Exception):
    """The adapter cannot be used; the text says why."""


@dataclass(frozen=True)
class Settings:
    """How an answer is sampled; `Engine.settings` says what each value may be."""

    max_new_tokens: int = 256
    sample: bool = True  # sample from the distribution, or always take the likeliest token
    temperature: float = 0.7
    top_p: float = 0.9
    seed: int = -1  # -1: a new one, which the answer tells
    stop: bool = True  # at the end of the first answer, or let the model run on


@dataclass(frozen=True)
class Answer:
    """An answer so far; `finish_reason` is empty while it is being written."""

    text: str = ""
    tokens: int = 0  # of `text`
    speed: float = 0.0  # tokens sampled per second
    seed: int = 0
    finish_reason: str = ""
    left_out: int = 0  # earlier messages that did not fit the context

    def summary(self) -> str:
        """`87 tokens · 9.1 tokens/s · ended by itself · seed 7`; while it is being written, `12 tokens · 9.0 tokens/s · …`"""
        parts = [f"{self.tokens} tokens", f"{self.speed:.1f} tokens/s", self.finish_reason or RUNNING]
        parts += [f"seed {self.seed}"] * bool(self.finish_reason)
        return " · ".join(parts + [f"{self.left_out} earlier messages left out"] * bool(self.left_out))


class TokenQueue(StoppingCriteria):
    """The tokens that `generate` samples, as a queue of token ids; None, put by the thread that generates, is the end.

    Stops `generate` at the next token once one of `stops` is set, or when the time is up.
    """

    def __init__(self, seconds: float, *stops: threading.Event):
        self.queue: queue.Queue[int | None] = queue.Queue()
        self.seconds, self.stops = seconds, stops
        self.started, self.late = time.perf_counter(), False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_) -> torch.Tensor:
        self.queue.put(int(input_ids[0, -1]))
        self.late = time.perf_counter() - self.started > self.seconds
        stop = self.late or any(stop.is_set() for stop in self.stops)
        return torch.full((len(input_ids),), stop, device=input_ids.device)

    def take(self) -> list[int | None]:
        """All that is there; waits a moment for the first of it."""
        tokens = []
        with suppress(queue.Empty):
            tokens.append(self.queue.get(timeout=0.2))
            while True:
                tokens.append(self.queue.get_nowait())
        return tokens


def trim(text: str, stop_strings: list[str], finished: bool) -> tuple[str, str]:
    """The answer in a decoded completion: what stands before the first stop string, and that string. Until it is finished, an
    end that could still become a stop string or a complete character is held back."""
    first = min(((i, stop) for stop in stop_strings if (i := text.find(stop)) >= 0), default=None)
    if first:
        return text[: first[0]].strip(), first[1].strip()
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

    `adapter` is the folder of a PEFT adapter; where it is missing or cannot be used, the base answers and `status` says why.
    `base` is a Hub id or folder; default: the one that the adapter names, else Phi-2. Raises NoBase.
    """

    def __init__(self, adapter: Path, base: str = ""):
        self.adapter = Path(adapter)
        self._lock = threading.Lock()  # PEFT's switch between tuned and base is the model's, so it is everybody's
        self._closing = threading.Event()
        self._generation: Generation | None = None  # the latest
        problem, config = "", None
        try:
            config = read_adapter_config(self.adapter)
        except BadAdapter as error:
            problem = str(error)
        named = config.base_model_name_or_path if config else None
        self.base = base or named or "microsoft/phi-2"
        self.revision = config.revision if config and self.base == named else None  # of a Hub base
        on_hub = self.base if not Path(self.base).exists() else named if named and named.count("/") == 1 else ""
        self.base_name = on_hub or Path(self.base).name  # no path of this machine
        self._load_base()
        if config:
            try:
                self._load_adapter()
            except BadAdapter as error:  # PEFT may have changed the base before it failed
                problem, self.model = str(error), None  # no two at once: memory may have room for one
                self._load_base()
        self.model.to(self._device)  # last: on ZeroGPU, CUDA seems to be there and comes with the first call
        self.tuned = isinstance(self.model, PeftModel)
        text_config = self.model.config.get_text_config()
        self.context = getattr(text_config, "max_position_embeddings", None) or 2048  # tokens of prompt and answer
        self.longest_answer = min(MAX_NEW_TOKENS, self.context // 2)  # half of the context is for the question
        self._describe(problem)

    def _load_base(self) -> None:
        where = {} if Path(self.base).exists() else {"revision": self.revision or "main"}
        for cached in (True, False):  # a model in the cache needs no network, and no wait for one that is not there
            options = {"local_files_only": cached, "trust_remote_code": False, **where}
            try:
                with torch.device("meta"):
                    size = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self.base, **options)).num_parameters()
                self._device, dtype = choose_device(size)
                self.tokenizer = AutoTokenizer.from_pretrained(self.base, **options)
                options |= {"dtype": dtype, "use_safetensors": True}  # a pickle may run code
                self.model = AutoModelForCausalLM.from_pretrained(self.base, **options).eval()
                break
            except Exception as error:  # transformers, safetensors and torch raise a dozen kinds for what they cannot read
                if not cached or not where:
                    text = f"the base model {self.base} cannot be loaded: {first_line(error)}"
                    raise NoBase(f"{text}\n  Give a Hub id (offline: one in the cache) or a local folder: --base.") from None
        bos = "{{ bos_token }}" * (self.tokenizer("")["input_ids"][:1] == [self.tokenizer.bos_token_id])
        self.tokenizer.chat_template = self.tokenizer.chat_template or bos + CHAT_TEMPLATE
        # Most chat models name several end tokens, some the turn's in their template alone; a Phi-2 runs on.
        said = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
        turn_end = self.tokenizer.apply_chat_template(said, tokenize=False).rpartition("So.")[2].strip()
        named = (self.tokenizer.eos_token_id, self.model.generation_config.eos_token_id)
        self.eos_ids = unique_ids(*named, self.tokenizer.get_added_vocab().get(turn_end))
        self.model.generation_config = GenerationConfig(eos_token_id=self.eos_ids or None)  # without the base's top_k
        stops = STOP_STRINGS if str(self.tokenizer.chat_template).endswith(CHAT_TEMPLATE) else None
        self.defaults = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.9, stop_strings=stops)

    def _load_adapter(self) -> None:
        folder, tokenizer, defaults = str(self.adapter), self.tokenizer, self.defaults
        try:
            if (self.adapter / "tokenizer.json").is_file():
                tokenizer = AutoTokenizer.from_pretrained(folder)
                tokenizer.chat_template = tokenizer.chat_template or self.tokenizer.chat_template
            if (self.adapter / "generation_config.json").is_file():
                defaults = GenerationConfig.from_pretrained(folder)
            with safe_open(self.adapter / "adapter_model.safetensors", "pt") as weights:
                saved = set(weights.keys())
                finite = all(weights.get_tensor(key).isfinite().all() for key in saved)
            model = PeftModel.from_pretrained(self.model, folder, torch_device="cpu").eval()
            expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
        except Exception as error:  # PEFT, safetensors, tokenizers and json raise a dozen kinds
            reason = first_line(error).replace(folder, self.adapter.name)  # a public page shows no paths
            raise BadAdapter(f"it does not fit {self.base_name}, or is broken: {reason}") from None
        if not finite:
            raise BadAdapter("it holds weights that are not finite numbers: its training diverged")
        self.layers = sum(hasattr(module, "lora_A") for module in model.modules())
        missing, unexpected = expected - saved, saved - expected - model.state_dict().keys()
        if missing or unexpected or not self.layers:  # PEFT passes over both
            counts = f"{len(unexpected)} of its weights do not fit {self.base_name}, and {len(missing)} are missing"
            raise BadAdapter(f"{counts}: made for another base, or saved otherwise")
        self.model, self.tokenizer, self.defaults = model, tokenizer, defaults

    def _describe(self, problem: str) -> None:
        """Sets `kind` (tuned, base: no adapter, or broken: one that is not loaded), `status` and `device`, in words."""
        self.kind = TUNED if self.tuned else "broken" if problem else BASE
        reason = f"Adapter {self.adapter.name} not loaded: {problem}" if problem else f"No adapter in {self.adapter.name}/"
        self.status = f"Base model only: {self.base_name}. {reason}"
        if self.tuned:
            self.status = f"Tuned: {self.base_name} with the adapter {self.adapter.name}, LoRA on {self.layers} modules"
        slow = self._device.type == "cpu" and self.model.num_parameters() > 1e9
        note = ", about 2 tokens/s on two cores: long answers take minutes" if slow else ""
        device = torch.cuda.get_device_name() if self._device.type == "cuda" else "CPU"
        self.device = f"{device}, {str(self.model.dtype).removeprefix('torch.')}{note}"

    def close(self) -> None:
        """Ends the generation, and waits for it: torch must not be unloaded under a running thread."""
        self._closing.set()
        if self._generation:
            self._generation.join(timeout=10)

    def settings(self, **given) -> Settings:
        """The adapter's own way to sample, with `given` over it. Raises BadInput for a value out of range."""
        own = {"temperature": self.defaults.temperature or 0.7, "top_p": self.defaults.top_p or 1.0}
        own["max_new_tokens"] = self.defaults.max_new_tokens or 256
        for name, (low, high) in {"max_new_tokens": (1, self.longest_answer), **LIMITS}.items():
            own[name] = min(max(own.get(name, -1), low), high)
            value, kind = given.get(name, own[name]), type(low)
            if not isinstance(value, (int, float)) or not low <= value <= high or value != kind(value):  # NaN is in no range
                raise BadInput(f"{name} is {value!r}, but it takes a {'whole ' * (kind is int)}number from {low} to {high}.")
            own[name] = kind(value)  # 64.0 is 64
        return Settings(**{"sample": bool(self.defaults.do_sample), **given, **own})

    def check_question(self, question: str) -> None:
        """Raises BadInput for a question that is none, or far too long."""
        if not isinstance(question, str):
            raise BadInput(f"The prompt is {question!r}, but it takes a text.")
        if len(question) > MAX_CHARACTERS:
            raise BadInput(f"The question has {len(question):,} characters, and {MAX_CHARACTERS:,} are the limit. Shorten it.")
        if not clean(question):
            raise BadInput("The question is empty. Write something to answer.")

    def prompt(self, messages: list[dict], max_new_tokens: int) -> tuple[str, int]:
        """The prompt as the model sees it, and how many of the earlier messages were left out (the oldest go first).

        Raises BadInput where the last message is empty, or too long by itself.
        """
        self.check_question(messages[-1]["content"])
        room, fits = self.context - max_new_tokens, None
        for count in range(1, len(messages) + 1, 2):  # the question, then with one more of the questions and answers before it
            turns = [{"role": turn["role"], "content": clean(turn["content"][:MAX_CHARACTERS])} for turn in messages[-count:]]
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            length = len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            if length > room:
                break
            fits = text, len(messages) - count
        if fits:
            return fits
        raise BadInput(
            f"The question has {length:,} tokens, and there is room for {room:,}: the model holds {self.context:,}, and the "
            f"answer may take {max_new_tokens:,} of them. Shorten it, or ask for a shorter answer."
        )

    def stream(self, messages: list[dict], model: str, settings: Settings, seconds: float | None = None) -> Iterator[Answer]:
        """Answers the last of `messages` ({"role", "content"}, oldest first); yields the answer as it grows, at least five
        times a second: closing this ends the generation at its next token; so do `seconds` (default: MAX_SECONDS). Where
        there is no adapter, the base answers. Raises BadInput before the first answer."""
        if model not in (TUNED, BASE):
            raise BadInput(f"model is {model!r}, but it takes {TUNED!r} or {BASE!r}.")
        text, left_out = self.prompt(messages, settings.max_new_tokens)
        settings = replace(settings, seed=settings.seed if settings.seed >= 0 else secrets.randbelow(2**31))
        stop = threading.Event()
        generation = self._generation = Generation(self, text, model == BASE, settings, stop, seconds or MAX_SECONDS)
        generation.start()
        ids, tokens, answer = [], [], Answer(seed=settings.seed, left_out=left_out)
        try:
            while None not in tokens and not answer.finish_reason:
                tokens = generation.tokens.take()
                ids += [token for token in tokens if token is not None]
                answer = generation.answer(ids, answer, finished=False)
                if not answer.finish_reason:
                    yield answer
            if generation.error:
                raise generation.error
            yield answer if answer.finish_reason else generation.answer(ids, answer, finished=True)
        finally:
            stop.set()


class Generation(threading.Thread):
    """One call of `generate`. It holds the model's lock itself, so that a visitor who leaves need not wait for its end."""

    def __init__(self, engine: Engine, text: str, base: bool, settings: Settings, stop: threading.Event, seconds: float):
        super().__init__(daemon=True)
        self.engine, self.text, self.base, self.settings, self.stop = engine, text, base, settings, stop
        self.tokens = TokenQueue(seconds, stop, engine._closing)
        self.error: Exception | None = None
        self.eos_ids = unique_ids(engine.tokenizer.eos_token_id, *engine.eos_ids, engine.defaults.eos_token_id)

    def run(self) -> None:
        engine, settings = self.engine, self.settings
        config, sampling = copy.deepcopy(engine.defaults), dict.fromkeys(("temperature", "top_p", "top_k"))
        if settings.sample:
            sampling = {"temperature": settings.temperature, "top_p": settings.top_p}
        try:
            config.update(max_new_tokens=settings.max_new_tokens, do_sample=settings.sample, stop_strings=None)  # `trim` stops
            config.update(eos_token_id=self.eos_ids or None, pad_token_id=next(iter(self.eos_ids), 0), num_beams=1, **sampling)
            with engine._lock:
                if self.stop.is_set():
                    return
                inputs = engine.tokenizer(self.text, return_tensors="pt", add_special_tokens=False).to(engine.model.device)
                options = {"generation_config": config, "stopping_criteria": [self.tokens]}
                torch.manual_seed(settings.seed)
                self.tokens.started = time.perf_counter()
                with engine.model.disable_adapter() if engine.tuned and self.base else nullcontext():
                    engine.model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **options)
        except Exception as error:  # raised again in the thread that reads the tokens
            self.error = error
        finally:
            self.tokens.queue.put(None)

    def answer(self, ids: list[int], so_far: Answer, finished: bool) -> Answer:
        """The answer in the tokens sampled so far."""
        stops = (self.engine.defaults.stop_strings or []) if self.settings.stop else []
        text, stop = trim(self.engine.tokenizer.decode(ids, skip_special_tokens=True), stops, finished)
        reason = f"stopped before it ran on into {stop!r}" if stop else ""
        if finished and not stop:
            ended = ids and ids[-1] in self.eos_ids
            reason = "ended by itself" if ended else f"cut off at the {'time ' if self.tokens.late else ''}limit"
        count = len(self.engine.tokenizer(text, add_special_tokens=False)["input_ids"])
        speed = len(ids) / max(time.perf_counter() - self.tokens.started, 1e-9)
        return replace(so_far, text=text, tokens=count, speed=speed, finish_reason=reason)


def choose_device(size: int) -> tuple[torch.device, torch.dtype]:
    """A GPU that PyTorch has kernels for, with room for the model. bfloat16 where the GPU has it or memory is short; Phi-2
    overflows in float16, so that is never chosen."""
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        dtype = torch.bfloat16 if capability >= (8, 0) else torch.float32
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each length (read, not measured)
        oldest = min(
            (int(arch[3:]) for arch in torch.cuda.get_arch_list() if arch[:3] == "sm_" and arch[3:].isdigit()), default=0
        )  # sm_75, ...
        # ZeroGPU's comes later, and is a large one.
        usable = os.environ.get("SPACES_ZERO_GPU") or (
            10 * capability[0] + capability[1] >= oldest and 1.2 * size * dtype.itemsize < torch.cuda.mem_get_info()[0]
        )
        if usable:
            return torch.device("cuda"), dtype
    # On two CPU cores a Phi-2 is twice as fast in bfloat16 and takes 6 GB instead of 12; a tiny model gains nothing.
    return torch.device("cpu"), torch.bfloat16 if size > 1e9 else torch.float32


def unique_ids(*named: int | list[int] | None) -> list[int]:
    """The token ids that any of `named` is or holds, each once."""
    return list(dict.fromkeys(i for one in named if one is not None for i in (one if isinstance(one, list) else [one])))


def read_adapter_config(folder: Path) -> PeftConfig | None:
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
    except Exception as error:
        raise BadAdapter(f"adapter_config.json cannot be read: {first_line(error)}") from None
    if config.peft_type != "LORA":
        raise BadAdapter(f"its kind is {config.peft_type}, and only LoRA is read here")
    if config.bias != "none" or str(config.init_lora_weights).lower().startswith(CHANGES_BASE):
        raise BadAdapter("it changes weights of its base: give one with bias none and init_lora_weights true")
    return config


def first_line(error: Exception) -> str:
    """What an error says, in one line; a heading ("Error(s) in loading state_dict:") is passed over."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line and not line.endswith(":")), type(error).__name__)
