"""What the trainer overrides of TRL's: log-probs and gradients of packed rows are TRL's own."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

from config import CONFIG
from phi2_grpo.models.tokenizer import load_tokenizer
from phi2_grpo.rewards import collapse
from phi2_grpo.rollout.engine import FastEngine, GenerateEngine
from phi2_grpo.training.trainer import Trainer, switch_off_dropout, training_arguments

ROWS = [(3, 9), (12, 1), (1, 14), (7, 7), (12, 14), (7, 0), (7, 2)]  # tokens of prompt and completion
PROMPT, COMPLETION = 12, 14  # prompts of one length are the same


def make_model(kind: str):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                  num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64, initializer_range=0.3, resid_pdrop=0.0,
                                  embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    add_fused_lm_head(model, temperature=0.8, outputs=("log_probs", "entropy"))
    return model


def padded_rows() -> tuple[torch.Tensor, torch.Tensor]:
    """As TRL pads them: prompts on the left, completions on the right."""
    ids, mask = torch.zeros(2, len(ROWS), PROMPT + COMPLETION, dtype=torch.long)
    for row, (prompt, completion) in enumerate(ROWS):
        real = slice(PROMPT - prompt, PROMPT + completion)
        ids[row, real], mask[row, real] = torch.randint(3, 60, (prompt + completion,)), 1
        ids[row, PROMPT - prompt : PROMPT] = torch.arange(prompt) + 3
    return ids, mask


def log_probs(of, model, ids, mask, **options):
    """By the method of class `of`, with the gradient of a weighted sum."""
    trainer = Trainer.__new__(Trainer)
    trainer.accelerator = SimpleNamespace(autocast=nullcontext, is_main_process=True, unwrap_model=lambda model: model)
    trainer.args = SimpleNamespace(report_to=[])
    trainer.temperature = 0.8
    model.zero_grad()
    logps, entropies, _ = of._get_per_token_logps_and_entropies(trainer, model, ids, mask, COMPLETION, **options)
    weights = torch.linspace(-1, 1, logps.numel()).reshape(logps.shape) * mask[:, -COMPLETION:]
    (logps * weights).sum().backward()
    return logps.detach(), entropies, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["phi", "llama", "qwen3"])
def test_log_probs_entropies_and_gradients_are_trl_s(kind, checkpointing):
    model, (ids, mask) = make_model(kind), padded_rows()
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable()
    passes, forward = [], model.model.forward
    model.model.forward = lambda *a, **k: (passes.append(k["input_ids"].shape), forward(*a, **k))[1]
    theirs = log_probs(GRPOTrainer, model, ids, mask, compute_entropy=True)
    completion_mask = mask[:, -COMPLETION:]
    # A completion takes as many tokens as it has, its prompt one less, once in a pass, which has 2 x 32 tokens at most, or 26.
    for limit, expected in ((None, [64, 6 + 2]), (1, [2 + 9 + 11 + 1, 11 + 14, 14, 6 + 7 + 2])):
        passes.clear()
        ours = log_probs(Trainer, model, ids, mask, batch_size=limit, compute_entropy=True)
        for mine, their in zip(ours[:2], theirs[:2], strict=True):
            assert torch.allclose(mine, their * completion_mask, atol=2e-5)
        assert torch.allclose(ours[2], theirs[2], atol=2e-5)
        assert passes[: len(expected)] == [(1, length) for length in expected]  # with checkpointing they come twice


def test_positions_count_from_a_row_s_own_start():
    """Of a model with absolute positions, too, where TRL's count the padding."""
    model, (ids, mask) = make_model("gpt2"), padded_rows()
    ours = log_probs(Trainer, model, ids, mask)[0]
    for row, (prompt, completion) in enumerate(ROWS):
        text = ids[row, mask[row] == 1][None]
        alone = (model(text).logits[0, :-1] / 0.8).log_softmax(-1).gather(1, text[0, 1:, None])[prompt - 1 :, 0]
        assert torch.allclose(ours[row, :completion], alone, atol=2e-5)


def test_no_dropout_is_left_on():
    """OPT's rate is a number of its layers, which TRL's own `disable_dropout` passes over."""
    shape = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("opt", vocab_size=99, **shape)).train()
    ids = torch.arange(9)[None]
    disable_dropout_in_model(model)
    assert not torch.equal(model(ids).logits, model(ids).logits)
    switch_off_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)


class FromTheBase(FastEngine):
    """Samples from the base, as a trainer does that forgets the adapter."""

    def __call__(self, *arguments, **keywords):
        with self.model.disable_adapter():
            return super().__call__(*arguments, **keywords)


@pytest.mark.parametrize("engine", [FastEngine, GenerateEngine, FromTheBase])
def test_a_rollout_that_is_not_the_policy_s_raises_an_alert(micro, tmp_path, engine):
    settings = {"num_generations": 4, "max_completion_length": 12, "per_device_train_batch_size": 4, "beta": 0.01,
                "gradient_accumulation_steps": 2, "max_steps": collapse.WINDOW, "learning_rate": 1e-4, "report_to": "none",
                "save_strategy": "no", "temperature": 0.9, "output_dir": str(tmp_path)}  # fmt: skip
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(micro, attn_implementation="sdpa"),
        reward_funcs=lambda completion_ids, **_: [len(set(ids)) / 12 for ids in completion_ids],
        args=training_arguments(GRPOConfig, settings, torch.device("cpu"), torch.float32, disable_dropout=True),
        train_dataset=Dataset.from_list([{"prompt": "Why?"}, {"prompt": "How do you do it?"}] * 20),
        processing_class=load_tokenizer({**CONFIG, "model": str(micro)}),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    policy = trainer.accelerator.unwrap_model(trainer.model)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    trainer.engine = engine(policy)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "reward" in row]
    differences = [row.get("sampling/sampling_logp_difference/mean") for row in rows]
    raised = {alert.metric for alert in collapse.alerts(rows, set()) if "sampling" in alert.metric}
    if engine is FromTheBase:
        assert raised == {"sampling/sampling_logp_difference/mean", "sampling/nearer_to_reference"} and min(differences) > 0.1
    else:
        known = engine is FastEngine
        assert not raised and all((value is not None and value < 1e-4) if known else value is None for value in differences)
