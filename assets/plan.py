"""What a layout needs of a GPU, by the formulas of the lessons: memory, and bytes sent in a step.

    python assets/plan.py --model_name llama-3.1-8b --tp_size 8 --dp_size 4 --dp_engine zero1

For bfloat16 computation over float32 weights on CUDA, 1f1b, without --compile. Launches nothing.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "step9_4d"))
from errors import UserError  # noqa: E402
from flags import (  # noqa: E402
    check_context_parallel,
    check_pipeline_parallel,
    check_tensor_parallel,
)
from pipeline_parallel import deal_layers  # noqa: E402
from presets import load_config  # noqa: E402

SIZES = ("pp_size", "dp_size", "cp_size", "tp_size", "micro_batch_size",
         "gradient_accumulation_steps")  # fmt: skip
SHAPE = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size",
         "intermediate_size", "vocab_size")  # fmt: skip


def parse_args(argv):
    parser = argparse.ArgumentParser(description="Memory and traffic of a layout; see the file.")
    parser.add_argument("--model_name", default="llama-3.1-8b", help="preset or directory")
    numbers = {**dict.fromkeys(SHAPE), **dict.fromkeys(SIZES, 1), "seq_len": 8192}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tie_word_embeddings", choices=["config", "yes", "no"], default="config")
    engines = ("naive", "bucket", "zero1", "zero2", "zero3")
    parser.add_argument("--dp_engine", choices=engines, default="bucket")
    parser.add_argument("--sequence_parallel", action="store_true")
    parser.add_argument("--activation_checkpointing", action="store_true")
    args = parser.parse_args(argv)
    args.timeline = None
    try:
        args.config = load_config(args)
        for check in (check_tensor_parallel, check_context_parallel, check_pipeline_parallel):
            check(args)
    except UserError as error:
        parser.error(str(error))
    return args


def ring_share(collective, ranks):
    """Which share of a collective's bytes, as the ledger counts them, a rank sends in a ring."""
    return {"send": 1, "all_reduce": 2 - 2 / ranks}.get(collective, 1 - 1 / ranks)  # step 2


class Stage:
    """A rank of one pipeline stage. Sizes are its own shares: of tp the largest, of cp a part."""

    def __init__(self, args, place):
        c, self.args, tp = args.config, args, args.tp_size
        self.mine = deal_layers(c, args.pp_size)[place]
        self.layers, self.m = len(self.mine), args.gradient_accumulation_steps
        self.alive = min(args.pp_size - place, self.m)  # step 8
        self.first, self.last = place == 0, place == args.pp_size - 1
        self.h, self.vocab = c.hidden_size, -(-c.vocab_size // tp)
        self.f = c.intermediate_size // tp
        self.q = c.num_attention_heads * c.head_dim // tp
        self.kv = c.num_key_value_heads * c.head_dim // tp
        self.tokens = args.micro_batch_size * args.seq_len // args.cp_size  # of a micro-batch
        self.between = self.h // tp if args.sequence_parallel else self.h  # of a token, there
        # Weights of a layer, step 1: q, k, v, gate, up; o, down; two norms. And of the tables.
        self.columns = self.h * (self.q + 2 * self.kv + 2 * self.f)
        self.rows = self.h * (self.q + self.f)
        self.matrices = self.columns + self.rows
        self.layer = self.matrices + 2 * self.h
        tables = self.first + (self.last and not (self.first and c.tie_word_embeddings))
        self.outside = tables * self.h * self.vocab + self.last * self.h
        table = 0 if c.tie_word_embeddings else self.h * self.vocab
        self.embedding, self.head = self.first * table, self.last * table  # where they are two
        self.weights = self.layers * self.layer + self.outside
        self.replicas = args.dp_size * args.cp_size  # step 6
        engine = args.dp_engine if self.replicas > 1 else "naive"
        self.zero = int(engine[-1]) if "zero" in engine else 0
        # Step 7: several micro-batches share casts, but not of step 4's columns or a tied head.
        self.shares = self.m > 1 and not args.activation_checkpointing
        self.casts_head = tp == 1 and not (self.head and (self.zero == 3 or self.shares))

    def kept(self):
        """Bytes that autograd keeps of a micro-batch: of a whole layer, in layers, at the end."""
        a, t = self.args, self.tokens
        # Step 4: what comes in and its norm, twice; q, out, k, v; gate, silu, up, their product.
        # Step 5: and the k and v that came last.
        inner = 2 * self.q + (2 + 2 * (a.cp_size > 1)) * self.kv + 4 * self.f
        # Step 1 casts a weight where it is used, and autograd keeps the copy, if it is not shared.
        casts = 0 if self.shares else self.casts_of_a_layer()
        whole = 2 * t * (4 * self.between + inner) + casts
        layer = 2 * t * self.between if a.activation_checkpointing else whole
        # The last norm; logits in float32, and a copy of the head where it is cast.
        end = 4 * t * self.between + (self.casts_head * 2 * self.h + 4 * t) * self.vocab
        return whole, self.layers * layer, self.last * end

    def casts_of_a_layer(self):
        """Bytes; not of step 4's columns, and not of what zero3 has gathered in bfloat16."""
        alone = self.args.tp_size == 1
        return 2 * (self.rows + alone * self.columns) * (self.zero < 3)

    def casts(self):
        """Bytes of the casts that all micro-batches share."""
        head = 2 * self.head * (self.args.tp_size == 1 and self.zero < 3)
        return self.shares * (self.layers * self.casts_of_a_layer() + head)

    def memory(self):
        """Bytes by what they are for, at the fullest moment of a step."""
        n, size, (whole, layers, end) = self.replicas, 4 * self.weights, self.kept()
        # For a while there are (step 6): gradients being sent and what is received of them; two
        # gathered layers, gradients of one, in float32 too, and norms and head; two more float32
        # tensors like the logits, or a layer computed anew. And of several micro-batches zero1 has
        # whole gradients, and a shard.
        sent = min(2**28, size)
        layers_too = 10 * self.layer + 4 * (self.outside - self.embedding) - 2 * self.head
        passing = {1: sent / n, 2: sent + sent / n, 3: layers_too}.get(self.zero, 0)
        anew = whole if self.args.activation_checkpointing else 0
        return {  # step 6
            "weights": size / (n if self.zero == 3 else 1),
            "gradients": size * (self.zero < 2) + size / n * (self.zero > 0),  # whole, a shard
            "moments": 2 * size / (n if self.zero >= 1 else 1),
            "activations": self.alive * layers + end + self.casts(),
            "in passing": passing + max(anew, self.last * 8 * self.tokens * self.vocab),
        }

    def traffic(self):
        """Rows of (axis, collective, bytes as in the ledger, bytes that the rank sends)."""
        a, m, t, n = self.args, self.m, self.tokens, self.replicas
        x, size, redo = 2 * t * self.h, 4 * self.weights, int(a.activation_checkpointing)
        # Step 4: o, down forward; q k v, gate up backward; the head; the embedding in float32.
        sums = m * x * ((4 + redo) * self.layers + self.last + 2 * self.first)
        gathers = m * x * ((6 + 2 * redo) * self.layers + 2 * self.last + 2 * self.first)
        norms = m * 4 * self.h * (2 * self.layers + self.last)
        tp = [("all_gather", self.last * m * 8 * t * a.tp_size)]  # the loss
        dealt_out = [("reduce_scatter", sums), ("all_gather", gathers), ("all_reduce", norms)]
        tp += dealt_out if a.sequence_parallel else [("all_reduce", sums)]
        # Step 5: keys and values, forward and (but one) backward, and their gradients, of the rank
        # that sends most, the first.
        hops = (3 + redo) * (a.cp_size - 1) - 1
        cp = [("send", m * self.layers * hops * 2 * 2 * t * self.kv)]
        # Step 6, in float32, but zero3 gathers matrices in bfloat16, all but the embedding; what is
        # outside, like the last layer, once.
        halves = (2 * self.layers - 1) * self.matrices + self.head
        rest = self.weights - self.layers * self.matrices - self.head
        scattered, gathered = (
            (size, m * size)[self.zero > 1],
            (size, m * (2 * halves + 4 * rest))[self.zero > 2],
        )
        dp = [("reduce_scatter", scattered), ("all_gather", gathered)]
        dp = dp if self.zero else [("all_reduce", size)]
        # Step 7: activations on, gradients back; a table that both ends hold.
        pp = [("send", m * (2 - self.first - self.last) * 2 * t * self.between)]
        tied = a.config.tie_word_embeddings * (self.first + self.last)
        ends = [("all_reduce", tied * 4 * self.h * self.vocab / (n if self.zero else 1))]
        groups = {"tp": (tp, a.tp_size), "cp": (cp, a.cp_size), "dp_cp": (dp, n),
                  "pp": (pp, a.pp_size), "ends": (ends, min(2, a.pp_size))}  # fmt: skip
        for axis, (rows, ranks) in groups.items():
            for kind, count in rows if ranks > 1 else []:
                yield axis, kind, count, count * ring_share(kind, ranks)

    def flops(self):
        """Of this rank in a step, as in step 1: 6 for each weight and token, and attention."""
        matrices = self.layers * self.layer + self.last * self.h * self.vocab
        attention = 12 * self.layers * self.q * self.args.seq_len
        return self.m * self.tokens * (6 * matrices + attention)


def main(argv):
    args = parse_args(argv)
    stages = [Stage(args, place) for place in range(args.pp_size)]
    stage = max(stages, key=lambda stage: sum(stage.memory().values()))
    memory, sent = stage.memory(), {}
    for axis, _, _, size in stage.traffic():
        sent[axis] = sent.get(axis, 0) + size
    sizes = " x ".join(f"{name[:2]} {getattr(args, name)}" for name in SIZES[:4])
    print(f"{sizes}; fullest stage: {stage.layers} layers, {stage.weights / 1e9:.3f}e9 weights")
    for kind, size in [*memory.items(), ("in all", sum(memory.values()))]:
        print(f"{kind:12} {size / 1e9:9.2f} GB")
    for axis, size in sent.items():
        if size:
            print(f"{axis:12} {size / 1e9:9.2f} GB sent, {stage.flops() / size:11,.0f} FLOP a byte")


if __name__ == "__main__":
    main(sys.argv[1:])
