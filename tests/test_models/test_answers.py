"""What an answer is, and how an adapter says to chat."""

import pytest

from config import CONFIG
from phi2_grpo.common.cli import UserError
from phi2_grpo.models.answers import STOP_STRINGS, chat_generation_config, saved_generation_config, trim

END = "<|endoftext|>"


@pytest.mark.parametrize(("completion", "text", "ended", "reason"), [
    (f" Water it.{END}", "Water it.", True, "ended"), (" Water it every", "Water it every", False, "cut off"),
    (f" Water it.\n\nExercise 3: more{END}", "Water it.", False, "Exercise 3"),  # ended, but after it had run on
    (f" A{END}B", "A", True, "ended"),  # what follows the end token is padding
    (f" Exercise helps.\nExercises help too.{END}", "Exercise helps.\nExercises help too.", True, "ended"),  # near-stops
    (f"{END}", "", True, "ended"), ("", "", False, "cut off"),
    ("\nInstruct: a\nExercise 1", "", False, "Instruct")])  # the first stop counts  # fmt: skip
def test_trim(tokenizer, completion, text, ended, reason):
    (answer,) = trim(tokenizer([completion])["input_ids"], tokenizer)
    assert (answer.text, answer.ended) == (text, ended) and reason in answer.finish_reason


def test_tokens_are_those_of_the_answer(tokenizer):
    plain = " Water it once a week."
    expected, *ids = tokenizer([plain, plain + END, plain + "\n\n   " + END, plain + "\nExercise 2: x"])["input_ids"]
    counted = [answer.tokens for answer in trim(ids, tokenizer)]
    assert counted == [len(expected)] * 3, "neither white space nor what follows a stop"
    assert trim([], tokenizer) == []


@pytest.mark.parametrize(("longest", "context", "expected"), [(64, 2048, 256), (256, 4096, 1024), (256, 1024, 512)])
def test_a_chat_has_room_to_end(tokenizer, longest, context, expected):
    generation = chat_generation_config(tokenizer, {**CONFIG, "max_completion_length": longest}, context)
    assert generation.max_new_tokens == expected and generation.stop_strings == STOP_STRINGS


def test_the_generation_config_of_an_adapter(tokenizer, tmp_path):
    """Made anew where there is none, as in an adapter that PEFT alone saved; refused where it is broken."""
    assert saved_generation_config(tmp_path, tokenizer, CONFIG, 2048).temperature == CONFIG["chat_temperature"]
    chat_generation_config(tokenizer, {**CONFIG, "chat_temperature": 0.3}, 2048).save_pretrained(tmp_path)
    assert saved_generation_config(tmp_path, tokenizer, CONFIG, 2048).temperature == 0.3
    for text in ("[]", "null", "{", '{"max_new_tokens": -3}'):
        (tmp_path / "generation_config.json").write_text(text)
        with pytest.raises(UserError, match="generation_config.json.*\n.*remove it"):
            saved_generation_config(tmp_path, tokenizer, CONFIG, 2048)
