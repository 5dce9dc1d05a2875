"""Finding and loading the base: the Hub, a local folder, or the tiny model. Imports no torch: preparing data needs none."""

import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import transformers
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from config import CONFIG
from phi2_grpo import files
from phi2_grpo.chat import count_tokens, prepare_tokenizer
from phi2_grpo.cli import UserError, first_line, memory_ran_out
from phi2_grpo.tiny import tiny_base

if not sys.stderr.isatty():  # in a log file a progress bar is noise
    transformers.utils.logging.disable_progress_bar()


def resolve_model(config: dict) -> tuple[str, str | None]:
    """The base model's folder or Hub id, and its revision (None for a folder). "tiny" is built at the first need."""
    if config["model"] == "tiny":
        return str(tiny_base()), None
    path = Path(config["model"]).expanduser()
    if path.exists():
        return str(path.resolve()), None
    if is_a_path(config["model"]):
        raise UserError(f"the base model's folder {config['model']} is gone. Give its new place: --model FOLDER")
    return config["model"], config["model_revision"]


def is_a_path(name: str) -> bool:
    """Whether `name` can only be a path of this machine: a Hub id is NAME or USER/NAME."""
    return not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name)


def commit_of(config: dict) -> str | None:
    """The commit that a Hub model's revision stands for in the cache; None for a folder, or before it was loaded."""
    name, revision = resolve_model(config)
    if revision is None:
        return None
    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None


def names_base(named: tuple[str | None, str | None], config: dict) -> bool:
    """Whether (name, revision), as an adapter's config has them, are the base that `config` names."""
    name, revision = resolve_model(config)
    base = named[0] or ""
    if revision is None:  # a local folder
        return Path(base).exists() and Path(base).resolve() == Path(name)
    return (base, named[1] or "main") == (name, revision)


def load_pretrained(loader, config: dict, **options):
    """`loader.from_pretrained` for the configured base; UserError saying what to do where it cannot be had."""
    name, revision = resolve_model(config)
    with said_where_broken(config):
        return loader.from_pretrained(name, **({"revision": revision} if revision else {}), **options)


@contextmanager
def said_where_broken(config: dict) -> Iterator[None]:
    """Makes a UserError of whatever the libraries raise where they cannot read the configured base."""
    try:
        yield
    except Exception as error:  # a dozen kinds: no file, no network, no JSON, a wrong type, cut weights, a division by zero
        if memory_ran_out(error) or isinstance(error, UserError):
            raise
        name, revision = resolve_model(config)
        reason = f"{type(error).__name__}: {first_line(error)}"
        if revision is None:
            again_from = shlex.quote(config["model"])
            again = "Copy it again whole, its weights as safetensors."
            if based := base_of(Path(name))[0]:
                again = f"It is an adapter, of {based}: give that. To go on from it: train_grpo.py --init_adapter {again_from}"
            raise UserError(f"the model in {name} cannot be loaded: {reason}\n  {again}") from None
        raise UserError(
            f"the model {name} (revision {revision}) cannot be loaded: {reason}\n"
            f"  On a machine with network: hf download {name}; offline: HF_HUB_OFFLINE=1 once it is in the cache,\n"
            "  or --model FOLDER for a local copy. To try everything without the Hub: --preset tiny"
        ) from None


def check_weights(config: dict) -> None:
    """Raise UserError where the base is a folder whose weights are missing or cut; those of the Hub come later."""
    name, revision = resolve_model(config)
    if revision is None:
        with said_where_broken(config):
            index = files.read_json(Path(name) / "model.safetensors.index.json").get("weight_map", {})
            for part in sorted(set(index.values())) or ["model.safetensors"]:
                files.check_no_pointer(Path(name) / part)
                with safe_open(Path(name) / part, "np"):  # reads the header, and compares it with the file's size
                    pass


def load_tokenizer(config: dict):
    """The base's tokenizer, ready for GRPO: padding with the end token, on the left, and a chat template.

    A `[PAD]` token of its own would make PEFT save the embeddings; the end token serves, because masks rule.
    """
    tokenizer = load_pretrained(AutoTokenizer, config)
    prepare_tokenizer(tokenizer)
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {config['model']} has no end token (eos_token), so no answer could end.")
    tokenizer.end_token_ids = list(dict.fromkeys([tokenizer.eos_token_id, *_named_ends(config)]))
    word = "plant"
    try:
        talk = [{"role": "user", "content": word}, {"role": "assistant", "content": word}]
        rendered = word in tokenizer.apply_chat_template(talk, tokenize=False)
        counted = all(count_tokens(tokenizer, [talk[:1], [{"role": "user", "content": word * 9}]]))
    except Exception as error:  # a template is a program, and may raise anything
        raise UserError(f"the chat template of {config['model']} fails: {first_line(error)}. Mend or remove it.") from None
    if not rendered or not counted:
        raise UserError(f"the chat template of {config['model']} leaves out what is said, or its tokenizer has no tokens.")
    return tokenizer


def _named_ends(config: dict) -> list[int]:
    """The end tokens that the base's generation_config.json names, or else its config.json."""
    name, revision = resolve_model(config)
    try:
        found = GenerationConfig.from_pretrained(name, revision=revision or "main")
    except OSError:  # it has none
        found = load_pretrained(AutoConfig, config)
    except ValueError:  # sampling settings that transformers refuses; the ends are read all the same
        found = GenerationConfig.from_dict({})
    ends = getattr(found, "eos_token_id", None)
    return [] if ends is None else list(ends) if isinstance(ends, (list, tuple)) else [ends]


def check_adapter(folder: str) -> Path:
    """The adapter folder, if it is whole. Raises UserError saying what is missing."""
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"no adapter at {folder}. train_grpo.py makes one; or give another folder.")
    needed = ("adapter_config.json", "adapter_model.safetensors")  # PEFT's two; the rest may come from the base
    missing = [name for name in needed if not (path / name).is_file() or not (path / name).stat().st_size]
    if missing:
        again = (
            f"Give one of its checkpoints, {folder}/checkpoint-N." if [*path.glob("checkpoint-*")] else "Copy it again whole."
        )
        raise UserError(f"the adapter {folder} is incomplete: {', '.join(missing)} missing or empty. {again}")
    files.check_no_pointer(path / needed[0])
    named = files.read_json(path / needed[0])
    if not named:
        raise UserError(f"the adapter {folder} is broken: {needed[0]} is not what PEFT writes. Copy it again whole.")
    if (kind := named.get("peft_type", "LORA")) != "LORA":
        raise UserError(f"{folder} is an adapter of the kind {kind}, and this project uses LoRA alone. Give a LoRA adapter.")
    check_finite(path / needed[1])
    return path


def check_finite(weights: Path) -> None:
    """Raise UserError where a safetensors file cannot be read, or holds NaN or infinity."""
    files.check_no_pointer(weights)
    try:
        with safe_open(weights, "pt") as tensors:
            names = list(tensors.keys())
            lost = [name for name in names if not tensors.get_tensor(name).isfinite().all()]
    except Exception as error:  # safetensors and torch each have their own
        raise UserError(f"{weights} is broken: {first_line(error)}. Copy it again whole.") from None
    if lost:
        raise UserError(
            f"{weights} holds weights that are no finite numbers ({len(lost)} of {len(names)} tensors, like {lost[0]}): its "
            "training diverged. Take an earlier checkpoint, or train anew."
        )


def use_base_of(adapter: Path, config: dict) -> None:
    """Where no other --model was given, take the base that the adapter names; where no --model_revision, at its revision."""
    name, revision = base_of(adapter)
    if config["model"] == CONFIG["model"] and name:
        config["model"] = name
        if config["model_revision"] == CONFIG["model_revision"]:
            config["model_revision"] = revision or CONFIG["model_revision"]


def base_of(adapter: Path) -> tuple[str, str | None]:
    """Name ("" where it has none) and revision of the base that an adapter's folder names."""
    named = files.read_json(adapter / "adapter_config.json")
    name, revision = (named.get(key) for key in ("base_model_name_or_path", "revision"))
    return str(name or ""), revision and str(revision)
