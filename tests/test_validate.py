"""Base against tuned: the samples, the statistics, the costs, and what the report says of them."""

import json
import math
import shutil

import numpy
import pytest
import torch
from conftest import make_micro

from config import CONFIG
from phi2_grpo.common import stats
from phi2_grpo.evaluation import journal, measure, report
from phi2_grpo.models.answers import Answer
from phi2_grpo.models.base import load_base
from phi2_grpo.models.lora import load_adapter, lora_config
from phi2_grpo.models.tokenizer import SAMPLE_PROMPTS, load_tokenizer, render
from phi2_grpo.rewards.scorer import Scorer, choose_rewards, with_all_built_in
from phi2_grpo.rollout.engine import complete, make_engine
from phi2_grpo.rollout.sampling import rollout_generation_config
from phi2_grpo.training import model_card

CPU = torch.device("cpu")


@pytest.fixture
def options(quick, final, tmp_path) -> tuple:
    return (*quick[:10], "--adapter", final, "--validation_dir", tmp_path / "v", "--max_prompts", 12, "--samples_per_prompt", 2)


@pytest.fixture(scope="module")
def config(micro) -> dict:
    return {**CONFIG, "model": str(micro), "max_completion_length": 12}


@pytest.fixture(scope="module")
def tokenizer(config):
    return load_tokenizer(config)


def report_of(folder) -> dict:
    return json.loads((folder / "report.json").read_text())


# --- the report


def test_report(call, options, final, tmp_path):
    card = (final / "README.md").read_text()
    done = call("validate_model", *options)
    assert done.code == 0, done.err
    assert {path.name for path in (tmp_path / "v").iterdir()} == {"report.json", "report.md", "validation.png", "samples.jsonl"}
    found = report_of(tmp_path / "v")
    assert [sample["prompt"] for sample in found["samples"]] == SAMPLE_PROMPTS
    for prompt in SAMPLE_PROMPTS:
        assert prompt in done.out
    assert found["prompts"] == 12 and found["headline"] == "length"
    assert set(found["metrics"]) == {"length", "ending", "repetition", "language", "reference", "answer tokens", "distinct-2",
                                     "KL from base", "reply surprise"}  # fmt: skip
    length = found["metrics"]["length"]
    assert length["trained"] and abs(length["tuned"] - length["base"] - length["difference"]) < 2e-4
    assert length["low"] <= length["difference"] <= length["high"]
    assert found["metrics"]["KL from base"]["base"] == 0 and found["metrics"]["KL from base"]["tuned"] > 0
    assert " ".join(found["line"].split()) in " ".join(done.out.split()), "the line to quote is printed"
    assert "Fewer than 20 prompts: the intervals are weak" in done.out
    samples = [json.loads(line) for line in (tmp_path / "v" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 2 * 12 * 2 and all({"answer", "scores", "completion_ids"} <= set(sample) for sample in samples)
    mean = numpy.mean([sample["scores"]["length"] for sample in samples if sample["side"] == "tuned"])
    assert mean == pytest.approx(length["tuned"], abs=1e-3), "the report's numbers are those of the samples"
    text = (tmp_path / "v" / "report.md").read_text()
    for part in (found["line"], "## Most improved", "## Most harmed", "## At random", "validation.png", "Sample prompts"):
        assert part in text
    assert call("validate_model", *options).code == 0
    assert report_of(tmp_path / "v")["metrics"] == found["metrics"], "the same seed, the same numbers"
    assert "The model card is left as it is" in done.out and (final / "README.md").read_text() == card, "12 prompts are few"
    for _ in range(2):
        assert call("validate_model", *options, "--max_prompts", 25).code == 0
        line = report_of(tmp_path / "v")["line"]
        text = (final / "README.md").read_text()
        assert line in text and text.count(model_card.VALIDATED) == 1, (
            "the card takes its numbers from the report; replaced, not added again"
        )
    assert call("validate_model", *options, "--max_prompts", 25, "--temperature", 0.5).code == 0
    assert (final / "README.md").read_text() == text, "not as it was trained"
    (final / "README.md").write_text(card)


def test_another_adapter_instead_of_the_base(call, options, loud, final, tmp_path):
    done = call("validate_model", *options, "--against", loud)
    assert done.code == 0, done.err
    found = report_of(tmp_path / "v")
    assert found["names"] == [str(loud), str(final)], "the same name: the paths tell them apart"
    assert found["metrics"]["KL from base"]["base"] > 0
    same = call("validate_model", *options, "--against", shutil.copytree(final, tmp_path / "twin"))
    assert same.code == 0
    metrics = report_of(tmp_path / "v")["metrics"]
    assert all(m["difference"] == 0 and m["verdict"] == "no difference shown" for m in metrics.values()), (
        "the same, drawn the same"
    )


def test_adapters_of_different_bases_and_other_bad_input(call, options, final, tmp_path):
    other = shutil.copytree(final, tmp_path / "other")
    settings = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "some/other"}))
    refused = call("validate_model", *options, "--against", other)
    assert refused.code == 2 and "different bases" in refused.err and "some/other" in refused.err
    run = json.loads((other / "run.json").read_text())
    shutil.copy(final / "adapter_config.json", other)
    for named in ("theirs.py:steal", "os:system", "some/reward-model"):
        run["config"]["rewards"] = [named]
        (other / "run.json").write_text(json.dumps(run))
        refused = call("validate_model", *options[:10], "--adapter", other, "--validation_dir", tmp_path / "v")
        assert refused.code == 2 and "runs only when you name it" in refused.err.replace("\n", " "), (
            "an adapter's code is not run"
        )


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("run.json", '{"config": {"rewards": [5]}}', "is not what a training wrote"),
        ("run.json", '{"config": {"temperature": "hot"}}', "--temperature is 'hot'"),
        ("run.json", '{"config": {"target_tokens": 0}}', "--target_tokens is '0'"),
        ("run.json", '{"config": {"max_completion_length": null}}', "'None'"),
        ("generation_config.json", "{", "generation_config.json is broken"),
        ("adapter_model.safetensors", "{", "is broken"),
    ],
)
def test_damaged_adapters(call, options, final, tmp_path, name, text, expected):
    folder = shutil.copytree(final, tmp_path / "damaged")
    (folder / name).write_text(text)
    plain = [option for option in map(str, options) if option not in ("--target_tokens", "6", "--max_completion_length")]
    plain.remove("12")
    done = call("validate_model", *plain, "--adapter", folder)
    assert done.code == 2 and expected in done.err and "Traceback" not in done.err, done.err
    if name.endswith("safetensors"):
        done = call("validate_model", *options, "--against", folder)
        assert done.code == 2 and "is broken" in done.err


def test_rewards_that_cannot_be_computed_are_left_out_and_said(call, micro, final, tmp_path):
    row = {"parent_id": None, "role": "prompter", "lang": "tlh", "rank": None, "review_result": True, "deleted": False}
    rows = [{**row, "message_id": str(i), "message_tree_id": str(i), "text": f"nuq {i}?"} for i in range(30)]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    where = ("--preset", "tiny", "--model", micro, "--data_dir", tmp_path / "d")
    assert call("prepare_data", *where, "--dataset", tmp_path / "m.jsonl").code == 0
    options = (*where, "--adapter", final, "--validation_dir", tmp_path / "v", "--max_completion_length", 12)
    done = call("validate_model", *options, "--rewards", "length,reference", "--target_tokens", 6)
    assert done.code == 0, done.err
    flat = " ".join(done.out.split())
    assert "could not be computed on these prompts: reference, language, reply surprise" in flat
    found = report_of(tmp_path / "v")
    assert set(found["missing"]) == {"reference", "language", "reply surprise"} and found["headline"] == "total reward"


# --- killed, and gone on with


def test_a_killed_validation_goes_on_where_it_was(call, options, tmp_path, monkeypatch):
    whole = call("validate_model", *options, "--rollout_batch_size", 5)
    assert whole.code == 0
    expected = (tmp_path / "v" / "samples.jsonl").read_text()
    shutil.rmtree(tmp_path / "v")
    add, added = journal.Journal.add, []

    def killed(self, side, completions):
        if len(added) == 7:  # five batches of base, two of tuned
            raise KeyboardInterrupt
        add(self, side, completions)
        added.append(len(completions))

    monkeypatch.setattr(journal.Journal, "add", killed)
    first = call("validate_model", *options, "--rollout_batch_size", 5)
    assert first.code == 130 and not (tmp_path / "v" / "report.json").exists()
    unfinished = tmp_path / "v" / "unfinished" / "journal.jsonl"
    unfinished.write_text(unfinished.read_text() + '{"side": "tuned", "ind')  # cut in the middle of a line
    monkeypatch.setattr(
        journal.Journal, "add", lambda self, side, completions: (add(self, side, completions), added.append(-1))
    )
    second = call("validate_model", *options, "--rollout_batch_size", 5)
    assert second.code == 0 and (tmp_path / "v" / "samples.jsonl").read_text() == expected
    assert added.count(-1) == 3, "the three batches that were missing"
    assert not unfinished.parent.exists()


def test_the_journal_of_another_run_is_not_touched_unasked(call, options, tmp_path, monkeypatch):
    path = tmp_path / "v" / "unfinished" / "journal.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text('{"run": {"seed": 5}}\n{"side": "base", "index": 0, "completion_ids": [1]}\n')
    (path.parent / "thesis.txt").write_text("years of work")
    before = path.read_text()
    refused = call("validate_model", *options)
    assert refused.code == 2 and "not finished" in refused.err and path.read_text() == before
    assert call("validate_model", *options, "--overwrite").code == 0
    assert [left.name for left in path.parent.iterdir()] == ["thesis.txt"]


def test_a_report_that_cannot_be_written_loses_no_sample(call, options, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(report, "draw", full)
        done = call("validate_model", *options)
    assert done.code == 2 and done.err.startswith("error: no room is left on a disk"), done.err
    kept = (tmp_path / "v" / "unfinished" / "journal.jsonl").read_text()
    assert kept.count("\n") == 1 + 48
    done = call("validate_model", *options)
    assert done.code == 0 and report_of(tmp_path / "v")["prompts"] == 12


def test_it_is_measured_as_it_was_trained(call, quick, final, tmp_path):
    """Target, length and temperature come from the adapter's run.json, unless a flag says otherwise; so does the base."""
    base = [*map(str, quick[4:6])]  # --data_dir
    options = ("--preset", "tiny", *base, "--adapter", final, "--validation_dir", tmp_path / "v", "--max_prompts", 5)
    assert "another base" in call("validate_model", *options).err, "the preset's base is not the adapter's"
    plain = ("--device", "cpu", *base, "--adapter", final, "--validation_dir", tmp_path / "v", "--max_prompts", 5)
    assert call("validate_model", *plain, "--temperature", 0.5).code == 0
    config = report_of(tmp_path / "v")["config"]
    assert (config["target_tokens"], config["max_completion_length"], config["temperature"]) == (6, 12, 0.5)
    too_long = call("validate_model", *plain, "--max_completion_length", 500)
    assert too_long.code == 2 and "context of 512" in too_long.err


# --- the statistics


@pytest.mark.parametrize(
    "draw", [lambda rng, shape: rng.normal(0.1, 1, shape), lambda rng, shape: rng.exponential(1, shape) - 0.9]
)
def test_intervals_cover_the_truth(draw, monkeypatch):
    """2,000 simulations of 100 prompts, the truth known: 93 to 97 % of the 95 % intervals hold it."""
    monkeypatch.setattr(stats, "RESAMPLES", 1000)  # in a quarter of the time
    values = draw(numpy.random.default_rng(0), (2000, 100))
    covered = sum(low <= 0.1 <= high for low, high in map(stats.interval, values))
    assert 0.93 <= covered / 2000 <= 0.97, covered


def test_paired_numbers():
    found = stats.paired([0.0, 0.0, 1.0, None], [1.0, 0.0, 0.5, 7.0])
    assert (found.prompts, found.base, found.tuned) == (3, pytest.approx(1 / 3), pytest.approx(0.5))
    assert found.difference == pytest.approx(1 / 6) and found.win_rate == pytest.approx(0.5)
    assert stats.paired([None], [1.0]) is None
    for prompts in (1, 5):
        few = stats.paired([0.0] * prompts, [1.0] * prompts)
        assert few.low is None and stats.verdict(few) == "no difference shown", "2 x 1/32 is more than 5 %"
    assert stats.paired([0.0] * 6, [1.0] * 6).low == 1.0, "2 x 1/64 is less"


@pytest.mark.parametrize(("differ", "expected"), [(4, "no difference shown"), (5, "no difference shown"), (7, "worse")])
def test_few_prompts_that_differ(differ, expected):
    """Of 70, all in one direction: by the sign test's arithmetic, 2 x 2^-differ against 5 %."""
    tuned = [0.0] * (70 - differ) + [-1.0] * differ
    assert stats.verdict(stats.paired([0.0] * 70, tuned)) == expected
    at_the_many = stats.paired([0.0] * 70, tuned, stats.simultaneous(10))
    assert stats.verdict(at_the_many) == "no difference shown", "2 x 2^-7 is more than 0.5 %"


def test_sign_flips_agree_with_scipy():
    """The interval shuts 0 out just where scipy's exact permutation test has a p of at most 5 %."""
    from scipy import stats

    draw = numpy.random.default_rng(0)
    for shift in (0.2, 0.5, 0.8, 1.1):
        differences = draw.normal(shift, 1, 10)
        exact = stats.permutation_test((differences,), numpy.mean, permutation_type="samples", n_resamples=2**10).pvalue
        low, high = stats.sign_flip_interval(differences)
        assert (low > 0 or high < 0) == (exact <= 0.05), (differences, exact)


def test_words_that_are_false_are_rare():
    """300 reports without any effect: at most 5 % false headlines, and at most 5 % with any other false word (and 3 errors)."""
    from benchmarks import verdicts

    draw = numpy.random.default_rng(1)
    level = stats.simultaneous(verdicts.METRICS - 1 + verdicts.LANGUAGES)
    for kind in (verdicts.skewed, verdicts.few_differ):
        words = [verdicts.false_words([kind(draw, 80) for _ in range(verdicts.METRICS)], stats.sign_flip_interval, level)
                 for _ in range(60)]  # fmt: skip
        assert numpy.sum(words, 0).max() <= 8, "3 of 60 are expected at most"


@pytest.mark.parametrize(
    ("low", "high", "better", "expected"),
    [(0.1, 0.2, True, "better"), (-0.2, -0.1, True, "worse"), (-0.1, 0.2, True, "no difference shown"),
     (0.1, 0.2, False, "worse"), (0.1, 0.2, None, "higher"), (-0.2, -0.1, None, "lower"), (0.0, 0.2, True, "no difference shown")],
)  # fmt: skip
def test_words_are_fixed_by_the_interval(low, high, better, expected):
    assert stats.verdict(stats.Paired(9, 0, 0, 0, low, high, 0.95, 0.5), better) == expected


def test_base_against_itself_shows_no_difference(config, tokenizer):
    """Two draws of the same model, 100 small trials of 20 prompts: at least 89 say so (95 are expected)."""
    base = load_base(config, CPU, torch.float32)
    rows = [
        {"prompt": [{"role": "user", "content": f"Why {i}?"}], "lang": "en", "message_id": "1", "reference": None}
        for i in range(20)
    ]
    texts = render(tokenizer, [row["prompt"] for row in rows]) * 100
    engine = make_engine("auto", base)
    scorer = Scorer(tokenizer, 6, choose_rewards(["length"]))
    scores = []
    for seed in (1, 2):
        ids = complete(engine, tokenizer, texts, rollout_generation_config(config, tokenizer), 10_000 * seed)
        scores.append([row["score"] for row in scorer.score(rows * 100, ids)])
    trials = [stats.paired(*(side[i : i + 20] for side in scores)) for i in range(0, 2000, 20)]
    assert sum(stats.verdict(trial) == "no difference shown" for trial in trials) >= 89


# --- the costs


ROWS = [{"prompt": [{"role": "user", "content": text}], "lang": "en", "message_id": text, "reference": reply}
        for text, reply in (("Why?", "Because."), ("How do I keep a plant?", "Water it once a week."), ("A", None))]  # fmt: skip


def test_costs_against_values_by_hand(config, tokenizer, final):
    policy = load_adapter(load_base(config, CPU, torch.float32), str(final)).eval()
    fresh = load_base(config, CPU, torch.float32).eval()
    completion_ids = [tokenizer(text)["input_ids"] for text in (" So it is.", " No", "")]
    with torch.no_grad():
        kl = measure.kl_to_base(policy, policy.disable_adapter, tokenizer, ROWS, completion_ids)
        for row, ids, value in zip(ROWS, completion_ids, kl, strict=True):
            prompt = tokenizer(render(tokenizer, [row["prompt"]])[0])["input_ids"]
            if not ids:
                assert value is None
                continue
            tuned, base = (m(torch.tensor([prompt + ids])).logits[0].double().softmax(-1) for m in (policy, fresh))
            places = range(len(prompt) - 1, len(prompt) + len(ids) - 1)
            by_hand = [
                sum(p * math.log(p / q) for p, q in zip(tuned[i].tolist(), base[i].tolist(), strict=True)) for i in places
            ]
            assert value == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-3, abs=1e-6)
        found = measure.reference_nll(policy, tokenizer, ROWS)
        assert found[2] is None, "there is no reply"
        (one, few), (other, many) = found[:2]
        assert measure.perplexity(found) == pytest.approx(math.exp((one + other) / (few + many)))
        for row, (total, count) in zip(ROWS, found[:2], strict=False):
            prompt = tokenizer(render(tokenizer, [row["prompt"]])[0])["input_ids"]
            reply = tokenizer(f" {row['reference']}")["input_ids"]
            logits = policy(torch.tensor([prompt + reply])).logits[0].double().log_softmax(-1)
            by_hand = -sum(logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(reply))
            assert count == len(reply) and total == pytest.approx(by_hand, rel=1e-4)


def test_an_untrained_adapter_is_its_base(config, tokenizer):
    from peft import get_peft_model

    base = load_base(config, CPU, torch.float32)
    policy = get_peft_model(base, lora_config(config, base)).eval()
    ids = [tokenizer(" So it is.")["input_ids"]] * 3
    assert measure.kl_to_base(policy, policy.disable_adapter, tokenizer, ROWS, ids) == [0.0] * 3


# --- the words of the line


def made(base: list[list[int]], tuned: list[list[int]], rewards=("length",)) -> dict:
    """A summary of answers of given tokens to prompts; each prompt has one answer."""
    scorer = Scorer(None, 8, with_all_built_in(choose_rewards(list(rewards))))
    prompts = [
        {"prompt": [{"role": "user", "content": "Q"}], "lang": "en", "message_id": str(i), "reference": None}
        for i in range(len(base))
    ]
    samples = []
    for side, answers in (("base", base), ("tuned", tuned)):
        for i, ids in enumerate(answers):
            scores = {"length": max(0.0, 1 - abs(len(ids) - 8) / 8), "ending": 1.0, "repetition": -1.0 * (len(set(ids)) == 1)}
            samples.append(
                {"side": side, "prompt": i, "answer": Answer("x", tuple(ids), True, ""), "score": 0.0, "scores": scores}
            )
    return report.summarize(samples, prompts, {}, scorer, ("base", "tuned"))


def test_the_line_says_better_worse_or_nothing():
    short, right = [list(range(3))] * 30, [list(range(8))] * 30
    assert made(short, right)["line"].startswith(
        "Tuned beats base on length: 1.00 against 0.38, +0.62 [0.62, 0.62], 30 prompts"
    )
    assert made(right, short)["line"].startswith("Tuned is worse than base on length")
    assert made(short, short)["line"].startswith("Tuned shows no difference from base on length")


def test_less_of_a_reward_with_negative_weight_is_better():
    long, short = [list(range(8))] * 30, [list(range(3))] * 30
    assert made(long, short, rewards=["length:-1"])["line"].startswith("Tuned beats base on length: 0.38 against 1.00")


def test_the_line_says_when_it_looks_gamed():
    long, chanted = [list(range(i, i + 12)) for i in range(30)], [[7] * 8] * 30
    line = made(long, chanted)["line"]
    assert "repetition, distinct-2 worse" in line and "Gamed?" in line and "repetition is 0.83" in line
    assert "Gamed?" not in made(long, [list(range(i, i + 10)) for i in range(30)])["line"]


def test_languages_with_enough_prompts_have_their_own_rows(call, options, tmp_path):
    done = call("validate_model", *options[:-4], "--max_prompts", 70, "--samples_per_prompt", 1)
    assert done.code == 0
    languages = report_of(tmp_path / "v")["languages"]
    assert "en" in languages and all(m["prompts"] >= 20 for m in languages.values())


def test_a_text_cannot_leave_its_block():
    assert report.fenced("a ```` b").startswith("`````text\n") and report.fenced("x").startswith("```text\n")


def test_a_second_adapter_of_another_shape_is_refused(config, final, tmp_path):
    from phi2_grpo.common.cli import UserError

    policy = load_adapter(load_base(config, CPU, torch.float32), str(final))
    shallow = make_micro(tmp_path / "shallow", num_hidden_layers=1)
    with pytest.raises(UserError, match="another base"):
        load_adapter(
            load_adapter(load_base({**config, "model": str(shallow)}, CPU, torch.float32), str(final)),
            str(final),
            "b",
        )
    load_adapter(policy, str(final), "again")
    assert policy.active_adapter == "default"
