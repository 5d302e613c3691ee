"""A layout by numbers: 8 GPUs of 80 GB, `llama-3.1-8b`, sequences of 32,768."""

# Flags as you give them to assets/plan.py, without --model_name and --seq_len.
FLAGS = ""
