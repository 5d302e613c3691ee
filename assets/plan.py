"""What a layout needs of each GPU, by the formulas of the lessons: memory, and bytes sent in a step.

    python assets/plan.py --model_name llama-3.1-8b --tp_size 8 --dp_size 4 --pp_size 2 \
        --seq_len 8192 --gradient_accumulation_steps 8 --dp_engine zero1

For bfloat16 computation over float32 weights on CUDA, the schedule 1f1b, without --compile. Nothing
is built and nothing launched: this is arithmetic. With --row one line of a Markdown table.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "step9_4d"))
from pipeline_parallel import deal_layers  # noqa: E402
from presets import load_config  # noqa: E402

MODEL = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size",
         "intermediate_size", "vocab_size")  # fmt: skip
SIZES = ("tp_size", "cp_size", "dp_size", "pp_size", "micro_batch_size",
         "gradient_accumulation_steps")  # fmt: skip
ENGINES = ("naive", "bucket", "zero1", "zero2", "zero3")


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_name", default="llama-3.1-8b", help="preset or directory")
    for name in MODEL:
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--tie_word_embeddings", choices=["config", "yes", "no"], default="config")
    for name in SIZES:
        parser.add_argument(f"--{name}", type=int, default=1)
    parser.add_argument("--seq_len", type=int, default=8192)
    parser.add_argument("--dp_engine", choices=ENGINES, default="bucket")
    parser.add_argument("--sequence_parallel", action="store_true")
    parser.add_argument("--activation_checkpointing", action="store_true")
    parser.add_argument("--row", action="store_true", help="print one line of a table")
    args = parser.parse_args(argv)
    args.config = load_config(args)
    return args


class Stage:
    """What a rank of one pipeline stage holds and sends."""

    def __init__(self, args, place):
        c, tp = args.config, args.tp_size
        self.args, self.place, self.mine = args, place, deal_layers(c, args.pp_size)[place]
        self.layers, self.m = len(self.mine), args.gradient_accumulation_steps
        self.first, self.last = place == 0, place == args.pp_size - 1
        self.h, self.f = c.hidden_size, c.intermediate_size // tp
        self.q = c.num_attention_heads * c.head_dim // tp
        self.kv = c.num_key_value_heads * c.head_dim // tp
        self.vocab = -(-c.vocab_size // tp)
        self.tokens = args.micro_batch_size * args.seq_len // args.cp_size  # of a micro-batch here
        self.between = self.h // tp if args.sequence_parallel else self.h  # of a token, there
        # Step 1: q, o; k, v; gate, up, down; two norms.
        self.columns = self.h * (self.q + 2 * self.kv + 2 * self.f)
        self.rows = self.h * (self.q + self.f)
        self.layer = self.columns + self.rows + 2 * self.h
        tables = self.first + (self.last and not (self.first and c.tie_word_embeddings))
        self.outside = tables * self.h * self.vocab + self.last * self.h
        self.weights = self.layers * self.layer + self.outside

    def memory(self):
        """Bytes by what they are for."""
        a, n = self.args, self.args.dp_size * self.args.cp_size  # replicas of a weight, step 6
        engine = a.dp_engine if n > 1 else "naive"
        level = int(engine[-1]) if "zero" in engine else 0
        weights, gradients, moments = (4 * self.weights, 4 * self.weights, 8 * self.weights)
        owned = {
            "weights": weights / (n if level == 3 else 1),
            "gradients": gradients / (n if level >= 2 else 1),
            "moments": moments / (n if level >= 1 else 1),
        }
        # Step 6, zero3: gathered, two layers and what is outside; zero2: two buckets on their way.
        bucket = {2: 25 * 2**20, 3: 4 * self.layer}.get(level, 0)
        owned["buckets"] = 2 * bucket + (level == 3) * (2 * 4 * self.layer + 4 * self.outside)

        # Step 4: what autograd keeps of a token in a layer, two bytes each: x and its norm, twice;
        # q, k, v and out (once more for o after a ring); gate, its silu, up and their product.
        inner = 2 * self.q + 2 * self.kv + (a.cp_size > 1) * self.q + 4 * self.f
        whole = 2 * self.tokens * (4 * self.between + inner)
        # And a bfloat16 copy of each weight that F.linear used; column-parallel layers keep none.
        whole += 2 * (self.rows + (a.tp_size == 1) * self.columns)
        kept = 2 * self.tokens * self.between if a.activation_checkpointing else whole
        # The final norm and the head; of the loss what is there at once at its largest moment:
        # log-softmax and two gradients in float32, or with tp logits and two float32 tensors.
        head = 4 * self.tokens * self.between + (a.tp_size == 1) * 2 * self.h * self.vocab
        loss = head + (12 if a.tp_size == 1 else 10) * self.tokens * self.vocab
        again = whole if a.activation_checkpointing else 0  # one layer, computed anew
        self.alive = min(a.pp_size - self.place, self.m)  # step 8
        owned["activations"] = self.alive * self.layers * kept + max(self.last * loss, again)
        return owned

    def traffic(self):
        """Rows of (axis, collective, bytes, bytes sent), of one step.

        Bytes are those of the ledger, of full tensors; of them a ring of n sends (n - 1) / n, of an
        all-reduce twice that (step 2).
        """
        a, m, n = self.args, self.m, self.args.dp_size * self.args.cp_size
        rows = []

        def add(axis, collective, size, ranks):
            share = {"send": 1, "all_reduce": 2 * (ranks - 1) / ranks}
            share = share.get(collective, (ranks - 1) / ranks)
            if ranks > 1 and size:
                rows.append((axis, collective, size, size * share))

        x, table, redo = 2 * self.tokens * self.h, 4 * self.tokens * self.h, 0
        redo = int(a.activation_checkpointing)
        # Step 4: o, down forward; qkv, gate-up backward; the head's; the embedding in float32.
        sums = m * (x * ((4 + redo) * self.layers + self.last) + table * self.first)
        if a.sequence_parallel:
            gathers = x * ((6 + 2 * redo) * self.layers + 2 * self.last) + table * self.first
            add("tp", "reduce_scatter", sums, a.tp_size)
            add("tp", "all_gather", m * gathers, a.tp_size)
            norms = m * 4 * self.h * (2 * self.layers + self.last)
            add("tp", "all_reduce", norms, a.tp_size)
        else:
            add("tp", "all_reduce", sums, a.tp_size)
        add("tp", "all_gather", m * self.last * 2 * 4 * self.tokens * a.tp_size, a.tp_size)  # loss

        # Step 5: blocks of keys and values in bfloat16, forward and backward; their gradients.
        block = 2 * self.tokens * self.kv
        hops = (2 + redo) * (a.cp_size - 1) * 2 + a.cp_size * 4
        add("cp", "send", m * self.layers * hops * block, a.cp_size)

        # Step 6, all in float32; zero3 keeps the last layer and what is outside until backward.
        size, engine = 4 * self.weights, a.dp_engine
        again = size - 4 * self.layer - 4 * self.outside
        if engine in ("naive", "bucket"):
            add("dp_cp", "all_reduce", size, n)
        else:
            add("dp_cp", "reduce_scatter", size * (1 if engine == "zero1" else m), n)
            gathers = m * (size + again) if engine == "zero3" else size
            add("dp_cp", "all_gather", gathers, n)

        # Step 7: activations on, gradients back; and the table that both ends hold.
        ways = 2 - self.first - self.last
        add("pp", "send", m * ways * 2 * self.tokens * self.between, a.pp_size)
        if a.config.tie_word_embeddings and (self.first or self.last):
            size = 4 * self.h * self.vocab / (n if "zero" in engine else 1)
            add("ends", "all_reduce", size, min(2, a.pp_size))
        return rows

    def flops(self):
        """Of one rank in a step: 6 a weight and token, and attention (step 1)."""
        a = self.args
        attention = 12 * self.q * a.seq_len  # of a layer and token
        matrices = 6 * (self.layers * self.layer + self.last * self.h * self.vocab)
        return self.m * self.tokens * (matrices + self.layers * attention)


def main(argv):
    args = parse_args(argv)
    c, ranks = args.config, args.tp_size * args.cp_size * args.dp_size * args.pp_size
    stages = [Stage(args, place) for place in range(args.pp_size)]
    stage = max(stages, key=lambda stage: sum(stage.memory().values()))
    memory, sent = stage.memory(), {}
    for axis, _, _, size in stage.traffic():
        sent[axis] = sent.get(axis, 0) + size
    flops, bubble = stage.flops(), (args.pp_size - 1) / (stage.m + args.pp_size - 1)
    if args.row:
        cells = [sum(memory.values()) - memory["activations"], memory["activations"]]
        cells = [f"{x / 1e9:.1f}" for x in (*cells, sum(memory.values()))]
        axes = [f"{sent[x] / 1e9:.1f}" if x in sent else "" for x in ("tp", "cp", "dp_cp", "pp")]
        print("|", " | ".join([*cells, *axes, f"{bubble:.0%}" if bubble else ""]), "|")
        return
    sizes = " x ".join(f"{axis} {getattr(args, axis + '_size')}" for axis in ("pp", "dp", "cp", "tp"))
    batch = args.micro_batch_size * stage.m * args.dp_size
    print(f"{ranks} ranks = {sizes}, {batch} sequences of {args.seq_len:,} tokens a step")
    print(
        f"the fullest stage: {stage.place}, layers {stage.mine.start} to {stage.mine.stop - 1} of "
        f"{c.num_hidden_layers}, {stage.weights / 1e9:.3f} billion weights a rank, "
        f"{stage.alive} micro-batches alive"
    )
    for kind, size in [*memory.items(), ("in all", sum(memory.values()))]:
        print(f"{kind:12} {size / 1e9:9.2f} GB")
    print(f"computes {flops / 1e12:,.1f} TFLOP in a step; {bubble:.1%} of the time is a bubble")
    for axis, size in sent.items():
        print(f"{axis:12} {size / 1e9:9.3f} GB sent, {flops / size:12,.0f} FLOP for each byte")


if __name__ == "__main__":
    main(sys.argv[1:])
