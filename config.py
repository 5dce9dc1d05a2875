"""Every setting of every script, once.

Each key is also a flag (`--learning_rate 2e-5`), its comment is the flag's help, its value the default. A key that sets
a field of `GRPOConfig` or `LoraConfig` bears that field's name (PEFT's `r` is `lora_r`), so TRL's and PEFT's
documentation applies; only eval_steps and save_total_limit are read by callbacks of our own. Order: CONFIG, then the preset
laid over it, then the flags.
"""

CONFIG = {
    # --- model
    "model": "microsoft/phi-2",  # Hub id or local folder of the base model; or smollm2, tiny: made here, without the Hub
    "model_revision": "main",  # branch, tag or commit of a Hub model
    "device": "auto",  # auto (CUDA, else MPS, else the CPU for a base under 1B parameters), cuda, mps, cpu
    "dtype": "auto",  # of the frozen base: auto (bfloat16 on CUDA from Ampere on, else float32), bfloat16, float32
    # --- LoRA (all linear layers, r 16: the gap to full fine-tuning closes, arXiv 2106.09685 and "LoRA Without Regret")
    "lora_r": 16,  # rank: 23.6M trainable parameters for Phi-2
    "lora_alpha": 32,  # the update is scaled by alpha / r
    "lora_target_modules": ["Wqkv", "out_proj", "fc1", "fc2"],  # Phi's names, old or new, which on other models mean all-linear
    "init_adapter": "",  # adapter folder to start from instead of a fresh adapter (the KL is still to the base)
    # --- data
    "dataset": "OpenAssistant/oasst1",  # Hub id, or a file or folder: .jsonl, .json, .csv, .tsv, .parquet, .txt (docs/data.md)
    "dataset_config": "",  # of a Hub data set that has several: main of openai/gsm8k
    "dataset_revision": "main",  # branch, tag or commit of a Hub data set
    "data_dir": "./data",  # folder of NAME_prompts, NAME_preferences and funnel.json
    "prompt_column": "",  # column of your own prompts; empty: the first of the usual names
    "reference_column": "",  # column of the right or best answers to them, as above
    "system_prompt": "",  # put before prompts of your own that have none
    "languages": "all",  # codes (en,es,pt-BR), or all; where your own prompts name none, they are guessed
    "max_prompt_tokens": 384,  # longest prompt kept, counted with the chat template
    "max_turns": 1,  # user turns in a prompt: 1 takes first questions, 2 also follow-ups with their history
    "max_toxicity": 1.0,  # keep prompts up to this toxicity label (0-1); 1 keeps all
    "validation_fraction": 0.05,  # share of the conversation trees held out where the source has no validation split
    "split_seed": 0,  # of that split; its own key, so that --seed never moves a held-out prompt into training
    # --- rollout
    "rollout": "auto",  # auto (fast where it supports the model), fast (ours), generate (transformers' own)
    "rollout_batch_size": 0,  # completions decoded at once; 0: what fits. With fast it changes samples by rounding alone
    "use_vllm": False,  # TRL's vLLM instead (pip install trl[vllm]); the base drifts (docs/rollout.md)
    "vllm_mode": "colocate",  # colocate (in this process, a second copy of the weights) or server (trl vllm-serve)
    "vllm_server_base_url": "",  # of that server, http://HOST:8000
    "vllm_gpu_memory_utilization": 0.3,  # share of the GPU's memory for vLLM in colocate mode
    "num_generations": 8,  # completions per prompt, the group that GRPO compares (4 small, 16 large)
    "max_completion_length": 256,  # tokens; at least twice target_tokens, so that a cut answer is far from the target
    "temperature": 1.0,  # of the rollouts; 1 is the policy itself
    "top_p": 1.0,  # 1 = no nucleus cut: the log-probs that train are those that sampled
    "top_k": 0,  # 0 = no cut, as above
    "chat_temperature": 0.7,  # written to the adapter's generation_config.json for chats; metrics use temperature
    "chat_top_p": 0.9,  # as above
    # --- reward
    "rewards": ["length:1.0"],  # name:weight,...: a built-in, path/file.py:function, package.module:function, a reward model
    "target_tokens": 128,  # length of answer that the length reward rewards most
    "format_regex": "",  # what the format reward wants an answer to match, from end to end: "<think>.+</think>.+"
    # --- reward model (train_reward.py; what is not here is as in training below)
    "reward_dir": "./results/reward-model",  # folder of the finished reward model
    "reward_learning_rate": 1e-4,  # TRL's for a LoRA reward model; the head starts at random, the adapter at zero
    "reward_epochs": 1,  # passes over the ranked pairs; of a large base more than 2 overfit
    "reward_max_length": 1024,  # tokens of prompt and reply; pairs with a longer one are left out
    # --- training (sources: TRL's LoRA and paper guides, Dr. GRPO arXiv 2503.20783, DeepSeekMath 2402.03300)
    "max_steps": 100,  # optimizer steps: 100 to see it work, 200-300 for a demo, 500 and more for a claim
    "learning_rate": 4e-5,  # 4e-5 for 100 steps, 1e-5 for 500: learning_rate x steps is roughly what matters
    "lr_scheduler_type": "constant_with_warmup",  # constant, so that a resumed run may add steps
    "warmup_steps": 5,  # optimizer steps in which the learning rate rises from 0; the first one changes nothing
    "beta": 0.03,  # weight of the KL to the base; 0.02-0.04 where length is the only reward
    "loss_type": "dr_grpo",  # no length bias in the loss (TRL's default is dapo)
    "scale_rewards": "none",  # advantage = reward - group mean, not divided by the group's std: rewards are bounded
    "per_device_train_batch_size": 4,  # completions, or pairs, in one forward and backward pass; training memory depends on it
    "gradient_accumulation_steps": 8,  # x the above: completions, in whole groups, or pairs of one optimizer step
    "activation_checkpointing": True,  # (gradient checkpointing) recompute them in the backward pass: slower, far less memory
    "max_grad_norm": 0.5,  # gradients are clipped to this norm
    "seed": 0,  # of sampling, data order, the adapter's initial values, and which held-out prompts are taken
    # --- what a run leaves
    "output_dir": "./results/phi2-grpo",  # checkpoints; the finished adapter goes to <output_dir>-final
    "save_steps": 25,  # optimizer steps between checkpoints
    "save_total_limit": 2,  # checkpoints kept; 2 at least, so that one is complete while the next is written
    "sample_steps": 10,  # optimizer steps between completions printed in full, those of highest and lowest reward
    "eval_steps": 25,  # optimizer steps between evaluations on held-out prompts, beside those at the start and at the end
    "eval_prompts": 32,  # held-out prompts of these evaluations, always the same; 0 for none
    "stop_on_collapse": False,  # stop at the first collapse alert, as Ctrl-C does; the checkpoints stay
    "report_to": "trackio",  # trackio (local, offline: make dashboard), tensorboard, wandb, none
    # --- validation
    "adapter": "./results/phi2-grpo-final",  # adapter folder to validate, export or deploy
    "max_prompts": 200,  # held-out prompts used
    "samples_per_prompt": 1,  # completions per held-out prompt and model; more narrows the interval
    "validation_dir": "./results/validation",  # folder of the validation report
}


def _small(name: str, **own) -> dict:
    """A preset for a laptop's CPU: short prompts, an update in one pass, folders of its own; `own` is laid over that."""
    return {
        "device": "cpu",
        "data_dir": f"./data/{name}",
        "max_prompt_tokens": 128,
        "gradient_accumulation_steps": 1,
        "activation_checkpointing": False,
        "output_dir": f"./results/{name}-grpo",
        "adapter": f"./results/{name}-grpo-final",
        "validation_dir": f"./results/{name}-validation",
        **own,
    }


PRESETS = {
    # One GPU of 12 GB or more. The values above are its values. What each preset holds: python train_grpo.py --check
    "phi2": {},
    # 24 GB: all activations of a smaller pass fit, so nothing is computed twice.
    "phi2-24gb": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 16, "activation_checkpointing": False},
    # 80 GB: larger groups, longer answers.
    "phi2-80gb": {
        "num_generations": 16,
        "max_completion_length": 512,
        "gradient_accumulation_steps": 16,
        "activation_checkpointing": False,
    },
    # No Hub, no account: a 2M-parameter Phi made on the spot, the sample data in sample/.
    "tiny": _small(
        "tiny",
        model="tiny",
        dataset="./sample/tiny.jsonl",
        validation_fraction=0.3,
        max_completion_length=64,
        target_tokens=32,
        reward_dir="./results/tiny-reward-model",
        reward_learning_rate=1e-3,
        reward_epochs=3,
        learning_rate=1e-3,  # a 2M model takes, and needs, far more than a 2.7B one
        per_device_train_batch_size=32,
        sample_steps=50,
        samples_per_prompt=4,
    ),
    # A real language model on any machine where pip works: SmolLM2-135M-Instruct, English questions.
    "smollm2": _small(
        "smollm2",
        model="smollm2",
        dataset="./sample/english.jsonl",
        validation_fraction=0.3,
        max_completion_length=64,
        target_tokens=32,
        temperature=0.7,  # at 1 so small a model, rounded to 4 bits, wanders off into other subjects
        reward_dir="./results/smollm2-reward-model",
        max_steps=40,
        learning_rate=5e-4,
        per_device_train_batch_size=16,
        sample_steps=20,
        eval_steps=10,
    ),
    # A task with a right answer, for the same model: sums of two numbers; held out are those with a 7 or an 11.
    "sums": _small(
        "sums",
        model="smollm2",
        dataset="./sample/sums",
        max_completion_length=16,
        target_tokens=8,
        temperature=0.7,  # at 1 the base is seldom right, and fewer groups differ in their rewards
        rewards=["correct"],
        max_steps=20,
        learning_rate=5e-4,
        beta=0.001,  # small, for a reward that cannot be gamed
        per_device_train_batch_size=64,
        sample_steps=10,
        eval_steps=5,
        eval_prompts=44,
        samples_per_prompt=8,
    ),
}

# What a value may be: a set of choices, or (lowest, highest), both included; for a number that has no entry here, the limits of
# its type. Checked before anything slow starts.
TYPE_LIMITS = {int: (1, 10_000_000), float: (1e-9, 1.0)}
LIMITS = {
    "device": {"auto", "cuda", "mps", "cpu"},
    "dtype": {"auto", "bfloat16", "float32"},
    "max_toxicity": (0.0, 1.0),
    "validation_fraction": (0.0, 0.9),
    "rollout": {"auto", "fast", "generate"},
    "rollout_batch_size": (0, 65536),
    "vllm_mode": {"colocate", "server"},
    "num_generations": (2, 1024),
    "temperature": (0.01, 10.0),
    "top_k": (0, 1_000_000),
    "chat_temperature": (0.05, 2.0),  # as the app has it
    "chat_top_p": (0.05, 1.0),
    "lr_scheduler_type": {"constant_with_warmup", "constant", "linear", "cosine"},
    "warmup_steps": (0, 1_000_000),
    "beta": (0.0, 10.0),
    "loss_type": {"dr_grpo", "grpo", "dapo"},
    "scale_rewards": {"none", "group"},
    "max_grad_norm": (1e-6, 1e6),
    "seed": (0, 2**31 - 1),  # each process adds its number, and numpy's end is 2**32 - 1
    "split_seed": (0, 2**32 - 1),
    "report_to": {"trackio", "tensorboard", "wandb", "none"},
    "save_total_limit": (2, 10_000),
    "eval_prompts": (0, 100_000),
    "samples_per_prompt": (1, 1000),
}
