"""Rows of a training batch packed into passes without padding, in which a prompt stands once for all of its completions."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass
class Pass:
    """What goes through the model at once, as one row of L tokens: prompts without their last token, each followed by its
    branches. A branch is the prompt's last token with a completion but its last: it predicts that completion, T tokens."""

    input_ids: torch.Tensor  # (1, L)
    position_ids: torch.Tensor  # (1, L), as in a row of its own
    attention_mask: torch.Tensor  # (1, 1, L, L) bool: a branch sees its prompt and itself
    predicting: torch.Tensor  # (N,), places in the L tokens that predict a token of a completion
    targets: torch.Tensor  # (N,), that token
    rows: torch.Tensor  # (N,), of the batch
    columns: torch.Tensor  # (N,), of its completions


def pack(input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_width: int, most: int) -> Iterator[Pass]:
    """Passes of at most `most` tokens (more only for a row that is longer), for all tokens of all completions.

    `input_ids` and `attention_mask` (B, P + T) are prompts and completions padded as TRL does; `completion_width` is T.
    """
    texts = [ids[keep] for ids, keep in zip(input_ids.cpu(), attention_mask.bool().cpu(), strict=True)]
    tokens = attention_mask[:, -completion_width:].sum(1).tolist()
    groups: dict[tuple, list[int]] = {}
    for row, (text, count) in enumerate(zip(texts, tokens, strict=True)):
        groups.setdefault(tuple(text[: len(text) - count].tolist()), []).append(row)
    chosen: list[tuple[tuple, list[int]]] = []
    length = 0
    for prompt, rows in groups.items():
        for row in filter(tokens.__getitem__, rows):
            known = chosen and chosen[-1][0] is prompt
            more = tokens[row] + (0 if known else len(prompt) - 1)
            if length and length + more > most:
                yield _make_pass(chosen, texts, tokens, input_ids.device)
                chosen, length, known, more = [], 0, False, tokens[row] + len(prompt) - 1
            if not known:
                chosen.append((prompt, []))
            chosen[-1][1].append(row)
            length += more
    if chosen:
        yield _make_pass(chosen, texts, tokens, input_ids.device)


def _make_pass(chosen: list[tuple[tuple, list[int]]], texts: list[torch.Tensor], tokens: list[int], device) -> Pass:
    """The pass of `chosen`: prompts, each with its rows."""
    ids, positions, groups, branches, targets, rows, columns = ([] for _ in range(7))

    def append(segment: torch.Tensor, start: int, group: int, branch: int) -> None:
        ids.append(segment)
        positions.append(torch.arange(start, start + len(segment)))
        groups.append(torch.full((len(segment),), group))
        branches.append(torch.full((len(segment),), branch))

    for group, (prompt, its_rows) in enumerate(chosen):
        last = len(prompt) - 1
        append(texts[its_rows[0]][:last], 0, group, -1)
        for row in its_rows:
            append(texts[row][last:-1], last, group, row)
            targets.append(texts[row][last + 1 :])
            rows.append(torch.full((tokens[row],), row))
            columns.append(torch.arange(tokens[row]))
    group, branch = torch.cat(groups), torch.cat(branches)
    sees = (group[:, None] == group) & ((branch == -1) | (branch[:, None] == branch))
    flat = [torch.cat(parts) for parts in (targets, rows, columns)]
    fields = torch.cat(ids)[None], torch.cat(positions)[None], sees.tril()[None, None], (branch >= 0).nonzero()[:, 0], *flat
    return Pass(*(field.to(device) for field in fields))
