"""The fast engine against transformers' generate, against a fresh forward pass, and against the exact distribution.

`pytest -m gpu` runs the tests that take `policy` on a GPU as well, with captured steps.
"""

import random
from types import SimpleNamespace

import pytest
import torch
from conftest import make_micro
from peft import LoraConfig, get_peft_model
from scipy.stats import chisquare
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from phi2_grpo.common.cli import UserError
from phi2_grpo.models.tokenizer import batches_by_length
from phi2_grpo.rollout import decode_step
from phi2_grpo.rollout.cache import LENGTH_MULTIPLE
from phi2_grpo.rollout.decode_step import DecodeStep, unsupported_reason
from phi2_grpo.rollout.engine import FastEngine, GenerateEngine, choose_engine, make_engine
from phi2_grpo.rollout.phi_step import PhiDecodeStep, is_phi
from phi2_grpo.rollout.sampling import Sampling

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


def load_micro(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()


def make_policy(folder, dtype=torch.float32, seed=0, head=0.3):
    """The base with a LoRA that has an effect, and with a head that depends on what was read."""
    torch.manual_seed(seed)
    base = load_micro(folder, dtype)
    torch.nn.init.normal_(base.lm_head.weight, std=head)
    policy = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return policy.eval()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=GPU)])
def policy(micro, request):
    return make_policy(micro).to(request.param)


def prompts_of(policy, count: int, group: int, seed: int = 0, longest: int = 20) -> list[list[int]]:
    """Random prompts of 1 to `longest` tokens, each `group` times."""
    draw, eos = random.Random(seed), policy.config.eos_token_id
    tokens = [token for token in range(policy.config.vocab_size) if token != eos]
    return [ids for _ in range(count) for ids in [draw.choices(tokens, k=draw.randint(1, longest))] * group]


def greedy(policy, new: int, **others) -> GenerationConfig:
    eos = policy.config.eos_token_id
    return GenerationConfig(**{"do_sample": False, "eos_token_id": eos, **others}, max_new_tokens=new, pad_token_id=eos)


def sampled(policy, new: int, **others) -> GenerationConfig:
    return greedy(policy, new, **{"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, **others})


def draw(engine, prompts, generation_config, seed=3):
    torch.manual_seed(seed)
    return engine(prompts, generation_config)


def assert_as_generate(policy, prompts, generation_config):
    assert FastEngine(policy)(prompts, generation_config) == GenerateEngine(policy)(prompts, generation_config)


def test_ragged_prompts_in_groups_by_one_engine_whose_cache_grows(policy):
    engine, lengths = FastEngine(policy), set()
    for count, group, longest, new in ((1, 1, 20, 1), (1, 1, 20, 2), (6, 3, 20, 40), (5, 3, 200, 150), (6, 3, 20, 40),
                                       (3, 2, 4, 3), (1, 2, 300, 100)):  # fmt: skip
        prompts = prompts_of(policy, count, group, count, longest)
        completions = engine(prompts, greedy(policy, new))
        assert completions == GenerateEngine(policy)(prompts, greedy(policy, new))
        lengths |= set(map(len, completions))
    assert len(lengths) > 5, "some end early"


def test_phi2_s_head_size_and_a_base_without_an_adapter(micro, tmp_path):
    folder = make_micro(tmp_path / "base", hidden_size=160, num_attention_heads=2, partial_rotary_factor=0.4)  # 32 of 80 rotate
    for model in (make_policy(folder), load_micro(micro)):
        assert_as_generate(model, prompts_of(model, 5, 2), greedy(model, 25))


def test_the_context_ends_a_completion(policy):
    context = policy.config.max_position_embeddings
    long = prompts_of(policy, 1, 1)[0][:1] * (context - 5)
    assert_as_generate(policy, [long, long[:7], long], greedy(policy, 5))
    assert len(FastEngine(policy)([long], greedy(policy, 50))[0]) <= 5
    assert FastEngine(policy)([long + long[:5]], greedy(policy, 50)) == [[]], "no room for any token"


def test_another_adapter(policy):
    engine, prompts, generation_config = FastEngine(policy), prompts_of(policy, 4, 2), greedy(policy, 20)
    before = engine(prompts, generation_config)
    policy.add_adapter("other", LoraConfig(r=3, target_modules=["fc1", "dense"]))
    policy.set_adapter("other")
    torch.nn.init.normal_(policy.get_base_model().model.layers[0].mlp.fc1.lora_B["other"].weight, std=1.0)
    assert engine(prompts, generation_config) == GenerateEngine(policy)(prompts, generation_config) != before


@pytest.mark.parametrize("engine", [FastEngine, GenerateEngine])
def test_a_policy_in_training_mode_stays_in_it(micro, engine):
    """With activation checkpointing, which disables the cache in that mode."""
    policy = make_policy(micro)
    prompts = prompts_of(policy, 3, 2)
    in_eval_mode = GenerateEngine(policy)(prompts, greedy(policy, 15))
    policy.train()
    policy.gradient_checkpointing_enable()
    policy.enable_input_require_grads()
    assert engine(policy)(prompts, greedy(policy, 15)) == in_eval_mode and policy.training


def test_a_setting_that_the_engine_does_not_support_goes_to_generate(micro):
    policy = make_policy(micro)
    generation_config = greedy(policy, 20, repetition_penalty=3.0)
    assert Sampling.of(generation_config) is None
    assert_as_generate(policy, prompts_of(policy, 4, 1), generation_config)
    usual = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.9, eos_token_id=[0, 1], stop_strings=["Exercise"])
    assert Sampling.of(usual) == Sampling(False, 0.7, 50, 0.9, (0, 1))


@pytest.mark.parametrize(("dtype", "head", "tolerance"), [(torch.float32, 0.3, 1e-4), (torch.bfloat16, 0.1, 2e-2)])
def test_log_probs_are_those_of_a_fresh_forward_pass(micro, dtype, head, tolerance):
    """Decoded one by one over the cache, against one pass over the whole text. bfloat16 keeps 8 bits of a logit of about 1."""
    policy = make_policy(micro, dtype, head=head)
    engine, prompts = FastEngine(policy, rows=4), prompts_of(policy, 5, 2)
    completions = draw(engine, prompts, sampled(policy, 24))
    differences = []
    for i, (prompt, ids) in enumerate(zip(prompts, completions, strict=True)):
        with torch.no_grad():
            fresh = policy(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 :].float().log_softmax(-1)
        differences += [abs(engine.log_probs[i][t] - float(fresh[t, token])) for t, token in enumerate(ids)]
    assert len(differences) > 50 and max(differences) < tolerance, max(differences)


@pytest.mark.parametrize("others", [{}, {"temperature": 1.5, "top_k": 30, "top_p": 0.9}])
def test_sampled_tokens_have_the_model_s_distribution(tmp_path, others):
    """Chi-squared of 10,000 tokens against the exact distribution, with the smallest vocabulary, 257 tokens."""
    policy = make_policy(make_micro(tmp_path / "base", texts=["a"]))
    torch.nn.init.normal_(policy.get_base_model().lm_head.bias, std=1.5)  # so that top-p and top-k cut something
    prompt = prompts_of(policy, 1, 1)[0]
    with torch.no_grad():
        logits = policy(torch.tensor([prompt])).logits[0, -1] / others.get("temperature", 1.0)
    if k := others.get("top_k"):
        logits[logits < logits.topk(k).values[-1]] = -torch.inf
    probabilities, order = logits.softmax(-1).sort(descending=True)
    logits[order[probabilities.cumsum(-1) - probabilities >= others.get("top_p", 2.0)]] = -torch.inf
    exact = logits.double().softmax(-1)
    completions = draw(FastEngine(policy, 5000), [prompt] * 10_000, sampled(policy, 1, **others))
    observed, expected = torch.tensor(completions).flatten().bincount(minlength=len(exact)), exact * 10_000
    assert not observed[exact == 0].any(), "a token that the cut forbids"
    common = expected >= 5  # the rare tokens are taken together
    observed, expected = (torch.cat((counts[common], counts[~common].sum(0, keepdim=True))) for counts in (observed, expected))
    assert chisquare(observed[expected > 0], expected[expected > 0]).pvalue > 1e-3


@pytest.mark.parametrize("rows", [1, 5])
def test_neither_batches_nor_the_capture_change_what_is_drawn(policy, rows):
    prompts, generation_config = prompts_of(policy, 6, 4), sampled(policy, 25, top_k=50, top_p=0.95, temperature=0.9)
    completions = draw(FastEngine(policy), prompts, generation_config)
    assert draw(FastEngine(policy, rows=rows), prompts, generation_config) == completions
    uncaptured = FastEngine(policy)
    uncaptured.cuda = False
    assert draw(uncaptured, prompts, generation_config) == completions and len(set(map(tuple, completions))) > 12


def test_finished_rows_and_repeated_prompts_cost_nothing(micro, monkeypatch):
    policy = make_policy(micro)
    engine, decoded, prefilled = FastEngine(policy), [], []
    logits, phi = engine.decode_step.logits, policy.get_base_model().model
    forward = phi.forward
    monkeypatch.setattr(engine.decode_step, "logits", lambda *a: (decoded.append(len(a[0])), logits(*a))[1])
    monkeypatch.setattr(phi, "forward", lambda *a, **k: (prefilled.append(len(k["input_ids"])), forward(*a, **k))[1])
    completions = engine(prompts_of(policy, 4, 8), sampled(policy, 40))
    assert sum(prefilled) == 4 and sum(decoded) == sum(len(ids) - 1 for ids in completions)
    assert min(map(len, completions)) < max(map(len, completions))


def test_the_way_of_a_gpu(micro, monkeypatch):
    """Without one: finished rows checked now and then, rows by powers of two, lengths by multiples; the same completions."""
    policy = make_policy(micro)
    policy.get_base_model().lm_head.bias.data[policy.config.eos_token_id] -= 2  # so that some need two cache lengths
    prompts, generation_config, captured = prompts_of(policy, 9, 4, longest=70), sampled(policy, 90), []
    plain = draw(FastEngine(policy), prompts, generation_config)
    engine = FastEngine(policy, rows=20)
    engine.cuda = True

    def capture(self, *key):
        """Instead of a CUDA graph: the captured step again, with the rows and the length that it was captured with."""
        captured.append(key)
        self._step(*key)
        return SimpleNamespace(replay=lambda: self._step(*key))

    monkeypatch.setattr(FastEngine, "_step_and_capture", capture)
    assert draw(engine, prompts, generation_config) == plain
    assert len(captured) == len(set(captured)) > 3 and all(length % LENGTH_MULTIPLE == 0 for _, length, _ in captured)
    count = len(captured)
    assert draw(engine, prompts, generation_config) == plain and len(captured) == count, "nothing is captured twice"
    assert engine(prompts, greedy(policy, 90)) == GenerateEngine(policy)(prompts, greedy(policy, 90))


def test_which_models_get_which_engine(micro):
    policy, cpu = make_policy(micro), torch.device("cpu")
    assert choose_engine("fast", policy, cpu)[0] == "fast" and choose_engine("generate", policy, cpu)[0] == "generate"
    eager = random_model("llama")
    eager.set_attn_implementation("eager")
    for model, device, reason in ((random_model("mistral", sliding_window=8), cpu, "sliding"), (eager, cpu, "SDPA"),
                                  (policy, torch.device("mps"), "float64")):  # fmt: skip
        name, text = choose_engine("auto", model, device)
        assert name == "generate" and reason in text
        with pytest.raises(UserError, match=reason):
            choose_engine("fast", model, device)
    assert type(make_engine("auto", random_model("mistral", sliding_window=8))) is GenerateEngine
    with torch.device("meta"):  # preflight asks before there are weights
        assert unsupported_reason(AutoModelForCausalLM.from_config(policy.config)) is None


def test_the_weight_on_the_left_multiplies_the_same(monkeypatch):
    """What an AMD processor takes."""
    layer, x = torch.nn.Linear(7, 5), torch.randn(3, 2, 7)
    monkeypatch.setattr(decode_step, "FEW_ROWS", 6)
    torch.testing.assert_close(decode_step._linear(layer, x), layer(x))


@pytest.mark.parametrize("others", [{"target_modules": ["fc1", "dense"], "use_dora": True},
    {"target_modules": ["fc1", "lm_head"]}, {"target_modules": ["fc1"], "lora_bias": True},
    {"target_modules": ["fc1"], "modules_to_save": ["lm_head"]}])  # fmt: skip
def test_what_is_no_plain_lora_decodes_by_the_general_step(micro, others):
    policy = get_peft_model(load_micro(micro), LoraConfig(r=2, init_lora_weights=False, **others)).eval()
    assert not is_phi(policy) and type(FastEngine(policy).decode_step) is DecodeStep
    assert_as_generate(policy, prompts_of(policy, 5, 2), greedy(policy, 25))


def random_model(kind: str, **others):
    """A small decoder with grouped queries and a tied head, where its kind has those."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300,
             "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "sliding_window": None,
             "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}  # fmt: skip
    if kind == "gpt2":  # absolute positions
        for key in ("head_dim", "num_key_value_heads", "intermediate_size", "sliding_window"):
            del shape[key]
    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, **{**shape, **others})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)  # zero by default
    return model


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("kind", ["our phi", "llama", "qwen2", "qwen3", "gpt2", *(pytest.param(kind, marks=pytest.mark.slow)
                                  for kind in ("phi", "gemma", "mistral", "olmo2"))])  # fmt: skip
def test_greedy_as_generate_with_an_updated_and_a_disabled_adapter(micro, kind, device):
    ours = kind == "our phi"
    policy = make_policy(micro) if ours else get_peft_model(random_model(kind), LoraConfig(r=4, target_modules="all-linear"))
    adapter = [parameter for name, parameter in policy.to(device).eval().named_parameters() if "lora_B" in name]
    engine = FastEngine(policy)
    assert type(make_engine("auto", policy)) is FastEngine
    assert type(engine.decode_step) is (PhiDecodeStep if ours else DecodeStep)
    prompts, generation_config, seen = prompts_of(policy, 6, 3), greedy(policy, 40), []
    engine(prompts, generation_config)
    graphs = dict(engine.graphs)
    for std in (0.0, 0.1, 0.3):
        for parameter in adapter:
            torch.nn.init.normal_(parameter, std=std)
        seen.append(engine(prompts, generation_config))
        assert seen[-1] == GenerateEngine(policy)(prompts, generation_config)
    assert seen[0] != seen[1] != seen[2], "the adapter's update is seen"
    assert all(engine.graphs[key] is graph for key, graph in graphs.items()), "a graph was captured again"
    with policy.disable_adapter():
        assert engine(prompts, generation_config) == seen[0]
    assert engine(prompts, generation_config) == seen[2]
    assert draw(engine, prompts, sampled(policy, 20)) == draw(FastEngine(policy, rows=5), prompts, sampled(policy, 20))


def test_batches_by_length_hold_what_a_forward_pass_may():
    assert list(batches_by_length([900, 10, 5000, 1000, 20, 1100])) == [[1, 4], [0, 3], [5], [2]]
