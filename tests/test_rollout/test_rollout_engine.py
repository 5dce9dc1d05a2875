"""The rollout engine against transformers' generate, and against what it must not do."""

import random

import pytest
import torch
from conftest import make_micro
from peft import LoraConfig, get_peft_model
from scipy.stats import chi2_contingency, chisquare
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

from config import CONFIG
from phi2_grpo.evaluation import measure
from phi2_grpo.models.answers import chat_generation_config
from phi2_grpo.models.tokenizer import batches_by_length
from phi2_grpo.rollout.cache import LENGTH_MULTIPLE, DecodeState
from phi2_grpo.rollout.engine import FastEngine, GenerateEngine, choose_engine, make_engine
from phi2_grpo.rollout.phi_step import unsupported_reason
from phi2_grpo.rollout.sampling import Sampling, truncate_at_eos

TARGETS = ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"]


def make_policy(folder, dtype=torch.float32, seed=0, rank=4, head=0.3):
    """The base with a LoRA on all six modules that has a say, and with a head that depends on what was read."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    torch.nn.init.normal_(base.lm_head.weight, std=head)
    policy = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return policy.eval()


@pytest.fixture
def policy(micro):
    return make_policy(micro)


def prompts_of(policy, count: int, group: int, seed: int = 0, longest: int = 20) -> list[list[int]]:
    draw = random.Random(seed)
    end = policy.config.eos_token_id
    made = []
    for _ in range(count):
        ids = [draw.randrange(policy.config.vocab_size) for _ in range(draw.randint(1, longest))]
        made += [[token if token != end else end + 1 for token in ids]] * group
    return made


def settings(policy, new: int, **others) -> GenerationConfig:
    end = policy.config.eos_token_id
    return GenerationConfig(**{"do_sample": False, **others}, max_new_tokens=new, eos_token_id=end, pad_token_id=end)


def sampled(policy, new: int, **others) -> GenerationConfig:
    return settings(policy, new, do_sample=True, **{"temperature": 1.0, "top_k": 0, "top_p": 1.0, **others})


# --- the same answers


@pytest.mark.parametrize("seed", range(4))
def test_greedy_answers_are_those_of_generate(micro, seed):
    """Token for token, in float32: ragged prompts in groups, some that end early and some that do not."""
    policy = make_policy(micro, seed=seed)
    prompts = prompts_of(policy, 6, 3, seed)
    ours = FastEngine(policy)(prompts, settings(policy, 40))
    assert ours == GenerateEngine(policy)(prompts, settings(policy, 40))
    lengths = set(map(len, ours))
    assert len(lengths) > 1 and max(lengths) <= 40


def test_greedy_answers_of_the_real_shape(tmp_path):
    """Phi-2's own head width and rotated part (80, of which 32), and its vocabulary's size beside the tokenizer's."""
    folder = make_micro(tmp_path / "base", hidden_size=160, num_attention_heads=2, partial_rotary_factor=0.4)
    policy = make_policy(folder)
    prompts = prompts_of(policy, 5, 2)
    assert FastEngine(policy)(prompts, settings(policy, 30)) == GenerateEngine(policy)(prompts, settings(policy, 30))


def test_a_batch_of_one_and_one_token(policy):
    prompts = prompts_of(policy, 1, 1)
    for new in (1, 2, 12):
        assert FastEngine(policy)(prompts, settings(policy, new)) == GenerateEngine(policy)(prompts, settings(policy, new))


def test_a_prompt_as_long_as_the_context_allows(policy):
    context, end = policy.config.max_position_embeddings, policy.config.eos_token_id
    draw = random.Random(0)
    long = [draw.choice([i for i in range(200) if i != end]) for _ in range(context - 5)]
    prompts = [long, long[:7], long]
    assert FastEngine(policy)(prompts, settings(policy, 5)) == GenerateEngine(policy)(prompts, settings(policy, 5))
    assert len(FastEngine(policy)([long], settings(policy, 50))[0]) <= 5, "it ends where the context ends"
    assert FastEngine(policy)([[*long, *long[:5]]], settings(policy, 50)) == [[]], "no room for any token"


def test_a_plain_base_without_an_adapter(micro):
    base = AutoModelForCausalLM.from_pretrained(micro, dtype=torch.float32).eval()
    prompts = prompts_of(base, 4, 2)
    assert FastEngine(base)(prompts, settings(base, 20)) == GenerateEngine(base)(prompts, settings(base, 20))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_log_probs_of_the_decoder_are_those_of_a_fresh_forward(micro, tokenizer_of, dtype, tolerance):
    """Of the tokens that were sampled: decoded one by one over the cache, against one forward pass over the whole text."""
    # bfloat16 rounds a logit by its 256th part, so the bound holds for logits of about 1 and not for any size.
    policy, tokenizer = make_policy(micro, dtype, head=0.3 if dtype == torch.float32 else 0.1), tokenizer_of(micro)
    engine = FastEngine(policy)
    prompts = prompts_of(policy, 5, 2)
    torch.manual_seed(0)
    seen = []
    append_tokens = DecodeState.append_tokens

    def watched(self, logits, rows, sampling):
        sample_index, count = self.sample_index[:rows].clone(), int(self.count)
        append_tokens(self, logits, rows, sampling)
        log_probs = logits.float().log_softmax(-1)[torch.arange(rows), self.tokens[:rows]]
        seen.extend(((int(i), count), float(p)) for i, p in zip(sample_index, log_probs, strict=True))

    DecodeState.append_tokens = watched
    try:
        completions = engine(prompts, sampled(policy, 24))
    finally:
        DecodeState.append_tokens = append_tokens
    seen = dict(seen)
    with torch.no_grad():
        fresh = measure.token_log_probs(policy, tokenizer, prompts, completions)
    differences = [
        abs(seen[i, t] - float(fresh[i][t, token])) for i, ids in enumerate(completions) for t, token in enumerate(ids)
    ]
    assert len(differences) == sum(map(len, completions)) > 50
    assert max(differences) < tolerance, max(differences)


@pytest.fixture
def tokenizer_of():
    from phi2_grpo.models.tokenizer import load_tokenizer

    return lambda folder: load_tokenizer({**CONFIG, "model": str(folder)})


# --- the same distribution


@pytest.mark.parametrize(
    "others", [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.6}, {"temperature": 1.5, "top_k": 30, "top_p": 0.9}]
)
def test_sampled_tokens_have_the_models_distribution(tmp_path, others):
    """Chi-squared of 20,000 second tokens against the exact distribution, and against generate's own draws."""
    end = 3
    torch.manual_seed(0)
    folder = make_micro(tmp_path / "base", texts=["a"])  # the smallest vocabulary: 257 bytes and the end
    policy = make_policy(folder)
    torch.nn.init.normal_(policy.get_base_model().lm_head.bias, std=1.5)
    generation = sampled(policy, 1, **others)
    generation.eos_token_id = end
    prompts = [prompts_of(policy, 1, 1)[0]] * 20_000
    torch.manual_seed(1)
    with torch.no_grad():
        logits = policy(torch.tensor([prompts[0]])).logits[0, -1:]
        warped = logits / others.get("temperature", 1.0)
        if others.get("top_k"):
            warped[warped < warped.topk(others["top_k"]).values[:, -1:]] = -torch.inf
        if others.get("top_p"):
            probabilities, order = warped.softmax(-1).sort(descending=True)
            cut = order[0][(probabilities.cumsum(-1) - probabilities)[0] >= others["top_p"]]
            warped[0, cut] = -torch.inf
        exact = warped.softmax(-1)[0].double()
    ours = torch.tensor([ids[0] for ids in FastEngine(policy, rows=5000)(prompts, generation)]).bincount(minlength=len(exact))
    assert (ours[exact == 0] == 0).all(), "a token that the cut forbids was drawn"
    common = exact * len(prompts) >= 5
    expected = torch.cat((exact[common], exact[~common].sum(0, keepdim=True))) * len(prompts)
    observed = torch.cat((ours[common], ours[~common].sum(0, keepdim=True)))
    kept = expected > 0
    assert chisquare(observed[kept], expected[kept] * observed.sum() / expected.sum()).pvalue > 1e-3
    theirs = torch.tensor([ids[0] for ids in GenerateEngine(policy, rows=5000)(prompts[:10_000], generation)]).bincount(
        minlength=len(exact)
    )
    table = torch.stack((ours, theirs))[:, (ours + theirs) >= 10]
    assert chi2_contingency(table.numpy()).pvalue > 1e-3


def test_a_later_token_depends_on_those_before_it(policy):
    """The second token's distribution after the commonest first one, exact against drawn: the cache and its rows are right."""
    prompt = prompts_of(policy, 1, 1)[0]
    torch.manual_seed(0)
    drawn = FastEngine(policy)([prompt] * 8000, sampled(policy, 2))
    first = torch.tensor([ids[0] for ids in drawn if ids[0] != policy.config.eos_token_id]).mode().values.item()
    second = torch.tensor([ids[1] for ids in drawn if ids[0] == first])
    with torch.no_grad():
        exact = policy(torch.tensor([[*prompt, first]])).logits[0, -1].double().softmax(-1)
    common = exact * len(second) >= 5
    observed = second.bincount(minlength=len(exact))
    rest = torch.stack((observed[~common].sum(), (exact[~common].sum() * len(second)).long()))
    expected = exact[common] * len(second)
    assert chisquare(observed[common], expected * observed[common].sum() / expected.sum()).pvalue > 1e-3
    assert abs(rest[0] - rest[1]) < 5 * len(second) ** 0.5


# --- the live weights


def test_an_update_of_the_adapter_is_seen_and_the_base_alone_too(policy):
    prompts, how = prompts_of(policy, 4, 2), settings(policy, 20)
    ours, theirs = FastEngine(policy), GenerateEngine(policy)
    before = ours(prompts, how)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    after = ours(prompts, how)
    assert after == theirs(prompts, how) != before
    with policy.disable_adapter():
        alone = ours(prompts, how)
        assert alone == theirs(prompts, how) != after
    assert ours(prompts, how) == after
    policy.add_adapter("other", LoraConfig(r=3, target_modules=["fc1", "dense"]))
    policy.set_adapter("other")
    torch.nn.init.normal_(policy.get_base_model().model.layers[0].mlp.fc1.lora_B["other"].weight, std=1.0)
    assert ours(prompts, how) == theirs(prompts, how) != after


def test_the_base_is_the_same_bits_after_200_steps(policy):
    kept = {name: parameter.clone() for name, parameter in policy.named_parameters() if "lora_" not in name}
    adapter = [parameter for name, parameter in policy.named_parameters() if "lora_" in name]
    optimizer, engine = torch.optim.AdamW(adapter, lr=1e-3), FastEngine(policy)
    prompts = prompts_of(policy, 2, 2)
    moved = [parameter.clone() for parameter in adapter]
    for _ in range(200):
        completions = engine(prompts, sampled(policy, 6))
        ids = torch.tensor([prompts[0] + completions[0]])
        policy(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(parameter, kept[name]) for name, parameter in policy.named_parameters() if name in kept)
    assert not any(torch.equal(old, new) for old, new in zip(moved, adapter, strict=True))


# --- portions and rows


@pytest.mark.parametrize("rows", [1, 5, 7])
def test_batchs_change_nothing(policy, rows):
    """Sampled: every completion has its own numbers, whichever rows it is decoded beside."""
    prompts, how = prompts_of(policy, 6, 4), sampled(policy, 25)
    torch.manual_seed(3)
    whole = FastEngine(policy)(prompts, how)
    torch.manual_seed(3)
    assert FastEngine(policy, rows=rows)(prompts, how) == whole
    assert len({tuple(ids) for ids in whole}) > 12


def test_the_same_engine_again_with_other_sizes(policy):
    engine = FastEngine(policy)
    for count, longest, new in ((2, 5, 10), (9, 30, 40), (3, 4, 3), (1, 300, 100)):
        prompts = prompts_of(policy, count, 2, seed=count, longest=longest)
        assert engine(prompts, settings(policy, new)) == GenerateEngine(policy)(prompts, settings(policy, new))


def test_ended_rows_and_repeated_prompts_cost_nothing(policy, monkeypatch):
    engine, decoded, filled = FastEngine(policy), [], []
    logits, phi = engine.decoder.logits, policy.get_base_model().model
    monkeypatch.setattr(engine.decoder, "logits", lambda *a: (decoded.append(len(a[0])), logits(*a))[1])
    forward = phi.forward
    monkeypatch.setattr(phi, "forward", lambda *a, **k: (filled.append(len(k["input_ids"])), forward(*a, **k))[1])
    completions = engine(prompts_of(policy, 4, 8), sampled(policy, 40))
    assert sum(filled) == 4
    assert sum(decoded) == sum(len(ids) - 1 for ids in completions)
    assert min(map(len, completions)) < max(map(len, completions))


@pytest.mark.parametrize("engine", [FastEngine, GenerateEngine])
def test_a_policy_in_training_mode_stays_in_it(policy, engine):
    """With activation checkpointing, which in that mode takes the cache away, and so the text before the last token."""
    prompts = prompts_of(policy, 3, 2)
    plain = policy.generate(torch.tensor(prompts[:1]), generation_config=settings(policy, 15))[0, len(prompts[0]) :].tolist()
    policy.train()
    policy.gradient_checkpointing_enable()
    found = engine(policy)(prompts, settings(policy, 15))
    assert policy.training and found[0] == truncate_at_eos(plain, [policy.config.eos_token_id])
    assert FastEngine(policy)(prompts, settings(policy, 15)) == found


# --- what a card does differently, as far as a machine without one can tell


class Replayed:
    """Instead of a CUDA graph: the captured step again, with the rows and the length that it was captured with."""

    def __init__(self, engine, *captured):
        self.replay = lambda: engine._step(*captured)


@pytest.mark.parametrize("seed", range(3))
def test_the_way_of_a_card(micro, monkeypatch, seed):
    """Ended rows looked at now and then, rows halved, lengths in steps: the same completions."""
    policy = make_policy(micro, seed=seed)
    policy.get_base_model().lm_head.bias.data[policy.config.eos_token_id] -= 2  # so that some are longer than a step of lengths
    prompts, how = prompts_of(policy, 9, 4, seed, longest=70), sampled(policy, 90)
    torch.manual_seed(seed)
    plain = FastEngine(policy)(prompts, how)
    engine = FastEngine(policy, rows=20)
    engine.cuda, captured = True, []
    monkeypatch.setattr(FastEngine, "_capture", lambda self, *key: (captured.append(key), Replayed(self, *key))[1])
    torch.manual_seed(seed)
    assert engine(prompts, how) == plain
    assert len(captured) == len(set(captured)) > 3, "each kind of step is captured once"
    assert all(length % LENGTH_MULTIPLE == 0 for _, length, _ in captured)
    seen = len(captured)
    torch.manual_seed(seed)
    assert engine(prompts, how) == plain and len(captured) == seen, "and replayed ever after"
    assert engine(prompts, settings(policy, 90)) == GenerateEngine(policy)(prompts, settings(policy, 90))


def test_no_step_waits_for_the_device(policy):
    """A value that Python reads, or a shape that depends on values, would break a captured graph and stall a card."""
    from torch.utils._python_dispatch import TorchDispatchMode

    waits = {"aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal", "aten.unique"}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert str(function).rsplit(".", 1)[0] not in waits, function
            return function(*args, **(kwargs or {}))

    engine = FastEngine(policy)
    how = sampled(policy, 10, top_k=9, top_p=0.8, temperature=0.7)
    engine(prompts_of(policy, 3, 2), how)
    with torch.no_grad(), Watch():
        engine._step(4, 64, Sampling.of(how))


# --- the choice


def llama(tmp_path):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300}
    return LlamaForCausalLM(LlamaConfig(**shape, eos_token_id=0, bos_token_id=0, pad_token_id=0))


def test_what_each_model_gets(policy, micro, tmp_path):
    assert choose_engine("auto", policy)[0] == choose_engine("fast", policy)[0] == "fast"
    assert choose_engine("generate", policy)[0] == "generate"
    other = llama(tmp_path)
    engine, why = choose_engine("fast", other)
    assert engine == "generate" and "llama" in why
    assert isinstance(make_engine("auto", other), GenerateEngine)
    base = AutoModelForCausalLM.from_pretrained(micro)
    dora = get_peft_model(base, LoraConfig(r=2, target_modules=["fc1"], use_dora=True))
    assert "not a plain LoRA" in unsupported_reason(dora)
    head = get_peft_model(AutoModelForCausalLM.from_pretrained(micro), LoraConfig(r=2, target_modules=["fc1", "lm_head"]))
    assert "more is adapted" in unsupported_reason(head)
    with torch.device("meta"):  # the checks look at a model that has no weights yet
        bare = AutoModelForCausalLM.from_config(base.config)
    assert unsupported_reason(bare) is None


def test_a_setting_that_the_engine_does_not_know_goes_to_generate(policy):
    prompts = prompts_of(policy, 4, 1)
    how = settings(policy, 20, repetition_penalty=3.0)
    with pytest.raises(ValueError, match="repetition_penalty"):
        Sampling.of(how)
    assert FastEngine(policy)(prompts, how) == GenerateEngine(policy)(prompts, how)
    usual = chat_generation_config(type("T", (), {"eos_token_id": 0, "pad_token_id": 0, "chat_template": "x"}), CONFIG, 2048)
    assert Sampling.of(usual) == Sampling(False, CONFIG["chat_temperature"], 50, CONFIG["chat_top_p"], (0,))


def test_batches_by_length_hold_what_a_forward_pass_may():
    lengths = [900, 10, 5000, 1000, 20, 1100]
    batches = list(batches_by_length(lengths))
    assert batches == [[1, 4], [0, 3], [5], [2]], (
        "all once, the shortest first; 3 x 900 and 2 x 1100 are too many, 5000 goes alone"
    )
    assert list(batches_by_length([])) == []
