"""A reward model as a reward: a sequence-classification head of one output, on the policy's own base wherever that can be.

One base, three roles. The policy is the base with its adapter, the KL's reference is the base with that adapter off, and a
reward model trained on the same base is that base with another adapter and a head. So the reward model here is a second tree of
modules over the very tensors of the policy's base: judging costs an adapter, not another copy of the weights, and touches
nothing of the policy. A reward model on another base is loaded beside it.
"""

from pathlib import Path

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from phi2_grpo.common import files
from phi2_grpo.common.cli import UserError, first_line
from phi2_grpo.models.base import context_length, is_same_base, new_reward_head
from phi2_grpo.models.lora import check_finite, check_keys
from phi2_grpo.models.tokenizer import batches_by_length, prepare_tokenizer

HUB_FILES = [
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.jinja",
]  # what is taken from the Hub: no pickles, no code


class RewardModel:
    """Pays for what its model scores as good: its score, centred and scaled to the spread it has for human replies.

    Args:
        name: the folder or Hub id of a sequence-classification model with one output, or of a PEFT adapter of one.

    Raises UserError where that cannot be found, is incomplete or gives no single score. One on the Hub is
    downloaded here; nothing large comes into memory before `load`.
    """

    def __init__(self, name: str):
        self.name, self.folder = name, _locate(name)
        self.__name__ = self.folder.name if Path(name).expanduser().is_dir() else name.rpartition("/")[2]
        self.adapter = (self.folder / "adapter_config.json").is_file()
        try:
            self._look()
            self._read_scale()
        except UserError:
            raise
        except Exception as error:  # json, safetensors, PEFT and transformers raise a dozen kinds for what they cannot read
            raise UserError(f"the reward model {name} is broken: {first_line(error)}") from None
        self.model = None

    def _read_scale(self) -> None:
        """Sets `mean` and `std` from run.json; 0 and 1 where it has none."""
        scale = files.read_run(self.folder).get("scores")
        self.scaled = scale is not None
        self.mean, self.std = (scale["mean"], scale["std"]) if self.scaled else (0.0, 1.0)
        if not (abs(self.mean) < 1e6 and 1e-6 < self.std < 1e6):  # NaN is in no range
            raise ValueError(f"run.json has the scores {scale}, but mean and std must be numbers, std above 0")

    def _look(self) -> None:
        """Sets `base`, (name, revision) of the model under the adapter, after a look at the files."""
        if not self.adapter:
            config = AutoConfig.from_pretrained(self.folder)
            kinds = config.architectures or []
            if not any(kind.endswith("ForSequenceClassification") for kind in kinds):
                raise UserError(
                    f"{self.name} is {', '.join(kinds) or 'no model'}, not a sequence-classification (reward) model."
                )
            labels, self.base = config.num_labels, (str(self.folder), None)
        else:
            weights = self.folder / "adapter_model.safetensors"
            if not weights.is_file() or not weights.stat().st_size:
                raise UserError(f"the reward model {self.name} is incomplete: {weights.name} is missing or empty.")
            check_finite(weights)
            config = PeftConfig.from_pretrained(self.folder)
            self.base = (config.base_model_name_or_path, config.revision)
            if not self.base[0]:
                raise UserError(f"the reward model {self.name} is broken: its adapter_config.json names no base model.")
            with safe_open(weights, "pt") as tensors:
                heads = [key for key in tensors.keys() if key.endswith(("score.weight", "classifier.weight"))]  # noqa: SIM118
                labels = tensors.get_slice(heads[0]).get_shape()[0] if heads else 0
        if labels == 0:
            raise UserError(f"{self.name} is an adapter without a head, not a reward model. train_reward.py makes one.")
        if labels != 1:
            raise UserError(f"the reward model {self.name} has {labels} labels, but a reward is one number. Take one with one.")

    def shares_base_of(self, config: dict) -> bool:
        """Whether it was trained on the very base that `config` names."""
        return self.adapter and is_same_base(self.base, config)

    def describe(self, config: dict) -> str:
        """One line: on whose weights it judges, and how its scores are scaled."""
        where = (
            "on the policy's own weights" if self.shares_base_of(config) else f"on another base, {self.base[0]}: loaded beside"
        )
        scale = f"scores less {self.mean:.2f}, by {self.std:.2f}" if self.scaled else "raw scores, for its folder has no scale"
        return f"{self.__name__} {where}; {scale}"

    def extra_bytes(self, config: dict, dtype: torch.dtype) -> int:
        """What it adds to the policy's memory: its adapter and head, and its base where that is another."""
        own = sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))
        if not self.adapter or self.shares_base_of(config):
            return own
        try:
            base = AutoConfig.from_pretrained(self.base[0], **self._where())
        except (OSError, ValueError) as error:
            raise UserError(
                f"the base of the reward model {self.name}, {self.base[0]}, cannot be loaded: {first_line(error)}"
            ) from None
        with torch.device("meta"):
            return own + AutoModelForSequenceClassification.from_config(base).num_parameters() * dtype.itemsize

    def _where(self) -> dict:
        name, revision = self.base
        return {"revision": revision} if revision and not Path(name).exists() else {}

    def load(self, config: dict, policy_base, device: torch.device, dtype: torch.dtype) -> None:
        """Make it ready to judge. Changes neither the policy's base nor the random state.

        Args:
            policy_base: the base model of the policy, before LoRA is put on it.

        Raises UserError where the weights cannot be had, or do not fit.
        """
        cuda = [device] if device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=cuda):
                shared = self.shares_base_of(config)
                model = self._shared(policy_base) if shared else self._beside(device, dtype)
                if self.adapter:
                    model = PeftModel.from_pretrained(model, str(self.folder), torch_device="cpu")
                    check_keys(model, self.folder)
            self.tokenizer = self._tokenizer()
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"the reward model {self.name} cannot be loaded on {self.base[0]}: {first_line(error)}") from None
        # Where the last token of a text is found; an answer never holds it, for it is trimmed.
        model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        self.model = model.to(device).eval().requires_grad_(False)

    def _tokenizer(self):
        """Its own, with a chat template. Raises UserError where it has none: it would judge texts it was not trained on."""
        own = (self.folder / "tokenizer.json").is_file()
        tokenizer = AutoTokenizer.from_pretrained(self.folder if own else self.base[0], **({} if own else self._where()))
        if tokenizer.chat_template is None:
            raise UserError(
                f"the tokenizer of the reward model {self.name} has no chat template, so nobody knows what it judges."
            )
        if len(tokenizer) < 100:  # transformers makes an empty one where the files are missing
            raise UserError(f"the tokenizer of the reward model {self.name} is incomplete: it has {len(tokenizer)} tokens.")
        prepare_tokenizer(tokenizer)
        tokenizer.padding_side = "right"
        return tokenizer

    def _shared(self, policy_base):
        config = type(policy_base.config).from_dict({**policy_base.config.to_dict(), "num_labels": 1})
        with init_empty_weights(include_buffers=False):
            model = AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa")
        # The same tensors, not copies: `assign` takes them as they are.
        backbone = policy_base.base_model.state_dict()
        model.base_model.load_state_dict(backbone, assign=True)
        return new_reward_head(model)

    def _beside(self, device: torch.device, dtype: torch.dtype):
        options = {"num_labels": 1, "dtype": dtype, "attn_implementation": "sdpa", "use_safetensors": True, **self._where()}
        model = AutoModelForSequenceClassification.from_pretrained(self.base[0], **options).to(device)
        return new_reward_head(model) if self.adapter else model

    def judge(self, prompts: list[list[dict]], answers: list[str]) -> list[float]:
        """Raw scores of answers (texts) to conversations."""
        return score_answers(self.model, self.tokenizer, prompts, answers)

    def __call__(self, prompts: list[list[dict]], answers: list[str], **_) -> list[float]:
        return [(score - self.mean) / self.std for score in self.judge(prompts, answers)]


@torch.no_grad()
def score_answers(model, tokenizer, prompts: list[list[dict]], answers: list[str]) -> list[float]:
    """Raw scores of answers (texts) to conversations, seen as `RewardTrainer` shows them in training.

    `model` is in eval mode, `tokenizer` pads on the right.
    """
    texts = render_conversations(tokenizer, prompts, answers)
    options = {"truncation": True, "max_length": context_length(model), "add_special_tokens": False}
    texts = tokenizer(texts, **options)["input_ids"]
    scores = [0.0] * len(texts)
    for batch in batches_by_length(list(map(len, texts))):  # by tokens: sixteen long texts would take more than a training step
        inputs = tokenizer.pad({"input_ids": [texts[i] for i in batch]}, return_tensors="pt").to(model.device)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]  # (B, T)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # (B, 1)
        for i, score in zip(batch, logits[:, 0].tolist(), strict=True):
            scores[i] = score
    return scores


def render_conversations(tokenizer, prompts: list[list[dict]], answers: list[str]) -> list[str]:
    """What a reward model sees: prompt and answer under its chat template."""
    talks = [[*prompt, {"role": "assistant", "content": answer}] for prompt, answer in zip(prompts, answers, strict=True)]
    return [tokenizer.apply_chat_template(talk, tokenize=False) for talk in talks]


def _locate(name: str) -> Path:
    """The folder of a reward model; fetched from the Hub where `name` is none of this machine."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not any((path / file).is_file() for file in ("adapter_config.json", "config.json")):
            raise UserError(f"--rewards: the folder {name} holds no model (no adapter_config.json and no config.json).")
        return path.resolve()
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # the Hub, the network and the name check each have their own
        raise UserError(f"--rewards: {name} is no folder here, and cannot be had from the Hub: {first_line(error)}") from None
