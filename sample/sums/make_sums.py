"""Makes train.jsonl and validation.jsonl beside it: sums of two numbers from 1 to 12.

  python sample/sums/make_sums.py

Held out are all sums with a 7 or an 11: a model that learnt sums by heart could not know them.
"""

import json
from pathlib import Path

FORMS = (
    "What is {a} + {b}? Answer with the number only.",
    "{a} + {b} = ? Reply with just the number.",
    "Add {a} and {b}. Only give the result.",
    "How much is {a} plus {b}? One number, no words.",
)
HELD_OUT = {7, 11}


def main() -> None:
    rows = {"train": [], "validation": []}
    for a in range(1, 13):
        for b in range(1, 13):
            split = "validation" if {a, b} & HELD_OUT else "train"
            form = FORMS[(a + 2 * b) % len(FORMS)]  # each with all kinds of numbers
            rows[split].append({"prompt": form.format(a=a, b=b), "reference": str(a + b)})
    for split, lines in rows.items():
        path = Path(__file__).with_name(f"{split}.jsonl")
        path.write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
