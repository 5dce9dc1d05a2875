"""The base model and the LoRA on it."""

import os
import warnings
from collections import Counter
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
)

from phi2_grpo.answers import stop_strings
from phi2_grpo.chat import end_tokens
from phi2_grpo.cli import UserError, first_line
from phi2_grpo.loading import base_of, check_adapter, check_weights, load_pretrained, resolve_model, said_where_broken

# The first release of Phi-2 fused q, k and v into Wqkv and called the output projection out_proj. transformers' native
# port has other names, and PEFT passes over a name that matches nothing as long as another one matches.
PHI_NAMES = {"Wqkv": ["q_proj", "k_proj", "v_proj"], "out_proj": ["dense"]}


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
    return model if spread() else model.to(device)


def spread() -> bool:
    """Whether accelerate launch is to spread the weights over the processes (FSDP, ZeRO): then no card has all of them."""
    return any(os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true" for name in ("FSDP", "DEEPSPEED"))


def load_judge(config: dict, device: torch.device, dtype: torch.dtype):
    """The base with a new head of one output, to be trained as a reward model."""
    options = {"num_labels": 1, "dtype": dtype, "attn_implementation": "sdpa", "use_safetensors": True}
    return new_head(load_pretrained(AutoModelForSequenceClassification, config, **options).to(device))


def new_head(model):
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


def empty_base(config: dict):
    """The base without its weights (on the meta device): for counting and checking in a second."""
    model_config = load_pretrained(AutoConfig, config)
    check_weights(config)
    with said_where_broken(config), torch.device("meta"):
        return AutoModelForCausalLM.from_config(model_config)


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


def coverage(model: PeftModel) -> tuple[Counter, int, int]:
    """Adapted modules by kind, trainable parameters, all parameters of the base."""
    kinds = Counter(name.split(".")[-1] for name, module in model.named_modules() if hasattr(module, "lora_A"))
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    base = sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" not in name)
    return kinds, trainable, base


def describe_coverage(model: PeftModel) -> str:
    """One line: how many modules of which kind carry LoRA, and the trainable share."""
    kinds, trainable, base = coverage(model)
    listing = ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))
    return f"{sum(kinds.values())} modules ({listing}); {trainable:,} trainable of {base:,}, {trainable / base:.2%}"


def wrap_empty(config: dict) -> PeftModel:
    """The base with its LoRA and without weights, to check the targets before anything is loaded."""
    model = empty_base(config)
    if config["init_adapter"]:
        with warnings.catch_warnings(action="ignore"):  # torch says of each weight that it has no place: so it should be
            return load_adapter(model, config["init_adapter"], is_trainable=True)
    with torch.device("meta"):
        return get_peft_model(model, lora_config(config, model))


def cache_bytes_per_token(config, dtype: torch.dtype) -> int:
    """Keys and values of one token in all layers."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_dim * dtype.itemsize


def generation_config(tokenizer, config: dict, context: int) -> GenerationConfig:
    """For readers of an adapter folder: how to chat with it. Stop strings need `generate(..., tokenizer=tokenizer)`.

    A chat gets more tokens than a training's completions, within half of the `context`: so that it is seen who ends by itself.
    """
    return GenerationConfig(
        eos_token_id=end_tokens(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=min(max(256, 4 * config["max_completion_length"]), context // 2),
        do_sample=True,
        temperature=config["chat_temperature"],
        top_p=config["chat_top_p"],
        stop_strings=stop_strings(tokenizer) or None,
    )


def saved_generation_config(adapter: Path, tokenizer, config: dict, context: int) -> GenerationConfig:
    """The same, read back; made anew where an adapter trained elsewhere has none. Raises UserError where it is broken."""
    if not (adapter / "generation_config.json").is_file():
        return generation_config(tokenizer, config, context)
    try:
        found = GenerationConfig.from_pretrained(str(adapter))
        for key in ("temperature", "top_p", "top_k", "max_new_tokens"):
            float(getattr(found, key) or 0)
        return found
    except Exception as error:  # of no JSON, of JSON that is no object, of a value that transformers refuses
        raise UserError(f"{adapter / 'generation_config.json'} is broken: {first_line(error)}. Copy it again whole.") from None


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
    check_all_in_place(model, path, name)
    return model


def check_all_in_place(model: PeftModel, folder: Path, name: str = "default") -> None:
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
            f"base model or saved otherwise; it names {base_of(folder)[0] or 'none'}. Take the right one (--model)."
        )


def context_of(model) -> int:
    """The longest text it can hold, in tokens."""
    return getattr(model.config, "max_position_embeddings", None) or 2048
