"""What an answer is, and what it is paid."""

import pytest

from phi2_grpo import answers, rewards
from phi2_grpo.cli import UserError
from phi2_grpo.loading import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(micro):
    return load_tokenizer({"model": str(micro), "model_revision": "main"})


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text)["input_ids"]


END = "<|endoftext|>"


@pytest.mark.parametrize(
    ("completion", "text", "ended", "why"),
    [
        (f" Water it.{END}", "Water it.", True, "ended"),
        (" Water it every", "Water it every", False, "cut off"),
        (f" Water it.\n\nExercise 3: more{END}", "Water it.", False, "Exercise 3"),  # ended, but after it had run on
        (" Water it.\nInstruct: why", "Water it.", False, "Instruct"),
        (f" A{END}B", "A", True, "ended"),  # what follows the end token is padding
        (f" Exercise helps.\nExercises help too.{END}", "Exercise helps.\nExercises help too.", True, "ended"),  # near-stops
        (f"{END}", "", True, "ended"),
        ("", "", False, "cut off"),
        ("\nInstruct: a\nExercise 1", "", False, "Instruct"),  # the first stop counts
        (f" A.   \n\n{END}", "A.", True, "ended"),
    ],
)
def test_trim(tokenizer, completion, text, ended, why):
    (answer,) = answers.trim([ids(tokenizer, completion)], tokenizer)
    assert (answer.text, answer.ended) == (text, ended) and why in answer.why


def test_tokens_are_those_of_the_answer(tokenizer):
    plain = " Water it once a week."
    counted = answers.trim(
        [ids(tokenizer, text) for text in (plain + END, plain + "\n\n   " + END, plain + "\nExercise 2: x")], tokenizer
    )
    assert [answer.tokens for answer in counted] == [len(ids(tokenizer, plain))] * 3, (
        "neither white space nor what follows a stop"
    )
    assert answers.trim([], tokenizer) == []


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
    assert rewards.length(answer_tokens=[tokens], ended=[ended], target_tokens=128) == [reward]


def test_running_on_does_not_pay(tokenizer):
    """A good short answer must not earn more with an "Exercise 3" behind it."""
    scorer = rewards.Scorer(tokenizer, target_tokens=20)
    short = " Water it once a week."
    texts = [short + END, short + "\n\nExercise 3: Why do plants need light? Write down three reasons." + END]
    plain, padded = scorer.score([[]] * 2, [ids(tokenizer, text) for text in texts], {})
    assert padded < plain


def test_scores_are_finite_and_bounded_for_any_length():
    values = rewards.length(answer_tokens=list(range(0, 600, 7)), ended=[True, False] * 43, target_tokens=128)
    assert len(values) == 86 and all(0 <= value <= 1 for value in values)


ROWS = [{"prompt": [{"role": "user", "content": "Why?"}], "lang": "en", "message_id": "1", "reference": "Because."}] * 3


def no_keywords(completions):
    return [0.0] * len(completions)


def too_few(completions, **_):
    return [0.0]


def not_a_number(completions, **_):
    return [float("nan")] * len(completions)


def words(completions, **_):
    return ["good"] * len(completions)


def broken(reference, **_):
    return [1 / 0 for _ in reference]


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        (no_keywords, "unexpected keyword"),
        (too_few, "1 rewards for 3 completions"),
        (not_a_number, "nan"),
        (words, "'good'"),
        (broken, "ZeroDivisionError"),
    ],
)
def test_a_broken_reward_is_named_before_training(tokenizer, reward, expected):
    with pytest.raises(UserError, match=expected) as caught:
        rewards.try_rewards(rewards.Scorer(tokenizer, 8, [reward]), ROWS)
    assert reward.__name__ in str(caught.value)


def test_rewards_get_columns_and_answers_and_log(tokenizer):
    seen, logged = {}, {}

    def custom(prompts, answers, reference, lang, **_):
        seen.update(answers=answers, reference=reference)
        return [None, 1.0]

    scorer = rewards.Scorer(tokenizer, 8, [custom, rewards.length])
    batch = [ids(tokenizer, " Because." + END), ids(tokenizer, " Why not")]
    columns = {"reference": ["a", "b"], "lang": ["en", "es"], "log_metric": logged.__setitem__}
    for function in scorer.functions:
        function(prompts=[[], []], completions=[], completion_ids=batch, **columns)
    assert seen == {"answers": ["Because.", "Why not"], "reference": ["a", "b"]}
    assert logged["answers/ended"] == 0.5 and "rewards/length/es" in logged and "rewards/custom/en" not in logged
    assert scorer.last[1]["score"] > 1.0, "the rewards are summed"
    assert scorer.functions[1].__name__ == "length", "TRL logs it under its name"
