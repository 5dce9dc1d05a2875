"""The real app with a model that says what the test wants: the question names a text of SAYS, and a LogitsProcessor forces
its tokens through the real generate, stream and stop. Any other question is answered by the model itself.

  python tests/serve_app.py ADAPTER BASE JOURNAL [app's options]

JOURNAL gets a line for each token drawn, so that a test sees whether generation goes on.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "hf_app"))

HOSTILE = (
    'x<y && a<b &lt; &amp; &copy <img src="http://evil.example/i.png"> <script>document.title="owned"</script> '
    '![a](http://evil.example/m.png) <form action="http://evil.example/f"><button>send</button></form> $$x^2$$ `code` '
    '<style>body{background:url(http://evil.example/s)}</style> [link](http://evil.example) <a href="//evil.example">a</a> '
    '<div class="note">not a note</div> <iframe src="http://evil.example/"></iframe> **bold** <br> </div></div> <|endoftext'
)
CODE = 'def f(x):\n    if x < 3 and x<y:\n        return ["a",  \'b\']\n\n\treturn {"<b>": 1}\n# end'
SAYS = {
    "plain": ("Water it once a week.\nThen wait, and look at it every day.", 0.02),
    "stop": ("Four.\n\nExercise 3: What is five and five?", 0.02),
    "near": ("Exercises help.\nInstructors say so:\nExercise daily.\nInstru", 0.02), "hostile": (HOSTILE, 0.0),
    "code": (CODE, 0.0), "scripts": ("שלום עולם, مرحبا 👋🏽 e\u0301 \u202eabc", 0.0),
    "slow": ("It goes on and on. " * 60, 0.05),
}  # fmt: skip


def main() -> None:
    adapter, base, journal, *options = sys.argv[1:]
    import app
    import torch
    from transformers import LogitsProcessor

    class Forced(LogitsProcessor):
        def __init__(self, ids: list[int], delay: float):
            self.ids, self.delay = ids, delay

        def __call__(self, input_ids, scores):
            time.sleep(self.delay)
            with open(journal, "a") as file:
                file.write("token\n")
            forced = torch.full_like(scores, float("-inf"))
            forced[:, self.ids.pop(0)] = 0.0
            return forced

    class ForcedEngine(app.Engine):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            real = self.model.generate

            def generate(input_ids, **options):
                question = self.tokenizer.decode(input_ids[0]).rsplit("Instruct:", 1)[-1]
                said = next((SAYS[name] for name in SAYS if f"say {name}" in question), None)
                if said:
                    ids = self.tokenizer(" " + said[0], add_special_tokens=False)["input_ids"] + [self.tokenizer.eos_token_id]
                    options["logits_processor"] = [Forced(ids, said[1])]
                return real(input_ids=input_ids, **options)

            self.model.generate = generate

    app.Engine = ForcedEngine
    app.main(app.parse_options(["--adapter", adapter, "--base", base, *options]))


if __name__ == "__main__":
    main()
