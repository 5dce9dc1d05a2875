"""LoRA on the base: which modules carry it, how much is trained, and the loading of adapters."""

from collections import Counter
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from transformers.pytorch_utils import Conv1D

from config import CONFIG, PRESETS
from phi2_grpo.common import files
from phi2_grpo.common.cli import UserError, load_errors
from phi2_grpo.models.base import base_name, base_of, is_same_base, meta_model

# The first release of Phi-2 fused q, k and v into Wqkv and called the output projection out_proj. transformers' native
# port has other names, and PEFT passes over a name that matches nothing as long as another one matches.
PHI_NAMES = {"Wqkv": ["q_proj", "k_proj", "v_proj"], "out_proj": ["dense"]}
LINEAR = (torch.nn.Linear, Conv1D)  # GPT-2's layers are of the second kind
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # values of init_lora_weights
REMEDY = "The adapter is broken, or was trained on another base model: copy it again, or give that base with --model."


def resolve_lora(config: dict, model) -> LoraConfig:
    """The LoRA to train: that of `init_adapter` where one is given, else the settings'. Raises UserError."""
    if not config["init_adapter"]:
        return lora_config(config, model)
    path = check_adapter(config["init_adapter"])
    with load_errors(f"{path} cannot be loaded", REMEDY):
        lora = LoraConfig.from_pretrained(str(path))
    lora.inference_mode = False
    lora.base_model_name_or_path, lora.revision = base_name(config)
    return lora


def lora_config(config: dict, model, task_type: str = "CAUSAL_LM") -> LoraConfig:
    """The settings' LoRA for `model`. Phi's module names, old or new, reach those of the native port; on another architecture
    the default, which has Phi's names, means all linear layers but the head.

    `task_type` SEQ_CLS trains the head too. Raises UserError for a name that matches no linear module of the model.
    """
    is_phi, targets = model.config.model_type == "phi", config["lora_target_modules"]
    names = PHI_NAMES if is_phi else {}
    if not is_phi and targets == CONFIG["lora_target_modules"]:
        targets = ["all-linear"]
    modules: str | list[str] = sorted({new for target in targets for new in names.get(target, [target])})
    linear = Counter(name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, LINEAR))
    if modules == ["all-linear"]:
        modules = "all-linear"
    elif not modules or (missing := [module for module in modules if module not in linear]):
        listing = ", ".join(f"{name} ({count})" for name, count in sorted(linear.items()))
        raise UserError(
            f"--lora_target_modules: {', '.join(missing) if modules else 'an empty list'} matches no linear layer of "
            f"{config['model']}. It has: {listing}; or give all-linear."
        )
    sees_or_hears = any(hasattr(model.config, f"{kind}_config") for kind in ("vision", "audio"))
    name, revision = base_name(config)
    return LoraConfig(
        r=config["lora_r"],
        lora_alpha=config["lora_alpha"],
        target_modules=modules,
        exclude_modules=r".*(vision|visual|image|audio|multi_modal).*" if sees_or_hears else None,
        base_model_name_or_path=name,
        revision=revision,
        task_type=task_type,
    )


def meta_lora_model(config: dict) -> PeftModel:
    """The base with its LoRA and without weights, to check both before anything is loaded. Raises UserError."""
    model = meta_model(config)
    lora, adapter = resolve_lora(config, model), config["init_adapter"]
    with load_errors(f"{adapter or 'LoRA'} cannot be put on {config['model']}", REMEDY), torch.device("meta"):
        wrapped = get_peft_model(model, lora)
    if adapter:
        check_keys(wrapped, Path(adapter))
    return wrapped


def lora_counts(model: PeftModel) -> tuple[Counter, int, int]:
    """Adapted modules by kind, trainable parameters, all parameters of the base."""
    kinds = Counter(name.split(".")[-1] for name, module in model.named_modules() if hasattr(module, "lora_A"))
    trainable, total = model.get_nb_trainable_parameters()
    return kinds, trainable, total - trainable


def lora_summary(model: PeftModel) -> str:
    """One line: how many modules of which kind carry LoRA, and the trainable share."""
    kinds, trainable, base = lora_counts(model)
    listing = ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))
    return f"{sum(kinds.values())} modules ({listing}); {trainable:,} trainable of {base:,}, {trainable / base:.2%}"


def check_same_base(adapters: list[Path], config: dict) -> None:
    """Raise UserError unless all adapters name the same base, at the same revision, which is that of `config`."""
    named = [(base, revision or "main") for base, revision in map(base_of, adapters)]
    if len(set(named)) > 1 or not is_same_base(named[0], config):
        bases = [f"{adapter} on {base} ({revision})" for adapter, (base, revision) in zip(adapters, named, strict=True)]
        text = "different bases, or others than --preset and --model_revision name"
        raise UserError(f"{text}: {', '.join(bases)}. Give one that fits them: --model")


def check_adapter(folder: str) -> Path:
    """The folder of a complete LoRA adapter. Raises UserError saying what is missing or wrong."""
    path = Path(folder)
    if not path.is_dir():
        run = path.with_name(path.name.removesuffix("-final"))
        there = [f"the run in {run} has not ended (--resume)"] if any(run.glob("checkpoint-*")) else []
        there += [f"--preset {name} has one" for name, its in PRESETS.items() if Path(its.get("adapter", "?")).is_dir()]
        fetch = "`hf download USER/NAME --local-dir FOLDER` fetches one"
        raise UserError(f"no adapter at {folder}. {'; '.join(['train_grpo.py makes one', fetch, *there])}.")
    saved, weights = files.read_json(path / "adapter_config.json"), path / "adapter_model.safetensors"
    if not saved or not weights.is_file():
        raise UserError(
            f"{folder} is no adapter: it needs adapter_config.json, as PEFT writes it, and {weights.name}. Copy it again; of a "
            f"training's folder give its result, {path}-final, or {path}/checkpoint-N."
        )
    if (kind := saved.get("peft_type", "LORA")) != "LORA":
        raise UserError(f"{folder} is an adapter of the kind {kind}, and this project uses LoRA alone. Give a LoRA adapter.")
    if saved.get("bias", "none") != "none" or str(saved.get("init_lora_weights")).lower().startswith(CHANGES_BASE):
        text = "changes weights of its base, which is another model then, the adapter off. Give a plain LoRA"
        raise UserError(f"{folder} {text} (bias none, init_lora_weights true).")
    check_finite(weights)
    with safe_open(weights, "pt") as tensors:
        ranks = [tensors.get_slice(key).get_shape()[0] for key in tensors.keys() if ".lora_A." in key]  # noqa: SIM118, no dict
    rank = saved.get("r")
    if ranks and isinstance(rank, int) and rank > max(ranks) and not saved.get("rank_pattern"):  # PEFT would allocate it
        raise UserError(f"{folder} names the rank {rank}, and its weights have {max(ranks)}. {REMEDY}")
    return path


def check_finite(weights: Path) -> None:
    """Raise UserError where a safetensors file cannot be read, or holds NaN or infinity."""
    files.check_no_pointer(weights)
    with load_errors(f"{weights} is broken", "Copy it again."), safe_open(weights, "pt") as tensors:
        names = list(tensors.keys())
        bad = [name for name in names if not tensors.get_tensor(name).isfinite().all()]
    if bad:
        raise UserError(
            f"{weights} holds weights that are not finite ({len(bad)} of {len(names)} tensors, like {bad[0]}): its training "
            "diverged. Take an earlier checkpoint, or train again."
        )


def load_adapter(model, folder: str, name: str = "default") -> PeftModel:
    """`model` with the adapter of `folder` on it, called `name`.

    A base is wrapped: with `disable_adapter()` it answers as before. A policy, which has an adapter, gets another, to which
    `set_adapter` switches. Raises UserError where the adapter is broken, or was made for another base.
    """
    path = check_adapter(folder)
    with load_errors(f"{path} cannot be loaded", REMEDY):
        if isinstance(model, PeftModel):
            model.load_adapter(str(path), adapter_name=name, torch_device="cpu")
        else:
            model = PeftModel.from_pretrained(model, str(path), adapter_name=name, torch_device="cpu")
    check_keys(model, path, name)
    return model


def check_keys(model: PeftModel, folder: Path, name: str = "default") -> None:
    """Raise UserError unless `folder` and the adapter in `model` have the same weights, by name and shape.

    PEFT ignores those that the model lacks, and leaves at zero those that the folder lacks.
    """
    with safe_open(folder / "adapter_model.safetensors", "pt") as weights:
        saved = {(key, tuple(weights.get_slice(key).get_shape())) for key in weights.keys()}  # noqa: SIM118, it is no dict
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    expected = {(key, tuple(value.shape)) for key, value in state.items()}
    missing = {key for key, _ in expected - saved}
    # Beside an adapted embedding PEFT saves the embedding itself, a weight of the base.
    unexpected = {key for key, _ in saved - expected - {(key, tuple(value.shape)) for key, value in model.state_dict().items()}}
    if missing or unexpected:
        raise UserError(
            f"the weights of {folder} do not fit {model.config.name_or_path}: {len(missing)} of {len(expected)} are missing, "
            f"{len(unexpected)} have no place there, like {min(missing | unexpected)}. The adapter was trained on another base "
            f"or saved otherwise; it names {base_of(folder)[0] or 'none'}. Give the right one: --model"
        )
