"""Collapse metrics and their alerts."""

import pytest

from phi2_grpo.models.answers import Answer
from phi2_grpo.rewards import collapse


def answer(*ids, text="") -> Answer:
    return Answer(text, ids, True, "")


ENGLISH = [answer(*range(9), text="The plants need a lot of water")]
SPANISH = [answer(*range(9), text="Las plantas necesitan mucha agua")]


@pytest.mark.parametrize(("answers", "languages", "expected"), [
    ([answer(*range(9))], [], {"repetition": 0, "distinct_2": 1}),
    ([answer(*[7] * 10)], [], {"repetition": 7 / 8, "distinct_2": 1 / 9}),
    ([answer(1)] * 3 + [answer(*range(20))], [], {"empty": 0.75, "at_target": 0.0, "repetition": 0}),
    ([answer(*range(n)) for n in (31, 32, 33, 34)], [], {"at_target": 0.75}),
    (ENGLISH * 8, ["es", "en"] * 4, {"one_language": 1.0}),
    (ENGLISH * 6 + SPANISH * 4, ["en"] * 4 + ["es"] * 6, {"one_language": 2 / 6})])  # fmt: skip
def test_collapse_metrics(answers, languages, expected):
    metrics = collapse.measure(answers, languages, 32)
    assert {key: metrics[key] for key in expected} == pytest.approx(expected)


HEALTHY = {"frac_reward_zero_std": 0.1, "completions/clipped_ratio": 0.1, "kl": 0.1, "grad_norm": 0.5, "entropy": 2.0,
           "collapse/repetition": 0.05, "collapse/distinct_2": 0.7, "collapse/one_language": 0.1, "collapse/at_target": 0.1,
           "collapse/empty": 0.0, "sampling/sampling_logp_difference/mean": 0.0, "sampling/nearer_to_reference": -0.1}  # fmt: skip


@pytest.mark.parametrize(("values", "expected"), [
    ({}, []), ({"kl": 1.0}, [("warning", "kl")]), ({"kl": 3.0}, [("warning", "kl"), ("collapse", "kl")]),
    ({"entropy": 0.001}, [("collapse", "entropy")]),
    ({"collapse/repetition": 0.9}, [("collapse", "collapse/repetition")]),
    ({"rewards/serial/std": 0.0, "rewards/length/std": 0.1}, [("warning", "rewards/serial/std")]),
    ({"collapse/distinct_2": 0.01}, [("collapse", "collapse/distinct_2")]),
    ({"collapse/at_target": 0.9}, [("collapse", "collapse/at_target")]),
    ({"answers/scored": 0.2}, [("warning", "answers/scored")]),
    ({"collapse/empty": 0.9}, [("collapse", "collapse/empty")]),
    ({"frac_reward_zero_std": 1.0}, [("warning", "frac_reward_zero_std")])])  # fmt: skip
def test_each_alert_once_and_not_by_one_step(values, expected):
    rows = [HEALTHY] * 20 + [{**HEALTHY, **values}] * collapse.WINDOW
    alerts = collapse.alerts(rows, set())
    assert [(alert.kind, alert.metric) for alert in alerts] == expected
    assert collapse.alerts(rows[: collapse.WINDOW - 1], set()) == [], "not before there are enough steps"
    assert collapse.alerts(rows, set(expected)) == []


def test_a_base_that_answers_in_one_language_is_no_drift():
    english = {**HEALTHY, "collapse/one_language": 0.9}
    assert collapse.alerts([english] * 20, set()) == []
    assert collapse.alerts([HEALTHY] * 10 + [english] * 9, set()) == [], "a batch has few prompts in other languages"
    (alert,) = collapse.alerts([HEALTHY] * 10 + [english] * 10, set())
    assert alert.metric == "collapse/one_language" and "0.8" in alert.text
