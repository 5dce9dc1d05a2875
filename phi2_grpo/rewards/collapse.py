"""Collapse metrics: symptoms of reward gaming, measured on the answers and not on any reward; and the alerts they raise."""

from collections import Counter
from dataclasses import dataclass

from phi2_grpo.common.languages import language_code, language_identifier
from phi2_grpo.common.stats import mean
from phi2_grpo.models.answers import Answer

MIN_TOKENS = 8  # a shorter answer says nothing about repetition or language
WINDOW = 5  # steps; alerts go by their mean, so that one noisy step raises none
# Compared with the run's own start, because a base that answers all in English is no drift. A batch has few prompts in other
# languages, hence the longer window.
SINCE_START, SINCE_WINDOW = {"collapse/one_language"}, 10
# metric: (lowest, highest, what it means outside). Healthy ranges of Axolotl's GRPO docs, "training stability"; those of the
# sampling metrics are ours.
HEALTHY = {
    "frac_reward_zero_std": (0, 0.8, "most groups are zero-std: all their completions have one reward, so they teach nothing. "
                             "The reward is too easy, too hard, or too coarse"),
    "answers/scored": (0.5, 1, "most answers get no score, so they teach nothing, and zero-std passes over their groups: leave "
                       "such prompts out, or add a reward that scores them"),
    "completions/clipped_ratio": (0, 0.3, "many completions are cut off at max_completion_length. A run that rewards ending "
                                  "mends it in time; otherwise raise max_completion_length"),
    "kl": (0, 0.5, "the policy is far from its base; above 2 it has diverged: lower learning_rate or raise beta"),
    "sampling/sampling_logp_difference/mean": (0, 0.1, "the update sees other log-probs than the rollout sampled by (nats a "
                                               "token): compare with --rollout generate"),
    "sampling/nearer_to_reference": (-100, 0.02, "the rollout samples from the base and not from the policy: compare with "
                                     "--rollout generate"),
    "grad_norm": (0.001, 1, "gradients are vanishing (nothing is learnt) or exploding (lower learning_rate)"),
}  # fmt: skip
# What no reward can excuse: --stop_on_collapse ends a run at these.
COLLAPSE = {
    "kl": (0, 2, "the policy has diverged from its base: lower learning_rate or raise beta"),
    "entropy": (0.01, float("inf"), "sampling has collapsed to one answer: raise temperature or beta"),
    "collapse/repetition": (0, 0.5, "answers repeat themselves: add the reward repetition, or raise beta"),
    "collapse/distinct_2": (0.2, 1, "all answers say the same: the reward rewards one phrase"),
    "collapse/one_language": (-1, 0.3, "answers drift to one language: add the reward language"),
    "collapse/at_target": (0, 0.6, "answers are padded or cut to the target length: give length a companion"),
    "collapse/empty": (0, 0.5, "most answers are empty: the reward rewards that"),
}


@dataclass(frozen=True)
class Alert:
    kind: str  # "warning" (HEALTHY) or "collapse"
    metric: str
    text: str


def alerts(rows: list[dict], earlier: set[tuple[str, str]]) -> list[Alert]:
    """The ranges that the last steps have left. `rows`: metrics, a dict a step; `earlier`: (kind, metric) of earlier alerts."""
    new = []
    alike = "it scores all completions alike, so it teaches nothing: it is always reached, or never"
    stds = [key for key in rows[-1] if key.startswith("rewards/") and key.endswith("/std")]
    of_each = {key: (1e-6, float("inf"), alike) for key in stds if len(stds) > 1}  # of a single one frac_reward_zero_std tells
    for kind, ranges in (("warning", HEALTHY | of_each), ("collapse", COLLAPSE)):
        for metric, (low, high, meaning) in ranges.items():
            values = [row[metric] for row in rows if row.get(metric) is not None]
            relative = metric in SINCE_START
            window = SINCE_WINDOW if relative else WINDOW
            if len(values) < window * (1 + relative) or (kind, metric) in earlier:
                continue
            recent = mean(values[-window:]) - relative * mean(values[:window])
            if not low <= recent <= high:
                healthy = f"above {low:g}" if high == float("inf") else f"{low:g} to {high:g}"
                over = f"has grown by {recent:.3g} since the start" if relative else f"is {recent:.3g} over {window} steps"
                new.append(Alert(kind, metric, f"{metric} {over}, healthy is {healthy}: {meaning}"))
    return new


def measure(
    answers: list[Answer], languages: list[str], target_tokens: int | None = None, right_or_wrong: bool = False
) -> dict[str, float]:
    """Of one batch of answers, each in [0, 1]; a metric is left out where too few answers tell.

    repetition: mean share of an answer's token trigrams that stood in it before.
    distinct_2: different token bigrams in all answers, by their number ("distinct-2", arXiv 1510.03055); 1 is healthy.
    one_language: share of answers in the answers' commonest language, among those to prompts in other languages.
    at_target: share of answers whose length is the target's, to a token.
    empty: share of answers of fewer than two tokens.

    `target_tokens`: None where no reward asks for it. `right_or_wrong`: right answers may all be of one form, and of one token.
    """
    long = [answer for answer in answers if answer.tokens >= MIN_TOKENS]
    metrics = {"empty": mean([answer.tokens < 2 - right_or_wrong for answer in answers])}
    if target_tokens:
        metrics["at_target"] = mean([abs(answer.tokens - target_tokens) <= 1 for answer in answers])
    if long:
        trigrams = [ngrams(answer.ids, 3) for answer in long]
        metrics["repetition"] = mean([1 - len(set(grams)) / len(grams) for grams in trigrams])
        if not right_or_wrong:
            bigrams = [pair for answer in long for pair in ngrams(answer.ids, 2)]
            metrics["distinct_2"] = len(set(bigrams)) / len(bigrams)
    known = language_identifier().labels
    classified = [(language_identifier().classify(answer.text)[0], language_code(prompt_language))
                  for answer, prompt_language in zip(answers, languages, strict=False)
                  if answer.tokens >= MIN_TOKENS and language_code(prompt_language) in known]  # fmt: skip
    if classified:
        commonest, _ = Counter(guess for guess, _ in classified).most_common(1)[0]
        others = [guess == commonest for guess, prompt_language in classified if prompt_language != commonest]
        if len(others) >= 4:
            metrics["one_language"] = mean(others)
    return metrics


def ngrams(ids: tuple[int, ...], size: int) -> list[tuple[int, ...]]:
    return list(zip(*(ids[i:] for i in range(size)), strict=False))
