"""The rewards: the built-in ones, one's own, how they are chosen, weighed, checked and compared; and the signs of gaming."""

import json

import pytest
import torch
from conftest import script

from phi2_grpo.common.cli import UserError
from phi2_grpo.models.answers import Answer
from phi2_grpo.models.tokenizer import load_tokenizer
from phi2_grpo.rewards import collapse
from phi2_grpo.rewards.functions import BUILT_IN, ending, language, length, reference, repetition
from phi2_grpo.rewards.scorer import Reward, Scorer, choose_rewards, describe_rewards, try_rewards
from phi2_grpo.training.callbacks import LogCallback

END = "<|endoftext|>"
ROWS = [{"prompt": [{"role": "user", "content": "Why?"}], "lang": "en", "message_id": "1", "reference": "Because."}] * 3


@pytest.fixture(scope="module")
def tokenizer(micro):
    return load_tokenizer({"model": str(micro), "model_revision": "main"})


def scorer_of(tokenizer, *functions, target_tokens: int = 8) -> Scorer:
    return Scorer(tokenizer, target_tokens, [Reward(function.__name__, 1.0, function) for function in functions])


# --- built in


@pytest.mark.parametrize(
    ("tokens", "ended", "reward"),
    [
        (128, True, 1.0),
        (64, True, 0.5),
        (192, True, 0.5),
        (0, True, 0.0),
        (256, True, 0.0),
        (500, True, 0.0),
        (128, False, 0.5),
        (96, False, 0.375),
    ],
)
def test_length(tokens, ended, reward):
    assert length(answer_tokens=[tokens], ended=[ended], target_tokens=128) == [reward]


def test_length_is_finite_and_bounded():
    values = length(answer_tokens=list(range(0, 600, 7)), ended=[True, False] * 43, target_tokens=128)
    assert len(values) == 86 and all(0 <= value <= 1 for value in values)


def test_ending():
    assert ending(ended=[True, False]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("ids", "fine"),
    [((1, 2, 3, 4), 0.0), ((5,) * 5, -2 / 3), ((1, 2, 3, 1, 2, 3), -0.25), ((1, 2), 0.0), ((), 0.0)],
)
def test_repetition(ids, fine):
    assert repetition(answer_ids=[ids]) == [pytest.approx(fine)]


@pytest.mark.parametrize(
    ("answer", "lang", "low", "high"),
    [
        ("The plants in the garden need a lot of water in the summer.", "en", 0.9, 1.0),
        ("Las plantas del jardín necesitan mucha agua en el verano.", "es", 0.9, 1.0),
        ("Las plantas del jardín necesitan mucha agua en el verano.", "en", 0.0, 0.1),
        ("As plantas do jardim não precisam de muita água no verão.", "pt-BR", 0.9, 1.0),
        ("花园里的植物在夏天需要很多水。", "zh", 0.9, 1.0),
        ("Plantene i hagen trenger mye vann om sommeren.", "nb", 0.5, 1.0),
        ("", "en", 0.0, 0.0),
    ],
)
def test_language(answer, lang, low, high):
    (value,) = language(answers=[answer], lang=[lang])
    assert low <= value <= high


def test_what_cannot_be_judged_is_not_scored():
    assert language(answers=["nuqneH"], lang=["tlh"]) == [None]
    same, other, none = reference(answers=["Water it."] * 3, reference=["Water it.", "Quick fox", None])
    assert same == pytest.approx(1.0) and other < 0.3 and none is None
    assert reference(answers=[""], reference=["Water it."]) == [0.0]


def test_each_says_what_it_pays_for_its_range_and_how_it_is_gamed():
    for function in BUILT_IN.values():
        first = function.__doc__.splitlines()[0]
        assert first.startswith(("Pays for", "Fines")) and ("In [" in first or "0 or 1" in first), function.__name__
        assert "Gamed by" in function.__doc__


# --- chosen on the command line

MINE = "def polite(answers, **_):\n    return ['please' in answer for answer in answers]\n"


def test_names_weights_and_files(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MINE)
    chosen = choose_rewards(["length", "repetition:0.5", "ending:-1", f"{tmp_path}/mine.py:polite:2"])
    assert [(reward.name, reward.weight) for reward in chosen] == [
        ("length", 1.0), ("repetition", 0.5), ("ending", -1.0), ("polite", 2.0)]  # fmt: skip
    assert chosen[0].pays_for.startswith("Pays for answers of about")
    with_dataclass = "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\n"
    (tmp_path / "other.py").write_text(
        with_dataclass + "import functools\npart = functools.partial(lambda answers, **_: [1.0])\n"
    )
    assert choose_rewards([f"{tmp_path}/other.py:part"])[0].name == "part"
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "inner.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    assert choose_rewards(["package.inner:polite"])[0].function(answers=["Yes, please"]) == [True]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "--rewards is empty"),
        ("{dir}/good.py:polite,{dir}/good.py:polite:2", "names polite twice"),
        ("lenght", "Did you mean length?"),
        ("length:nan", "weight of length is nan"),
        ("length:inf", "weight of length is inf"),
        ("length:0,ending:0", "all weights are 0"),
        ("length,length:2", "names length twice"),
        ("none.py:f", "none.py does not import: FileNotFoundError"),
        ("no_such_package.x:f", "No module named 'no_such_package'"),
        ("{dir}/good.py:rude", "has no function 'rude'"),
        ("{dir}/good.py:NUMBER", "has no function 'NUMBER'"),
        ("{dir}/syntax.py:f", "syntax.py does not import at line 2: SyntaxError"),
        ("{dir}/fails.py:f", "fails.py does not import at line 3: ZeroDivisionError: division by zero"),
        ("{dir}/leaves.py:f", "leaves.py does not import at line 2: SystemExit: 0"),
        ("{dir}/good.py", "name the function in it"),
        ("{dir}", "holds no model"),
        ("no/such-model", "cannot be had from the Hub"),
    ],
)
def test_what_cannot_be_chosen(call, quick, tmp_path, text, expected):
    (tmp_path / "good.py").write_text(MINE + "NUMBER = 5\n")
    (tmp_path / "syntax.py").write_text("x = 1\ndef f(:\n")
    (tmp_path / "fails.py").write_text("\n\nx = 1 / 0\n")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(0)\n")
    done = call("train_grpo", "--check", *quick, "--output_dir", tmp_path / "o", "--rewards", text.format(dir=tmp_path))
    assert done.code == 2 and "Traceback" not in done.err
    assert expected in " ".join(done.err.split())


# --- called as TRL calls them


def no_keywords(completions):
    return [0.0] * len(completions)


def too_few(completions, **_):
    return [0.0]


def not_a_number(completions, **_):
    return [float("nan")] * len(completions)


def infinite(completions, **_):
    return [float("inf")] * len(completions)


def words(completions, **_):
    return ["good"] * len(completions)


def broken(reference, **_):
    return [1 / 0 for _ in reference]


def nothing(**_):
    return None


def leaves(**_):
    raise SystemExit(0)


def huge(completions, **_):
    return [1e308] * len(completions)


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        (no_keywords, "unexpected keyword"),
        (too_few, "1 rewards for 3 completions"),
        (not_a_number, "nan"),
        (infinite, "inf"),
        (words, "'good'"),
        (broken, "ZeroDivisionError"),
        (nothing, "TypeError"),
        (leaves, "SystemExit"),
        (huge, "1e\\+308"),
    ],
)
def test_a_broken_reward_is_named_before_training(tokenizer, reward, expected):
    with pytest.raises(UserError, match=expected) as caught:
        try_rewards(scorer_of(tokenizer, reward), ROWS)
    assert reward.__name__ in str(caught.value)


def test_they_get_columns_and_answers_and_are_logged(tokenizer):
    seen, logged = {}, {}

    def custom(prompts, answers, reference, lang, **_):
        seen.update(answers=answers, reference=reference)
        return [None, 1.0]

    scorer = Scorer(tokenizer, 8, [Reward("custom", 2.0, custom), Reward("length", -1.0, length)])
    batch = [tokenizer(text)["input_ids"] for text in (" Because." + END, " Why not")]
    columns = {"reference": ["a", "b"], "lang": ["en", "es"], "log_metric": logged.__setitem__}
    for function in scorer.functions:
        function(prompts=[[], []], completions=[], completion_ids=batch, **columns)
    assert seen == {"answers": ["Because.", "Why not"], "reference": ["a", "b"]}
    assert logged["answers/ended"] == 0.5 and "rewards/length/es" in logged and "rewards/custom/en" not in logged
    assert "collapse/at_target" in logged
    row = scorer.last[1]
    assert row["scores"]["custom"] == 1.0 and row["score"] == pytest.approx(2.0 - row["scores"]["length"])
    assert scorer.functions[1].__name__ == "length", "TRL logs it under its name"


def test_running_on_does_not_pay(tokenizer):
    """A good short answer must not earn more with an "Exercise 3" behind it."""
    scorer = scorer_of(tokenizer, length, target_tokens=20)
    seen = []
    scorer_of(tokenizer, lambda completions, **_: seen.extend(completions) or [0.0]).score(
        [{"prompt": []}], [tokenizer(" Yes." + END)["input_ids"]]
    )
    assert seen == [[{"role": "assistant", "content": " Yes."}]], "as TRL hands them over"
    short = " Water it once a week."
    texts = [short + END, short + "\n\nExercise 3: Why do plants need light? Write down three reasons." + END]
    plain, padded = scorer.score([{"prompt": []}] * 2, [tokenizer(text)["input_ids"] for text in texts])
    assert padded["score"] < plain["score"]


def test_rewards_are_compared_within_groups(tokenizer):
    """One that differs only between groups teaches nothing; two that rank a group alike agree fully; opposites fight."""
    values = {
        "one": [0, 1, 5, 6],
        "twin": [10, 12, 0, 2],
        "rival": [1, 0, 1, 0],
        "flat": [1, 1, 2, 2],
        "partly": [1, None, 0, 1],
    }
    functions = []
    for name, scores in values.items():
        functions.append(lambda scores=scores, **_: scores)
        functions[-1].__name__ = name
    scorer = scorer_of(tokenizer, *functions)
    scorer.score([{"prompt": [{"content": text}]} for text in "aabb"], [[1]] * 4)
    found = scorer.compare()
    assert found["agreement/one~twin"] == pytest.approx(1) and found["agreement/one~rival"] == pytest.approx(-1)
    assert found["same/flat"] == 1 and found["same/one"] == 0 and found["same/partly"] == 0.5
    assert not any("flat" in key for key in found if key.startswith("agreement"))
    assert scorer.compare() == {}, "since the last call"


# --- signs of gaming


def answer(*ids, text="") -> Answer:
    return Answer(text, ids, True, "")


ENGLISH = [answer(*range(9), text="The plants need a lot of water")]
SPANISH = [answer(*range(9), text="Las plantas necesitan mucha agua")]


@pytest.mark.parametrize(
    ("answers", "languages", "expected"),
    [
        ([answer(*range(9))], [], {"repetition": 0, "distinct_2": 1}),
        ([answer(*[7] * 10)], [], {"repetition": 7 / 8, "distinct_2": 1 / 9}),
        ([answer(1)] * 3 + [answer(*range(20))], [], {"empty": 0.75, "at_target": 0.0, "repetition": 0}),
        ([answer(*range(n)) for n in (31, 32, 33, 34)], [], {"at_target": 0.75}),
        (ENGLISH * 8, ["es", "en"] * 4, {"one_language": 1.0}),
        (ENGLISH * 6 + SPANISH * 4, ["en"] * 4 + ["es"] * 6, {"one_language": 2 / 6}),
    ],
)
def test_signs(answers, languages, expected):
    found = collapse.measure(answers, languages, 32)
    assert {key: found[key] for key in expected} == pytest.approx(expected)


HEALTHY = {"frac_reward_zero_std": 0.1, "completions/clipped_ratio": 0.1, "kl": 0.1, "grad_norm": 0.5, "entropy": 2.0,
           "collapse/repetition": 0.05, "collapse/distinct_2": 0.7, "collapse/one_language": 0.1, "collapse/at_target": 0.1,
           "collapse/empty": 0.0}  # fmt: skip


@pytest.mark.parametrize(
    ("ill", "alarms"),
    [
        ({}, []),
        ({"kl": 1.0}, [("warning", "kl")]),
        ({"kl": 3.0}, [("warning", "kl"), ("collapse", "kl")]),
        ({"entropy": 0.001}, [("collapse", "entropy")]),
        (
            {"collapse/repetition": 0.9, "collapse/distinct_2": 0.01},
            [("collapse", "collapse/repetition"), ("collapse", "collapse/distinct_2")],
        ),
        ({"collapse/at_target": 0.9}, [("collapse", "collapse/at_target")]),
        ({"collapse/empty": 0.9}, [("collapse", "collapse/empty")]),
        ({"frac_reward_zero_std": 1.0}, [("warning", "frac_reward_zero_std")]),
    ],
)
def test_alarms_once_each(capsys, ill, alarms):
    watch = LogCallback(None, None, {}, 10)
    assert watch.alarms([HEALTHY] * 20) == [] and capsys.readouterr().out == ""
    assert watch.alarms([{**HEALTHY, **ill}] * (collapse.WINDOW - 1)) == [], "not before there are enough steps"
    assert watch.alarms([{**HEALTHY, **ill}] * 20) == alarms
    assert watch.alarms([{**HEALTHY, **ill}] * 20) == [], "once"
    printed = " ".join(capsys.readouterr().out.split())
    assert all(printed.count(f"{kind}: {metric} is") == 1 for kind, metric in alarms)


def test_a_base_that_answers_in_one_language_is_no_drift(capsys):
    watch = LogCallback(None, None, {}, 10)
    english = {**HEALTHY, "collapse/one_language": 0.9}
    assert watch.alarms([english] * 20) == []
    assert watch.alarms([HEALTHY] * 10 + [english] * 9) == [], (
        "few prompts of a batch are in other languages: it takes more steps"
    )
    assert watch.alarms([HEALTHY] * 10 + [english] * 10) == [("collapse", "collapse/one_language")]
    assert "has grown by 0.8" in capsys.readouterr().out


def test_steps_in_which_nothing_is_scored_are_shown_as_such(call, quick, tmp_path):
    (tmp_path / "rare.py").write_text(
        "calls = 0\n"
        "def rare(answers, **_):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    return [None if calls % 2 else float(len(answer)) for answer in answers]\n"
    )
    done = call("train_grpo", 4, *quick, "--output_dir", tmp_path / "o", "--rewards", f"{tmp_path}/rare.py:rare")
    assert done.code == 0 and "     -  " in done.out, done.err
    rows = [json.loads(line) for line in (tmp_path / "o-final" / "metrics.jsonl").read_text().splitlines()]
    assert {row["reward"] is None for row in rows} == {True, False}


GAMED = "def one_token(answers, **_):\n    return [answer.count(',') / 8 for answer in answers]\n"


def test_a_gamed_reward_is_seen_and_the_last_good_checkpoint_kept(call, tmp_path):
    """The tiny model, paid for commas alone."""
    (tmp_path / "gamed.py").write_text(GAMED)
    where = ("--data_dir", tmp_path / "data")
    assert call("prepare_data", "--preset", "tiny", *where).code == 0
    options = ("--max_completion_length", 32, "--target_tokens", 16, "--per_device_train_batch_size", 16, "--report_to", "none",
               "--learning_rate", 3e-3, "--beta", 0, "--save_steps", 5, "--output_dir", tmp_path / "o")  # fmt: skip
    command = (60, "--preset", "tiny", *where, *options, "--rewards", f"{tmp_path}/gamed.py:one_token", "--stop_on_collapse")
    done = call("train_grpo", *command)
    assert done.code == 0, done.err
    assert "collapse: collapse/" in done.out and "The result is checkpoint-" in done.out
    run = json.loads((tmp_path / "o-final" / "run.json").read_text())
    assert run["steps"] % 5 == 0 and run["steps"] <= run["collapsed_at"] - collapse.WINDOW
    rows = [json.loads(line) for line in (tmp_path / "o-final" / "metrics.jsonl").read_text().splitlines()]
    assert any(kind == "collapse" for row in rows for kind, _ in row.get("alarms", [])), "marked where the curve is drawn from"
    from safetensors.torch import load_file

    kept, good = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (tmp_path / "o-final", tmp_path / "o" / f"checkpoint-{run['steps']}")
    )
    assert all((kept[name] == good[name]).all() for name in good)
    assert "collapsed" in (tmp_path / "o-final" / "README.md").read_text()


def test_memory_that_runs_out_in_a_reward_is_no_mistake_of_it(tmp_path):
    def judge(answers, **_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    (paid,) = Scorer(None, 8, [Reward("judge", 1.0, judge)]).functions
    with pytest.raises(torch.OutOfMemoryError):
        paid(prompts=[], completions=[], completion_ids=[])


def test_a_collapse_before_any_checkpoint_has_no_result(call, quick, tmp_path, monkeypatch):
    monkeypatch.setitem(collapse.COLLAPSE, "reward", (5, 6, "of this test"))
    refused = call("train_grpo", 8, *quick, "--output_dir", tmp_path / "o", "--stop_on_collapse", "--save_steps", 2)
    assert refused.code == 2 and "reaches back 2" in refused.err
    done = call("train_grpo", 8, *quick, "--output_dir", tmp_path / "o", "--stop_on_collapse", "--save_steps", 7)
    assert done.code == 2 and "before there was a good checkpoint" in " ".join(done.err.split())
    assert not (tmp_path / "o-final").exists()


@pytest.mark.slow
def test_alarms_are_on_the_tracker_s_page(quick, tmp_path, monkeypatch):
    import sqlite3

    (tmp_path / "flat.py").write_text("def flat(answers, **_):\n    return [1.0 for _ in answers]\n")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "tracks"))
    options = [option for option in map(str, quick) if option not in ("--report_to", "none")]
    rewards_flag = ("--rewards", f"{tmp_path}/flat.py:flat,ending:1e-9", "--sample_steps", "3")  # nearly flat: a warning
    done = script("train_grpo", "6", *options, *rewards_flag, "--output_dir", tmp_path / "o")
    assert done.code == 0, done.err
    assert "Rewards within groups" in done.out and "same in a group" in done.out
    rows = [json.loads(line) for line in (tmp_path / "o-final" / "metrics.jsonl").read_text().splitlines()]
    assert rows[2]["same/flat"] == 1.0 and "same/flat" not in rows[1]
    (database,) = (tmp_path / "tracks").glob("phi2-grpo*.db")
    raised = sqlite3.connect(database).execute("select title from alerts").fetchall()
    said = [line for line in done.out.splitlines() if line.startswith(("warning: ", "collapse: "))]
    assert len(raised) == len(said) > 0


# --- failing while it trains


def test_a_value_that_is_no_number_stops_the_run_after_saving(call, quick, tmp_path):
    (tmp_path / "late.py").write_text(
        "calls = 0\n"
        "def late(answers, **_):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    return [float('nan') if calls > 5 else float(len(answer)) for answer in answers]\n"
    )
    options = (*quick, "--output_dir", tmp_path / "o", "--rewards")
    done = call("train_grpo", 6, *options, f"{tmp_path}/late.py:late")
    # Once before the training, once on the held-out prompts, then once a step: the sixth call is the fourth step's.
    assert done.code == 2 and "'late' returned nan" in done.err and "checkpoint-3 is whole" in done.err, done.err
    assert not (tmp_path / "o-final").exists()
    (tmp_path / "late.py").write_text("def late(answers, **_):\n    return [float(len(answer)) for answer in answers]\n")
    resumed = call("train_grpo", 6, *options, f"{tmp_path}/late.py:late", "--resume")
    assert resumed.code == 2 and "another content now" in resumed.err, "a mended reward is another run"
    own = (*quick, "--output_dir", tmp_path / "n", "--rewards", f"{tmp_path}/late.py:late")
    anew = call("train_grpo", 3, *own, "--init_adapter", tmp_path / "o" / "checkpoint-3")
    assert anew.code == 0, anew.err


def test_rewards_as_trl_documents_them(call, quick, tmp_path):
    """With the trainer's state, as a tensor, and async; on the human replies, in training, held out and in validation."""
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def curriculum(completions, trainer_state, log_metric, log_extra, **_):\n"
        "    log_metric('part', 0.5)\n"
        "    return [trainer_state.global_step / trainer_state.max_steps for _ in completions]\n"
        "def tensor(completions, **_):\n"
        "    return torch.tensor([float(len(c[0]['content'])) for c in completions], dtype=torch.bfloat16)\n"
        "async def later(answers, **_):\n"
        "    return [torch.tensor(float(len(answer))) for answer in answers]\n"
    )
    names = ("curriculum", "tensor", "later")
    own = (*quick, "--rewards", ",".join(f"{tmp_path}/mine.py:{name}" for name in names))
    done = call("train_grpo", 2, *own, "--eval_prompts", 4, "--output_dir", tmp_path / "o")
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in (tmp_path / "o-final" / "metrics.jsonl").read_text().splitlines()]
    assert [row["rewards/curriculum/mean"] for row in rows] == [0.0, 0.5], "the state of the step, as TRL gives it"
    held = [json.loads(line) for line in (tmp_path / "o-final" / "evaluation.jsonl").read_text().splitlines()]
    assert [row["eval_rewards/curriculum"] for row in held] == [0.0, 1.0]
    checked = (*quick[:10], "--adapter", tmp_path / "o-final", "--validation_dir", tmp_path / "v", "--max_prompts", 3)
    done = call("validate_model", *checked, "--rewards", own[-1])
    assert done.code == 0, done.err
    metrics = json.loads((tmp_path / "v" / "report.json").read_text())["metrics"]
    assert metrics["curriculum"]["base"] == 1.0, "after its end"


def test_what_is_not_scored_is_not_zero(tokenizer):
    """TRL's rule: None leaves the sum, and where no reward scores there is no score."""

    def even(answers, **_):
        return [1.0 if len(answer) % 2 == 0 else None for answer in answers]

    def short(answers, **_):
        return [0.5 if len(answer) < 3 else None for answer in answers]

    chosen = [Reward("even", 1.0, even), Reward("short", 2.0, short)]
    rows = [{"prompt": [{"role": "user", "content": "Why?"}]}] * 4
    ids = [tokenizer(text)["input_ids"] for text in ("ab", "a", "abcd", "abc")]
    scored = Scorer(tokenizer, 6, chosen).score(rows, ids)
    assert [row["score"] for row in scored] == [2.0, 1.0, 1.0, None]


def test_several_rewards_train_and_are_described(call, quick, tmp_path):
    flags = ("--rewards", "length,repetition:0.5,language,reference:-0.1,ending")
    done = call("train_grpo", 2, *quick, "--output_dir", tmp_path / "o", *flags)
    assert done.code == 0, done.err
    assert "negative" in " ".join(done.out.replace("│", " ").split())
    run = json.loads((tmp_path / "o-final" / "run.json").read_text())
    assert [reward["weight"] for reward in run["rewards"]] == [1.0, 0.5, 1.0, -0.1, 1.0]
    metrics = run["last_metrics"]
    parts = {reward["name"]: metrics[f"rewards/{reward['name']}/mean"] for reward in run["rewards"]}
    assert metrics["reward"] == pytest.approx(sum(r["weight"] * parts[r["name"]] for r in run["rewards"]), abs=0.05)
    card = (tmp_path / "o-final" / "README.md").read_text()
    assert "| repetition | 0.5 | Fines repeated" in card
    checked = (*quick[:10], "--adapter", tmp_path / "o-final", "--validation_dir", tmp_path / "v", "--max_prompts", 5)
    assert call("validate_model", *checked).code == 0
    report = json.loads((tmp_path / "v" / "report.json").read_text())
    assert report["config"]["rewards"] == ["length", "repetition:0.5", "language", "reference:-0.1", "ending"], (
        "those it was trained with"
    )
    assert set(parts) <= set(report["metrics"])


def test_weights_are_trl_s(tokenizer):
    """What the scorer sums is what TRL sums: nansum of the weighted rewards."""
    import torch

    scores = torch.tensor([[1.0, float("nan")], [0.5, 2.0]])
    values = iter([[1.0, 0.5], [None, 2.0]])
    scorer = Scorer(
        tokenizer, 8, [Reward(name, weight, lambda **_: next(values)) for name, weight in (("a", 2.0), ("b", -1.0))]
    )
    scored = scorer.score([{"prompt": []}] * 2, [[1], [2]])
    assert [row["score"] for row in scored] == (scores * torch.tensor([2.0, -1.0])).nansum(dim=1).tolist()


def test_the_module_of_choices_describes(tokenizer):
    assert describe_rewards(choose_rewards(["ending:3"])) == [
        {"name": "ending", "weight": 3.0, "pays_for": "Pays for ending by itself. 0 or 1.", "digest": None}
    ]
