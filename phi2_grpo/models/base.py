"""The base model: find it (the Hub, a local folder, or an embedded one), load it, choose where it runs."""

import os
import re
from pathlib import Path

import psutil
import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig

from config import CONFIG
from phi2_grpo.common import files
from phi2_grpo.common.cli import UserError, load_errors

ROOT = Path(__file__).resolve().parents[2]
EMBEDDED = {name: ROOT / "results" / f"{name}-base" for name in ("tiny", "smollm2")}
SMOLLM2_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # whose weights smollm2 has, less 4-bit rounding
LOADING = {"use_safetensors": True, "trust_remote_code": False}  # no pickle, which may run code, and no code


def resolve_model(config: dict) -> tuple[str, str | None]:
    """The base model's folder or Hub id, and its revision (None for a folder). Raises UserError for a folder that is gone."""
    if config["model"] in EMBEDDED:
        return str(EMBEDDED[config["model"]]), None
    path = Path(config["model"]).expanduser()
    if path.exists():
        return str(path.resolve()), None
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", config["model"]):  # a Hub id is NAME or USER/NAME; this can only be a path
        raise UserError(f"the base model's folder {config['model']} is gone. Give its new place: --model FOLDER")
    return config["model"], config["model_revision"]


def base_name(config: dict) -> tuple[str, str | None]:
    """What an adapter names as its base, with the revision. For smollm2 that is the Hub's id: the adapter works there too."""
    name, revision = resolve_model(config)
    return (SMOLLM2_ID, "main") if name == str(EMBEDDED["smollm2"]) else (name, revision)


def describe_base(config: dict) -> str:
    """The base in words, without a path of this machine."""
    name, _ = base_name(config)
    if name == SMOLLM2_ID != config["model"]:
        return f"{name}, dequantised from 4 bits"
    return Path(config["model"]).name if Path(config["model"]).exists() else config["model"]


def base_of(adapter: Path) -> tuple[str, str | None]:
    """Name ("" where it has none) and revision of the base that an adapter's folder names."""
    saved = files.read_json(adapter / "adapter_config.json")
    return str(saved.get("base_model_name_or_path") or ""), saved.get("revision")


def use_adapter_base(adapter: Path, config: dict, given) -> None:
    """Where neither flag (`given`: the flags) nor preset names another --model, take the base that the adapter names, and where
    no --model_revision was given, at its revision.

    Where smollm2 is on the disk, it stands for the Hub's SmolLM2.
    """
    name, revision = base_of(adapter)
    if name == SMOLLM2_ID and EMBEDDED["smollm2"].exists():
        name, revision = "smollm2", None
    if given.model is None and config["model"] == CONFIG["model"] and name:
        config["model"] = name
        if revision and given.model_revision is None:
            config["model_revision"] = revision


def is_same_base(named: tuple[str | None, str | None], config: dict) -> bool:
    """Whether (name, revision), as an adapter's config has them, are the base that `config` names."""
    name, revision = base_name(config)
    if revision is None:  # a local folder
        return os.path.realpath(named[0] or "") == name
    return (named[0], named[1] or "main") == (name, revision)


def commit_of(config: dict) -> str | None:
    """The commit that a Hub model's revision stands for in the cache; None for a folder, or before it was loaded."""
    name, revision = resolve_model(config)
    cached = revision and try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(cached).parent.name if isinstance(cached, str) else None


def load_pretrained(loader, config: dict, **options):
    """`loader.from_pretrained` for the configured base. Raises UserError where it cannot be loaded."""
    name, revision = resolve_model(config)
    with base_load_errors(config):
        return loader.from_pretrained(name, **{"revision": revision or "main", "trust_remote_code": False, **options})


def base_load_errors(config: dict):
    """`load_errors` around the reading of the configured base."""
    name, revision = resolve_model(config)
    if revision:
        advice = "A gated one: accept its terms on its page, then `hf auth login`. Without a network: "
        advice += f"hf download {name} puts it into the cache, which HF_HUB_OFFLINE=1 reads. Or: --model FOLDER, --preset tiny."
        return load_errors(f"the model {name} (revision {revision}) cannot be loaded", advice)
    advice = "Copy it again, with its weights as safetensors. An adapter is given with --init_adapter, its base with --model."
    return load_errors(f"the model in {name} cannot be loaded", advice)


def choose_device(config: dict) -> tuple[torch.device, torch.dtype]:
    """The device, and the dtype of the frozen base. Raises UserError where the machine lacks what was asked for."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = config["device"]
    if name == "auto":
        name = next(kind for kind, exists in available.items() if exists)
    if not available[name] or (name == "cpu" != config["device"] and _parameters(config) > 1e9):
        raise UserError(
            f"no {'MPS' if name == 'mps' else 'CUDA'} GPU was found, and --device {config['device']} needs one for this base "
            "(12 GB or more for Phi-2).\n"
            "  A small language model on this machine: --preset smollm2 (SmolLM2-135M)\n"
            "  To try everything in minutes: --preset tiny (a 2M-parameter model)\n"
            "  --device cpu runs this very job in float32: by estimate 15 GB of memory or more for Phi-2, and days on two cores"
        )
    # Under accelerate or torchrun each process has its own GPU, and loads the base straight to it.
    device = torch.device(name)
    if name == "cuda":
        if "LOCAL_RANK" in os.environ and torch.cuda.device_count() == 1:  # a scheduler may show each process one GPU alone,
            os.environ["LOCAL_RANK"] = "0"  # and accelerate goes by this
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        capability = torch.cuda.get_device_capability(device)
        oldest = min(
            (int(arch[3:]) for arch in torch.cuda.get_arch_list() if arch[:3] == "sm_" and arch[3:].isdigit()), default=0
        )  # sm_75, ...
        if 10 * capability[0] + capability[1] < oldest:
            raise UserError(
                f"{torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}, and this PyTorch is "
                f"built for {oldest / 10} and newer. Install one for an older CUDA (docs/troubleshooting.md), or --device cpu."
            )
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each length (read, not measured)
    if config["dtype"] != "auto":
        return device, getattr(torch, config["dtype"])
    if name == "cpu":
        return device, torch.float32
    if name == "cuda" and capability >= (8, 0):  # torch.cuda.is_bf16_supported() says True below 8.0 too: by slow emulation
        return device, torch.bfloat16
    free = torch.cuda.mem_get_info(device)[0] if name == "cuda" else psutil.virtual_memory().available
    need, free = 4 * _parameters(config) / 1e9, free / 1e9
    if need > 0.8 * free:
        advice = "--dtype bfloat16 takes half of that."
        if name == "cuda":
            advice = f"bfloat16 needs compute capability 8.0 (Ampere), and this is {capability[0]}.{capability[1]}; Phi-2 "
            advice += "overflows in float16."
        raise UserError(
            f"in float32 the weights take {need:.1f} GB of the {free:.1f} GB that are free. Take a smaller base or "
            f"a larger GPU; --dtype float32 tries it all the same.\n  {advice}"
        )
    return device, torch.float32


def _parameters(config: dict) -> float:
    """How many the base has; infinity where that cannot be read: the check of the base model says why."""
    try:
        return meta_model(config).num_parameters()
    except UserError:
        return float("inf")


def load_base(config: dict, device: torch.device, dtype: torch.dtype):
    """The base in `dtype` on `device`. Raises UserError where weights are missing or cannot be loaded."""
    model, loaded = load_pretrained(AutoModelForCausalLM, config, output_loading_info=True, dtype=dtype, **LOADING)
    if missing := loaded["missing_keys"]:  # transformers would go on with random numbers in their place
        raise UserError(f"{config['model']} lacks {len(missing)} of its weights, like {min(missing)}. Copy it again.")
    model.name_or_path = base_name(config)[0]  # PEFT writes it to the adapter's config
    # Without the base's own ways to sample (repetition_penalty, min_p): `generate` would take them where we say nothing.
    tokens = {key: getattr(model.generation_config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**tokens)
    return model if is_sharded() else model.to(device)


def is_sharded() -> bool:
    """Whether accelerate launch is to shard the weights over the processes (FSDP, ZeRO): then no GPU has all of them."""
    return any(os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true" for name in ("FSDP", "DEEPSPEED"))


def load_reward_base(config: dict, device: torch.device, dtype: torch.dtype):
    """The base with a new head of one output, to be trained as a reward model."""
    options = {"num_labels": 1, "dtype": dtype, "output_loading_info": True, **LOADING}
    model, loaded = load_pretrained(AutoModelForSequenceClassification, config, **options)
    if missing := [key for key in loaded["missing_keys"] if key != "score.weight"]:  # would be random, and not be saved
        raise UserError(f"{config['model']} cannot become a reward model: no weights for {missing[0]}. Take another base.")
    model.name_or_path = base_name(config)[0]
    return new_reward_head(model.to(device))


def new_reward_head(model):
    """`model` with a new head of one output in float32, whatever its base is in: bfloat16 would lose the small updates."""
    text_config = model.config.get_text_config()
    features = getattr(getattr(model, "score", None), "in_features", text_config.hidden_size)  # OPT's are fewer
    model.score = Float32Linear(features, 1, bias=False, device=model.device, dtype=torch.float32)
    torch.nn.init.normal_(model.score.weight, std=getattr(text_config, "initializer_range", 0.02))
    return model


class Float32Linear(torch.nn.Linear):
    """Computes in float32 under autocast too, whatever comes in."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.float())


def meta_model(config: dict):
    """The base without its weights (on the meta device), to count and check before anything is loaded.

    Raises UserError where it is quantized, or a folder's weights are missing or cut; those of the Hub are downloaded later.
    """
    name, revision = resolve_model(config)
    model_config = load_pretrained(AutoConfig, config)
    if getattr(model_config, "quantization_config", None):
        raise UserError(f"{name} is quantized. Give the model that it was made of: --model; an adapter of one fits the other.")
    with base_load_errors(config), torch.device("meta"):
        if revision is None:
            index = files.read_json(Path(name) / "model.safetensors.index.json").get("weight_map", {})
            for part in {*index.values()} or {"model.safetensors"}:
                files.check_no_pointer(Path(name) / part)
                with safe_open(Path(name) / part, "np"):  # reads the header, and compares it with the file's size
                    pass
        model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=False)
    model.name_or_path = base_name(config)[0]
    return model


def context_length(model) -> int:
    """The longest text it can hold, in tokens."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048
