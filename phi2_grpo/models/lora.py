"""LoRA on the base: which modules carry it, what was adapted, and adapters that are loaded."""

import warnings
from collections import Counter
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open

from phi2_grpo.common import files
from phi2_grpo.common.cli import UserError, first_line
from phi2_grpo.models.base import base_of_adapter, is_same_base, meta_model, resolve_model


def check_same_base(adapters: list[Path], config: dict | None) -> None:
    """Raise UserError unless all adapters name the same base, at the same revision; with `config`, the base that it names."""
    named = [base_of_adapter(adapter) for adapter in adapters]
    bases = [f"{name} ({revision or 'no revision'})" for name, revision in named]
    if len(set(bases)) > 1:
        pairs = ", ".join(f"{adapter} is on {base}" for adapter, base in zip(adapters, bases, strict=True))
        raise UserError(f"the adapters have different bases, so they cannot be compared prompt by prompt on one: {pairs}.")
    if config is not None and not is_same_base(named[0], config):
        raise UserError(
            f"the adapter {adapters[0]} was trained on {bases[0]}, and {config['model']} is another base. Give the right one "
            "with --model (or this one, to insist)."
        )


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


# The first release of Phi-2 fused q, k and v into Wqkv and called the output projection out_proj. transformers' native
# port has other names, and PEFT passes over a name that matches nothing as long as another one matches.
PHI_NAMES = {"Wqkv": ["q_proj", "k_proj", "v_proj"], "out_proj": ["dense"]}


def lora_config(config: dict, model, task_type: str = "CAUSAL_LM") -> LoraConfig:
    """The LoRA for `model`. Phi's module names, old or new, reach what the native port has. SEQ_CLS trains the head, too.

    Raises UserError for a name that matches no linear module of the model.
    """
    targets = config["lora_target_modules"]
    if targets == ["all-linear"]:
        modules: str | list[str] = "all-linear"
    else:
        present = Counter(name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
        if getattr(model.config, "model_type", "") == "phi":
            modules = sorted({new for target in targets for new in PHI_NAMES.get(target, [target])})
        else:
            modules = sorted(set(targets))
        missing = [module for module in modules if module not in present]
        if missing or not modules:
            listing = ", ".join(f"{name} ({count})" for name, count in sorted(present.items()))
            raise UserError(
                f"--lora_target_modules: {', '.join(missing) or 'an empty list'} matches no linear layer of "
                f"{config['model']}. It has: {listing}; or give all-linear."
            )
    name, revision = resolve_model(config)
    return LoraConfig(
        r=config["lora_r"],
        lora_alpha=config["lora_alpha"],
        lora_dropout=config["lora_dropout"],
        target_modules=modules,
        base_model_name_or_path=name,
        revision=revision,
        task_type=task_type,
    )


def resolve_lora(config: dict, model) -> LoraConfig:
    """The LoRA to train: that of `init_adapter` where one is given, else the settings'. Raises UserError."""
    if not config["init_adapter"]:
        return lora_config(config, model)
    path = check_adapter(config["init_adapter"])
    try:
        lora = LoraConfig.from_pretrained(str(path))
    except Exception as error:  # PEFT raises a dozen kinds for a config that it cannot read
        raise UserError(f"{path / 'adapter_config.json'} is broken: {first_line(error)}. Copy it again.") from None
    lora.inference_mode = False
    lora.base_model_name_or_path, lora.revision = resolve_model(config)
    return lora


def lora_counts(model: PeftModel) -> tuple[Counter, int, int]:
    """Adapted modules by kind, trainable parameters, all parameters of the base."""
    kinds = Counter(name.split(".")[-1] for name, module in model.named_modules() if hasattr(module, "lora_A"))
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    base = sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" not in name)
    return kinds, trainable, base


def lora_summary(model: PeftModel) -> str:
    """One line: how many modules of which kind carry LoRA, and the trainable share."""
    kinds, trainable, base = lora_counts(model)
    listing = ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))
    return f"{sum(kinds.values())} modules ({listing}); {trainable:,} trainable of {base:,}, {trainable / base:.2%}"


def meta_lora_model(config: dict) -> PeftModel:
    """The base with its LoRA and without weights, to check the targets before anything is loaded."""
    model = meta_model(config)
    if config["init_adapter"]:
        with warnings.catch_warnings(action="ignore"):  # torch says of each weight that it has no place: so it should be
            return load_adapter(model, config["init_adapter"], is_trainable=True)
    with torch.device("meta"):
        return get_peft_model(model, lora_config(config, model))


def load_adapter(model, folder: str, name: str = "default", **options) -> PeftModel:
    """`model` with the adapter of `folder` on it, called `name`.

    A base is wrapped (`disable_adapter()` is its voice then); a policy, which has one, gets another, to which `set_adapter`
    switches. Raises UserError where the adapter is broken, or was made for a model of other shapes.
    """
    path = check_adapter(folder)
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(str(path), adapter_name=name, torch_device="cpu")
        else:
            model = PeftModel.from_pretrained(model, str(path), adapter_name=name, torch_device="cpu", **options)
    except Exception as error:  # PEFT, safetensors and json raise a dozen kinds for a folder that does not fit
        raise UserError(
            f"the adapter {folder} cannot be put on {model.config.name_or_path}: {first_line(error)}\n"
            "  It is broken, or was trained on another base model; give that one with --model."
        ) from None
    check_keys(model, path, name)
    return model


def check_keys(model: PeftModel, folder: Path, name: str = "default") -> None:
    """Raise UserError unless each weight in `folder` has its place in `model`, and each place its weight, by their names.

    PEFT passes over what has no place, and leaves at zero what it has no weights for.
    """
    with safe_open(folder / "adapter_model.safetensors", "pt") as weights:
        saved = set(weights.keys())
    expected = set(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
    # Beside an adapted embedding PEFT saves the embedding itself, a weight of the base.
    missing, unexpected = sorted(expected - saved), sorted(saved - expected - model.state_dict().keys())
    if missing or unexpected:
        wrong = [f"{len(keys)} {what}, like {keys[0]}" for keys, what in ((unexpected, "have no place there"),
                                                                          (missing, "are missing")) if keys]  # fmt: skip
        raise UserError(
            f"the weights of {folder} do not fit {model.config.name_or_path}: {'; '.join(wrong)}. It was trained on another "
            f"base model or saved otherwise; it names {base_of_adapter(folder)[0] or 'none'}. Take the right one (--model)."
        )
