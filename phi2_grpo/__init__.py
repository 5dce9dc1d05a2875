"""How it works inside: what the scripts at the top of the repo are made of."""
