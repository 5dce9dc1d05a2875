"""Rewards as they are chosen, called, checked, logged and summed."""

import sys
from unittest.mock import Mock

import pytest
import torch
from conftest import ok, read_json, refused, rows_of

from phi2_grpo.common.cli import UserError
from phi2_grpo.models.answers import Answer
from phi2_grpo.rewards.functions import length
from phi2_grpo.rewards.scorer import Reward, Scorer, parse_rewards, try_rewards

END = "<|endoftext|>"
ROWS = [{"prompt": [{"role": "user", "content": "Why?"}], "lang": "en", "message_id": "1", "reference": "Because."}] * 3
MINE = "def polite(answers, **_):\n    return ['please' in answer for answer in answers]\n"


def test_names_weights_and_files(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MINE)
    chosen = parse_rewards(["reference:0", "length", "repetition:0.5", "ending:-1", f"{tmp_path}/mine.py:polite:2"])
    expected = [("length", 1.0), ("repetition", 0.5), ("ending", -1.0), ("polite", 2.0), ("reference", 0.0)]
    assert [(reward.name, reward.weight) for reward in chosen] == expected
    other = "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\n"
    other += "import functools\npart = functools.partial(lambda answers, **_: [1.0])\n"
    (tmp_path / "other.py").write_text(other)
    assert parse_rewards([f"{tmp_path}/other.py:part"])[0].name == "part"
    (tmp_path / "beside.py").write_text("made = []\n")
    (tmp_path / "two.py").write_text("import beside\nbeside.made.append(1)\na = b = lambda **_: beside.made\n")
    assert [each.function() for each in parse_rewards([f"{tmp_path}/two.py:a", f"{tmp_path}/two.py:b:2"])] == [[1], [1]], "once"
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "inner.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    assert parse_rewards(["package.inner:polite"])[0].function(answers=["Yes, please"]) == [True]


@pytest.mark.parametrize(("text", "expected"), [("{dir}/good.py:polite,{dir}/good.py:polite:2", "polite"),
    ("lenght", "Did you mean length?"), ("length:high", "takes a number"), ("length:nan", "nan"), ("length:inf", "inf"),
    ("length:0,ending:0", "no reward has a weight"), ("none.py:f", "no file none.py"),
    ("no_such_package.x:f", "No module named 'no_such_package'"), ("{dir}/good.py:NUMBER", "no function 'NUMBER'"),
    ("{dir}/syntax.py:f", "syntax.py, line 2"), ("{dir}/leaves.py:f", "SystemExit"), ("{dir}/good.py", "file.py:FUNCTION"),
    ("{dir}", "is broken"), ("no/such-model", "Hub")])  # fmt: skip
def test_what_cannot_be_chosen(tmp_path, text, expected):
    (tmp_path / "good.py").write_text(MINE + "NUMBER = 5\n")
    (tmp_path / "syntax.py").write_text("x = 1\ndef f(:\n")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(UserError) as refused:
        parse_rewards(text.format(dir=tmp_path).split(","))
    assert expected in str(refused.value)


BROKEN = {  # a reward, and what the message says
    "no_keywords": (lambda completions: [0.0] * len(completions), "unexpected keyword"),
    "too_few": (lambda **_: [0.0], "1 rewards for 5 completions"),
    "not_a_number": (lambda completions, **_: [float("nan")] * len(completions), "nan"),
    "nothing": (lambda **_: None, "it returned None. Return a list"),
    "right_answers_only": (lambda answers, **_: [1.0 for answer in answers if answer == "Because."], "3 rewards for 5"),
    "leaves": (lambda **_: sys.exit(0), "SystemExit"),
    "raises": (lambda **_: 1 / 0, r"division by zero \(.*test_scorer\.py, line \d+\)"),
    "no_column": (lambda thema, **_: [0.0], "'thema'.* is given: .*reference"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_reward_is_named_before_training(tokenizer, name):
    function, expected = BROKEN[name]
    with pytest.raises(UserError, match=expected) as caught:
        try_rewards(Scorer(tokenizer, 8, [Reward(name, 1.0, function)]), ROWS)
    assert name in str(caught.value)


def test_rewards_that_score_nothing_are_refused(tokenizer):
    scorer = Scorer(tokenizer, 8, parse_rewards(["correct"]))
    without = [{**row, "reference": None} for row in ROWS] * 10
    with pytest.raises(UserError, match="correct.*--reference_column"):
        try_rewards(scorer, without)
    assert try_rewards(scorer, [*without, *ROWS])["correct"][0] == 1.0, "a row with a reference is looked for"
    rare = Reward("rare", 1.0, lambda answers, **_: [None] * len(answers))
    assert try_rewards(Scorer(tokenizer, 8, [rare]), without), "it may score other rows"


def test_they_get_columns_and_answers_and_are_logged_once(tokenizer):
    custom, log = Mock(return_value=[None, 1.0]), Mock()
    scorer = Scorer(tokenizer, 8, [Reward("custom", 2.0, custom), Reward("length", -1.0, length)])
    batch = [tokenizer(text)["input_ids"] for text in (" Because." + END, " Why not")]
    columns = {"reference": ["a", "b"], "lang": ["en", "es"], "log_metric": log}
    for function in scorer.functions:
        function(prompts=[[], []], completions=[], completion_ids=[list(ids) for ids in batch], **columns)
    given, logged = custom.call_args.kwargs, dict(each.args for each in log.call_args_list)
    assert (given["answers"], given["reference"]) == (["Because.", "Why not"], ["a", "b"])
    assert len(logged) == log.call_count, "each once a batch"
    assert logged["answers/ended"] == 0.5 and "rewards/length/es" in logged and "rewards/custom/en" not in logged
    assert "collapse/at_target" in logged
    first, second = scorer.last_batch
    assert first["score"] == pytest.approx(-first["scores"]["length"]), "what is not scored leaves the sum"
    assert second["scores"]["custom"] == 1.0 and second["score"] == pytest.approx(2.0 - second["scores"]["length"])


def test_what_no_weighted_reward_scores_stays_unscored(tokenizer):
    """TRL counts it as 0 once any reward scores it, one that is only logged, too."""
    half = Reward("half", 1.0, lambda answers, **_: [None, 1.0])
    scorer = Scorer(tokenizer, 8, [half, Reward("logged", 0.0, lambda answers, **_: [5.0, 6.0])])
    logged = {}
    batch = {"prompts": [[], []], "completions": [], "completion_ids": [[1], [2]], "log_metric": logged.__setitem__}
    assert [function(**batch) for function in scorer.functions] == [[None, 1.0], [None, 6.0]]
    assert logged["answers/scored"] == 0.5


def test_memory_that_runs_out_in_a_reward_is_no_mistake_of_it(tokenizer):
    too_large = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))
    (function,) = Scorer(tokenizer, 8, [Reward("too_large", 1.0, too_large)]).functions
    with pytest.raises(torch.OutOfMemoryError):
        function(prompts=[], completions=[], completion_ids=[])


def test_a_step_without_a_score_is_shown_and_a_score_that_is_no_number_ends_the_run(call, quick, tmp_path):
    late = "calls = 0\ndef late(answers, **_):\n    global calls\n    calls += 1\n"
    late += "    return [{4: None, 6: float('nan')}.get(calls, float(len(answer))) for answer in answers]\n"
    (tmp_path / "late.py").write_text(late)
    options = (*quick, "--output_dir", tmp_path / "o", "--rewards")
    # Once before the training, once on the held-out prompts, then once a step: calls 4 and 6 are those of steps 2 and 4.
    done = call("train_grpo", 6, *options, f"{tmp_path}/late.py:late")
    refused(done, "'late' returned nan", "--init_adapter", "checkpoint-3")
    assert [row["reward"] is None for row in rows_of(tmp_path / "o")] == [False, True, False] and "     -  " in done.out
    assert not (tmp_path / "o-final").exists()
    (tmp_path / "late.py").write_text("def late(answers, **_):\n    return [float(len(answer)) for answer in answers]\n")
    refused(call("train_grpo", 6, *options, f"{tmp_path}/late.py:late", "--resume"), "rewards: was late")  # it is another run


def test_rewards_as_trl_documents_them(call, quick, tmp_path):
    """With the trainer's state, as a tensor, and async; on the human replies, in training, held out and in validation."""
    (tmp_path / "mine.py").write_text(
        "import asyncio\nimport torch\none = asyncio.Semaphore(1)\n"
        "def curriculum(completions, trainer_state, log_metric, log_extra, **_):\n    log_metric('part', 0.5)\n"
        "    return [trainer_state.global_step / trainer_state.max_steps for _ in completions]\n"
        "def tensor(completions, **_):\n"
        "    return torch.tensor([float(len(c[0]['content'])) for c in completions], dtype=torch.bfloat16)\n"
        "async def score():\n    async with one: await asyncio.sleep(0)\n"
        "async def later(answers, **_):\n    await asyncio.gather(*[score() for _ in answers])\n"
        "    return [torch.tensor(float(len(answer))) for answer in answers]\n"
    )
    names = ("curriculum", "tensor", "later")
    own = (*quick, "--rewards", ",".join(f"{tmp_path}/mine.py:{name}" for name in names))
    ok(call("train_grpo", 2, *own, "--eval_prompts", 4, "--output_dir", tmp_path / "o"))
    rows = rows_of(tmp_path / "o-final")
    assert [row["rewards/curriculum/mean"] for row in rows] == [0.0, 0.5], "the state of the step, as TRL gives it"
    held = rows_of(tmp_path / "o-final", "evaluation.jsonl")
    assert [row["eval_rewards/curriculum"] for row in held] == [0.0, 1.0]
    checked = (*quick[:10], "--adapter", tmp_path / "o-final", "--validation_dir", tmp_path / "v", "--max_prompts", 3)
    ok(call("validate_model", *checked, "--rewards", own[-1]))
    metrics = read_json(tmp_path / "v" / "report.json")["metrics"]
    assert metrics["curriculum"]["base"] == 1.0, "after its end"


def test_what_counts_as_a_collapse_depends_on_the_rewards():
    """Right answers may be short and alike; a target says something only where a reward asks for it."""

    def of(rewards: str, tokens: int) -> dict:
        answers = [Answer("7", tuple(range(tokens)), True, "")] * 8
        return Scorer(None, 8, parse_rewards([rewards])).collapse_metrics(answers, [])

    assert of("correct", 1) == {"empty": 0.0} and of("ending", 1) == {"empty": 1.0}
    assert of("correct", 9).keys() == {"empty", "repetition"}
    assert of("length", 9).keys() == {"empty", "repetition", "distinct_2", "at_target"}
