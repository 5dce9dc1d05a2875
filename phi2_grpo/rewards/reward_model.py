"""A reward model as a reward: a sequence-classification head of one output, on the policy's own base wherever that can be.

One base, three roles. The policy is the base with its adapter. The KL's reference is the base with that adapter off. A reward
model trained on the same base is that base with another adapter and a head: here a second tree of modules over the very
tensors of the policy's base. So it costs an adapter, not another copy of the weights, and changes nothing of the policy. A
reward model on another base is loaded beside it.
"""

from pathlib import Path

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from phi2_grpo.common import files
from phi2_grpo.common.cli import UserError, load_errors
from phi2_grpo.models.base import LOADING, context_length, is_same_base, new_reward_head
from phi2_grpo.models.lora import check_finite, check_keys
from phi2_grpo.models.tokenizer import batches_by_length, prepare_tokenizer

# What is taken from the Hub: no pickles, no code.
HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja"]


class RewardModel:
    """Rewards what its model scores as good: its score, standardised to the scores it gives human replies.

    `name`: the folder or Hub id of a sequence-classification model with one output, or of a PEFT adapter of one. Raises
    UserError where that cannot be found, is incomplete or gives no single score. One on the Hub is downloaded here; nothing
    large comes into memory before `load`.
    """

    def __init__(self, name: str):
        self.name, self.model = name, None
        path = Path(name).expanduser()
        with load_errors(f"--rewards: {name} is not a folder here, and cannot be downloaded from the Hub"):
            self.folder = path.resolve() if path.is_dir() else Path(snapshot_download(name, allow_patterns=HUB_FILES))
        self.__name__ = self.folder.name if path.is_dir() else name.rpartition("/")[2]
        self.adapter = (self.folder / "adapter_config.json").is_file()
        with load_errors(f"the reward model {name} is broken"):
            labels = self._adapter_labels() if self.adapter else self._model_labels()
            scale = files.read_run(self.folder).get("scores") or {"mean": 0.0, "std": 1.0}
            self.mean, self.std = float(scale["mean"]), float(scale["std"])
            if labels != 1:
                raise UserError(f"{name} is no reward model: it has {labels} outputs, not one. train_reward.py makes one.")
            self.tokenizer = self._load_tokenizer()
            if not any(self.folder.glob("*.safetensors")):
                raise UserError(f"{name} has no weights as safetensors, and a pickle is not read. Take another reward model.")
        if not (abs(self.mean) < 1e6 and 1e-6 < self.std < 1e6):  # NaN is in no range
            raise UserError(f"{self.folder}/run.json has scores {scale}, but mean and std must be numbers, std above 0.")

    def _model_labels(self) -> int:
        """Outputs of a model without an adapter; sets `base`, (name, revision)."""
        config = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
        self.base = (str(self.folder), "main")
        kinds = config.architectures or []
        return config.num_labels if any(kind.endswith("ForSequenceClassification") for kind in kinds) else 0

    def _adapter_labels(self) -> int:
        """Outputs of an adapter's head; sets `base`, (name, revision) of the model under it."""
        config = PeftConfig.from_pretrained(self.folder)
        self.base = (config.base_model_name_or_path or "", config.revision or "main")
        weights = self.folder / "adapter_model.safetensors"
        check_finite(weights)
        with safe_open(weights, "pt") as tensors:
            names = [name for name in tensors.keys() if name.endswith(("score.weight", "classifier.weight"))]  # noqa: SIM118
            return tensors.get_slice(names[0]).get_shape()[0] if names else 0

    def shares_base_of(self, config: dict) -> bool:
        """Whether it was trained on the very base that `config` names."""
        return self.adapter and is_same_base(self.base, config)

    def describe(self, config: dict) -> str:
        """One line: on which weights it runs, and how its scores are scaled."""
        shared = self.shares_base_of(config)
        where = "on the policy's own weights" if shared else f"on another base, {self.base[0]}, loaded beside"
        if not files.read_run(self.folder).get("scores"):
            return f"{self.__name__} {where}; raw scores of any size: weigh it (NAME:0.1)"
        return f"{self.__name__} {where}; scores less {self.mean:.2f}, divided by {self.std:.2f}"

    def extra_bytes(self, config: dict, dtype: torch.dtype) -> int:
        """What it adds to the policy's memory: its adapter and head, and its base where that is another."""
        own = sum(path.stat().st_size for path in self.folder.glob("adapter_model.safetensors"))
        if self.shares_base_of(config):
            return own
        with load_errors(f"{self.base[0]}, the base of the reward model {self.name}, cannot be loaded"):
            base = AutoConfig.from_pretrained(self.base[0], revision=self.base[1], trust_remote_code=False)
            with torch.device("meta"):
                return own + AutoModelForSequenceClassification.from_config(base).num_parameters() * dtype.itemsize

    def load(self, config: dict, policy_base, device: torch.device, dtype: torch.dtype) -> None:
        """Make it ready to score. Changes neither the random state nor `policy_base`, on which no LoRA has been put yet.

        Raises UserError where the weights cannot be loaded, or do not fit.
        """
        cuda = [device] if device.type == "cuda" else []
        with load_errors(f"the reward model {self.name} cannot be put on {self.base[0]}"), torch.random.fork_rng(devices=cuda):
            shared = self.shares_base_of(config)
            model = self._on_policy_base(policy_base) if shared else self._on_own_base(device, dtype)
            if self.adapter:
                model = PeftModel.from_pretrained(model, str(self.folder), torch_device="cpu")
                check_keys(model, self.folder)
        model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        self.model = model.to(device).eval().requires_grad_(False)

    def _load_tokenizer(self):
        own = (self.folder / "tokenizer.json").is_file()
        options = {"revision": self.base[1], "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(self.folder if own else self.base[0], **options)
        if tokenizer.chat_template is None:
            raise UserError(
                f"the tokenizer of the reward model {self.name} has no chat template, so its input is unknown. Call it in a "
                "reward function of your own (docs/rewards.md)."
            )
        # The model reads the last token that is no padding, and a template may end an answer by the end token.
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.bos_token or tokenizer.unk_token
        prepare_tokenizer(tokenizer)
        tokenizer.padding_side = "right"  # the head reads the last token
        return tokenizer

    def _on_policy_base(self, policy_base):
        config = type(policy_base.config).from_dict({**policy_base.config.to_dict(), "num_labels": 1})
        with init_empty_weights(include_buffers=False):
            model = AutoModelForSequenceClassification.from_config(config)
        # The same tensors, not copies: `assign` takes them as they are.
        model.base_model.load_state_dict(policy_base.base_model.state_dict(), assign=True)
        return new_reward_head(model)

    def _on_own_base(self, device: torch.device, dtype: torch.dtype):
        options = {"num_labels": 1, "dtype": dtype, "revision": self.base[1], **LOADING}
        model = AutoModelForSequenceClassification.from_pretrained(self.base[0], **options).to(device)
        head = getattr(model, "score", None)
        if not self.adapter and (type(head) is not torch.nn.Linear or head.bias is not None):
            return model
        model = new_reward_head(model)
        if not self.adapter:  # its own head, in float32: a bfloat16 score of 20 is a multiple of 0.125
            model.score.weight.data.copy_(head.weight)
        return model

    def score(self, prompts: list[list[dict]], answers: list[str]) -> list[float]:
        """Raw scores of answers (texts) to conversations."""
        return score_answers(self.model, self.tokenizer, prompts, answers)

    def __call__(self, prompts: list[list[dict]], answers: list[str], **_) -> list[float]:
        return [(score - self.mean) / self.std for score in self.score(prompts, answers)]


@torch.no_grad()
def score_answers(model, tokenizer, prompts: list[list[dict]], answers: list[str]) -> list[float]:
    """Raw scores of answers (texts) to conversations, rendered as `RewardTrainer` renders them in training.

    `model` is in eval mode, `tokenizer` pads on the right.
    """
    texts = render_conversations(tokenizer, prompts, answers)
    options = {"truncation": True, "max_length": context_length(model), "add_special_tokens": False}
    ids = tokenizer(texts, **options)["input_ids"]
    scores = [0.0] * len(ids)
    for batch in batches_by_length(list(map(len, ids))):
        inputs = tokenizer.pad({"input_ids": [ids[i] for i in batch]}, return_tensors="pt").to(model.device)  # (B, T)
        logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits  # (B, 1)
        for i, score in zip(batch, logits[:, 0].tolist(), strict=True):
            scores[i] = score
    return scores


def render_conversations(tokenizer, prompts: list[list[dict]], answers: list[str]) -> list[str]:
    """What a reward model sees: prompt and answer under its chat template."""
    histories = [[*prompt, {"role": "assistant", "content": answer}] for prompt, answer in zip(prompts, answers, strict=True)]
    return [tokenizer.apply_chat_template(history, tokenize=False) for history in histories]
