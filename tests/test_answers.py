"""What an answer is."""

import pytest

from phi2_grpo.models.answers import trim
from phi2_grpo.models.tokenizer import load_tokenizer


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
    (answer,) = trim([ids(tokenizer, completion)], tokenizer)
    assert (answer.text, answer.ended) == (text, ended) and why in answer.why


def test_tokens_are_those_of_the_answer(tokenizer):
    plain = " Water it once a week."
    counted = trim(
        [ids(tokenizer, text) for text in (plain + END, plain + "\n\n   " + END, plain + "\nExercise 2: x")], tokenizer
    )
    assert [answer.tokens for answer in counted] == [len(ids(tokenizer, plain))] * 3, (
        "neither white space nor what follows a stop"
    )
    assert trim([], tokenizer) == []
