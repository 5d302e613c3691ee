"""The command line: what each flag is, and what can be checked before any work."""

import os
import shutil
import sys

import torch

from errors import (
    ArgumentParser,
    UserError,
    non_negative_float,
    non_negative_int,
    note,
    positive_float,
    positive_int,
)
from files import local_files, shown
from learning_rate import WAYS_DOWN, check_schedule
from metrics_file import check_metrics_file
from precision import check_precision
from presets import load_config
from profiling import check_reports
from started import check_world
from text_names import choose_texts
from torch_optimizers import choose_optimizer
from virtual_shards import SHARDS

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


def parse_args(argv):
    """Read the command line and check all that can be checked before any work; raises UserError."""
    parser = ArgumentParser(description="Train a Llama: see README.md.", allow_abbrev=False)
    # model
    parser.add_argument("--model_name", default="debug", help="preset, directory or hub id")
    parser.add_argument("--num_hidden_layers", type=positive_int)
    parser.add_argument("--num_attention_heads", type=positive_int)
    parser.add_argument("--num_key_value_heads", type=positive_int)
    parser.add_argument("--hidden_size", type=positive_int)
    parser.add_argument("--intermediate_size", type=positive_int)
    parser.add_argument("--vocab_size", type=positive_int)
    parser.add_argument("--tie_word_embeddings", choices=["config", "yes", "no"], default="config")
    # data
    parser.add_argument("--dataset_name", default="python-stdlib", help="file, folder, hub id, mix")
    parser.add_argument("--dataset_config", help="of a data set on the hub")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--tokenizer_name", help="bytes, directory or hub id; default: the model's")
    parser.add_argument(
        "--stride", type=non_negative_int, default=0, help="tokens that windows share"
    )
    parser.add_argument("--eval_tokens", type=positive_int, help="of a text, at most")
    parser.add_argument("--streaming", action="store_true", help="tokenise while training")
    parser.add_argument("--num_proc", type=positive_int, default=1, help="tokenising processes")
    parser.add_argument("--num_workers", type=non_negative_int, default=0, help="loading processes")
    # batch and optimizer
    parser.add_argument("--seq_len", type=positive_int, default=128, help="tokens a sequence")
    parser.add_argument("--micro_batch_size", type=positive_int, default=4, help="sequences")
    parser.add_argument("--gradient_accumulation_steps", type=positive_int, default=1)
    parser.add_argument("--max_tokens", type=positive_int, default=400_000, help="to train on")
    parser.add_argument("--learning_rate", type=positive_float, default=3e-4)
    parser.add_argument("--warmup_steps", type=non_negative_int, default=20)
    parser.add_argument("--lr_schedule", choices=WAYS_DOWN, default="cosine")
    parser.add_argument("--min_lr_ratio", type=non_negative_float, help="at the end; default: 0.1")
    parser.add_argument("--decay_steps", type=positive_int, help="default: all; a fifth with wsd")
    parser.add_argument(
        "--optimizer", type=str.lower, default="adamw", help="by its name in torch.optim"
    )
    parser.add_argument("--optimizer_args", default="{}", help="JSON of further arguments")
    parser.add_argument("--weight_decay", type=non_negative_float, default=0.1)
    parser.add_argument("--max_grad_norm", type=positive_float, default=1.0, help="inf: no clip")
    parser.add_argument("--seed", type=non_negative_int, default=42)
    # machine
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on CUDA, else float32")
    parser.add_argument("--weights_dtype", choices=DTYPES, help="default: float32 or better")
    parser.add_argument("--compile", nargs="?", const="inductor", choices=["inductor", "aot_eager"])
    parser.add_argument("--activation_checkpointing", action="store_true")
    # layout
    parser.add_argument("--tp_size", type=positive_int, default=1, help="ranks that share a layer")
    parser.add_argument("--sequence_parallel", action="store_true", help="and what is between them")
    parser.add_argument("--cp_size", type=positive_int, default=1, help="ranks for a sequence")
    # reports
    parser.add_argument("--run_name", help="of the run in Weights & Biases")
    parser.add_argument("--use_wandb", action="store_true")
    parser.add_argument("--comm_ledger", action="store_true", help="count one step's traffic")
    parser.add_argument("--metrics_file", help="one line of JSON a step goes here")
    parser.add_argument("--use_tensorboard", help="curves for TensorBoard go to this folder")
    parser.add_argument("--profile", help="A:B, record these steps; traces go to --profile_dir")
    parser.add_argument("--profile_dir", default="profile", help="a trace a rank goes here")
    parser.add_argument("--memory_snapshot", help="what takes memory on CUDA goes to this folder")
    parser.add_argument("--detect_anomaly", action="store_true", help="find where a NaN begins")
    args = parser.parse_args(argv)
    args.flags = dict(vars(args))  # as they were given

    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device; use --device cpu")
    check_world(args.device, tp=args.tp_size, cp=args.cp_size)
    check_compiler(args)
    choose_optimizer(args)
    choose_texts(args)
    check_metrics_file(args)
    check_precision(args)
    args.config = load_config(args)
    check_context_parallel(args)
    check_tensor_parallel(args)
    if args.stride >= args.seq_len:
        raise UserError(f"--stride {args.stride}: choose less than --seq_len {args.seq_len}")
    check_streaming(args)
    sequences = args.micro_batch_size * args.gradient_accumulation_steps
    args.tokens_per_step = sequences * args.seq_len
    args.total_steps = -(-args.max_tokens // args.tokens_per_step)  # rounded up
    check_schedule(args)
    check_reports(args)
    return args


def check_streaming(args):
    """Raise UserError for what a stream can't have; say what it does not use."""
    if not args.streaming:
        return
    name = f"--dataset_name {shown(args.dataset_name)}"
    if args.stride:
        raise UserError(f"--streaming with --stride {args.stride}: leave one of them out")
    if len(args.texts) > 1:
        raise UserError(f"--streaming with {name}, a mix: name one text, or leave --streaming out")
    if args.dataset_name == "random" or args.dataset_name not in args.texts:
        raise UserError(f"--streaming with {name}: these are tokens already; leave --streaming out")
    files = local_files(args.dataset_name)
    if files.kind == "texts" and len(files.train) < SHARDS:
        raise UserError(
            f"--streaming with {name}: each of {SHARDS} shards needs a text, and their number is "
            f"{len(files.train)}; leave --streaming out, or write JSON lines"
        )
    for flag, usual in (("num_proc", 1), ("num_workers", 0)):
        if getattr(args, flag) != usual:
            note(f"--{flag} {getattr(args, flag)} is not used with --streaming")
            setattr(args, flag, usual)


def check_compiler(args):
    """Raise UserError unless `--compile` finds a compiler for what it writes: C++, on CUDA C."""
    variable, names = "CXX", ["clang++" if sys.platform == "darwin" else "g++"]
    if args.device == "cuda":
        variable, names = "CC", ["gcc", "clang", "cc"]
    names = [os.environ[variable]] if variable in os.environ else names
    if args.compile == "inductor" and not any(map(shutil.which, names)):
        raise UserError(
            f"--compile: no compiler {' or '.join(names)} is there; install one, name another by "
            f"the variable {variable}, or leave --compile out"
        )


def check_tensor_parallel(args):
    """Raise UserError unless the ranks of a tensor-parallel group can share the model evenly."""
    tp, config = args.tp_size, args.config
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if (size := getattr(config, name)) % tp:
            raise UserError(f"--tp_size {tp} with --{name} {size}: choose a divisor of it")
    if config.vocab_size < tp:
        raise UserError(f"--tp_size {tp} with --vocab_size {config.vocab_size}: lower the former")
    if args.sequence_parallel and args.seq_len // args.cp_size % tp:
        raise UserError(
            f"--sequence_parallel with --tp_size {tp}: --seq_len {args.seq_len} / --cp_size "
            f"{args.cp_size} is not a multiple of it; choose one that is"
        )


def check_context_parallel(args):
    """Raise UserError unless a sequence can be cut into two chunks for each rank."""
    if args.cp_size > 1 and args.seq_len % (2 * args.cp_size):
        raise UserError(
            f"--cp_size {args.cp_size} with --seq_len {args.seq_len}: choose a multiple of "
            f"{2 * args.cp_size}, two chunks for each rank"
        )
