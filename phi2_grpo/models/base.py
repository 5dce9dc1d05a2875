"""Finding and loading the base: the Hub, a local folder, or the tiny model. Imports no torch: preparing data needs none."""

import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
)

from config import CONFIG
from phi2_grpo.common import files
from phi2_grpo.common.cli import UserError, first_line, memory_ran_out

ROOT = Path(__file__).resolve().parents[2]
TINY_FOLDER = ROOT / "results" / "tiny-base"

if not sys.stderr.isatty():  # in a log file a progress bar is noise
    transformers.utils.logging.disable_progress_bar()


def resolve_model(config: dict) -> tuple[str, str | None]:
    """The base model's folder or Hub id, and its revision (None for a folder). "tiny" is what `embedded.build_tiny` left."""
    if config["model"] == "tiny":
        return str(TINY_FOLDER), None
    path = Path(config["model"]).expanduser()
    if path.exists():
        return str(path.resolve()), None
    if is_path(config["model"]):
        raise UserError(f"the base model's folder {config['model']} is gone. Give its new place: --model FOLDER")
    return config["model"], config["model_revision"]


def is_path(name: str) -> bool:
    """Whether `name` can only be a path of this machine: a Hub id is NAME or USER/NAME."""
    return not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name)


def commit_of(config: dict) -> str | None:
    """The commit that a Hub model's revision stands for in the cache; None for a folder, or before it was loaded."""
    name, revision = resolve_model(config)
    if revision is None:
        return None
    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None


def is_same_base(named: tuple[str | None, str | None], config: dict) -> bool:
    """Whether (name, revision), as an adapter's config has them, are the base that `config` names."""
    name, revision = resolve_model(config)
    base = named[0] or ""
    if revision is None:  # a local folder
        return Path(base).exists() and Path(base).resolve() == Path(name)
    return (base, named[1] or "main") == (name, revision)


def load_pretrained(loader, config: dict, **options):
    """`loader.from_pretrained` for the configured base; UserError saying what to do where it cannot be had."""
    name, revision = resolve_model(config)
    with clear_load_errors(config):
        return loader.from_pretrained(name, **({"revision": revision} if revision else {}), **options)


@contextmanager
def clear_load_errors(config: dict) -> Iterator[None]:
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
            if based := base_of_adapter(Path(name))[0]:
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
        with clear_load_errors(config):
            index = files.read_json(Path(name) / "model.safetensors.index.json").get("weight_map", {})
            for part in sorted(set(index.values())) or ["model.safetensors"]:
                files.check_no_pointer(Path(name) / part)
                with safe_open(Path(name) / part, "np"):  # reads the header, and compares it with the file's size
                    pass


def use_adapter_base(adapter: Path, config: dict) -> None:
    """Where no other --model was given, take the base that the adapter names; where no --model_revision, at its revision."""
    name, revision = base_of_adapter(adapter)
    if config["model"] == CONFIG["model"] and name:
        config["model"] = name
        if config["model_revision"] == CONFIG["model_revision"]:
            config["model_revision"] = revision or CONFIG["model_revision"]


def base_of_adapter(adapter: Path) -> tuple[str, str | None]:
    """Name ("" where it has none) and revision of the base that an adapter's folder names."""
    named = files.read_json(adapter / "adapter_config.json")
    name, revision = (named.get(key) for key in ("base_model_name_or_path", "revision"))
    return str(name or ""), revision and str(revision)


def choose_device(config: dict) -> tuple[torch.device, torch.dtype]:
    """Where and in what precision to run. Raises UserError where the machine has not what was asked for."""
    device = config["device"]
    if device != "cpu" and not torch.cuda.is_available():
        raise UserError(
            f"no CUDA GPU was found, and --device {device} needs one (12 GB or more for Phi-2).\n"
            "  To try everything on this machine: --preset tiny (a 2M-parameter model, minutes on two cores)\n"
            "  For the patient: --device cpu runs this very job in float32, about 14 GB of memory and hours"
        )
    # Under accelerate or torchrun each process has a card of its own; the base must be loaded there at once.
    device = torch.device("cpu") if device == "cpu" else torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    dtype = config["dtype"]
    if dtype == "auto" and device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):  # torch.cuda.is_bf16_supported() says True below 8.0 too: by slow emulation
            raise UserError(
                f"{torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}; bfloat16 needs "
                "8.0 (Ampere).\n  --dtype float32 works, in twice the memory. float16 is no way out: Phi-2 overflows in it."
            )
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    return device, getattr(torch, dtype)


def load_base(config: dict, device: torch.device, dtype: torch.dtype):
    """The frozen base with SDPA attention, in `dtype`, on `device`."""
    options = {"dtype": dtype, "attn_implementation": "sdpa", "use_safetensors": True}  # a pickle may run code
    model, found = load_pretrained(AutoModelForCausalLM, config, output_loading_info=True, **options)
    if missing := sorted(found["missing_keys"]):  # transformers fills them with random numbers, and goes on
        raise UserError(
            f"the weights of {config['model']} are not those of its config.json: {len(missing)} are missing, like "
            f"{missing[0]}. Copy it again whole."
        )
    own = model.generation_config
    # Without the base's own ways to sample (repetition_penalty, min_p): `generate` would take them where we say nothing.
    model.generation_config = GenerationConfig(
        **{key: getattr(own, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    )
    return model if is_sharded() else model.to(device)


def is_sharded() -> bool:
    """Whether accelerate launch is to spread the weights over the processes (FSDP, ZeRO): then no card has all of them."""
    return any(os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true" for name in ("FSDP", "DEEPSPEED"))


def load_reward_base(config: dict, device: torch.device, dtype: torch.dtype):
    """The base with a new head of one output, to be trained as a reward model."""
    options = {"num_labels": 1, "dtype": dtype, "attn_implementation": "sdpa", "use_safetensors": True}
    return new_reward_head(load_pretrained(AutoModelForSequenceClassification, config, **options).to(device))


def new_reward_head(model):
    """`model` with a new head of one output in float32, whatever its base is in: bfloat16 would lose the small updates."""
    text_config = model.config.get_text_config()
    model.score = Float32Linear(text_config.hidden_size, 1, bias=False, device=model.device, dtype=torch.float32)
    torch.nn.init.normal_(model.score.weight, std=text_config.initializer_range)
    return model


class Float32Linear(torch.nn.Linear):
    """Computes in float32 under autocast too, whatever comes in."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.float())


def meta_model(config: dict):
    """The base without its weights (on the meta device): for counting and checking in a second."""
    model_config = load_pretrained(AutoConfig, config)
    check_weights(config)
    with clear_load_errors(config), torch.device("meta"):
        return AutoModelForCausalLM.from_config(model_config)


def context_length(model) -> int:
    """The longest text it can hold, in tokens."""
    return getattr(model.config, "max_position_embeddings", None) or 2048
