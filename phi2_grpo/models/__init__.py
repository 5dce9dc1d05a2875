"""The base model, its tokenizer, its LoRA, and what an answer is."""
