"""Which layouts the tests train, and with which options.

Every factorisation tp x cp x dp of 1, 2, 3, 4, 6 and 8 ranks is a row, once; where layers can be
split, every tp x cp x dp x pp of 2, 4 and 8 in which they are. The options of a row are chosen
greedily, so that all rows together hold every pair of values of two different columns: tp split or
not, cp split or not, dp split or not, engine, sequence parallelism, layers plain, recomputed or (on
two ranks at most) compiled, embeddings tied or not, and in a pipeline schedule and number of
micro-batches. Rows are added for pairs that are left.

`everything()` is the long list, for the step with all axes: every factorisation of 1, 2, 4 and 8
ranks and ten of 16, in a pipeline once for each schedule and each number of micro-batches.
"""

import itertools
import math
from collections import Counter

AXES = ("tp", "cp", "dp", "pp")
SIZES = (1, 2, 3, 4, 6, 8)
ENGINES = ("naive", "bucket", "zero1", "zero2", "zero3")
LAYERS = ("", "--activation_checkpointing", "--compile aot_eager")  # the last is slow to start
SCHEDULES = ("afab", "1f1b")
MICRO_BATCHES = (1, 2, "all")  # "all": of one sequence each or of few, more than stages
SEQUENCES = 24  # a global batch that all dp sizes divide, with two micro-batches or more
SIXTEEN = [
    (2, 2, 2, 2), (4, 2, 2, 1), (4, 1, 2, 2), (2, 4, 1, 2), (1, 2, 2, 4), (2, 1, 1, 8),
    (1, 8, 2, 1), (8, 1, 1, 2), (1, 4, 4, 1), (2, 2, 1, 4),
]  # fmt: skip

# Different sequences in every row; a vocabulary that no tp size divides.
COMMON = (
    "--dtype float64 --learning_rate 3e-3 --warmup_steps 2 "
    "--dataset_name random --vocab_size 257 --intermediate_size 96 "
)
# 16 heads and 8 kv heads for powers of two; 24 and 12 where a size is a multiple of 3.
SHAPES = {
    False: "--hidden_size 64 --num_attention_heads 16 --num_key_value_heads 8 --seq_len 32 ",
    True: "--hidden_size 96 --num_attention_heads 24 --num_key_value_heads 12 --seq_len 36 ",
}


def factorisations(size, axes):
    """All (tp, cp, dp, pp) with that product, in which only `axes` are split, and pp if it can."""
    return [
        sizes
        for sizes in itertools.product(range(1, size + 1), repeat=4)
        if math.prod(sizes) == size
        and all(n == 1 or axis in axes for axis, n in zip(AXES, sizes, strict=True))
        and ("pp" not in axes or (sizes[3] > 1 and size in (2, 4, 8)))
    ]


def choices(layout, axes):
    """All rows of a layout: its sizes, then the options.

    These are engine, sequence parallelism, layers, tied, micro-batches, schedule. None stands for
    an option that does nothing in this layout, or that the step does not have yet.
    """
    tp, cp, dp, pp = layout
    engines = ENGINES if cp * dp > 1 and "dp" in axes else (None,)
    layers = LAYERS if math.prod(layout) <= 2 else LAYERS[:2]
    return itertools.product(
        *([size] for size in layout), engines, (False, True) if tp > 1 else (None,), layers,
        (False, True), MICRO_BATCHES if pp > 1 else (None,),
        SCHEDULES if pp > 1 and "schedule" in axes else (None,),
    )  # fmt: skip


def pairs(row):
    """The pairs of values that a row covers; of an axis it counts whether it is split."""
    values = [size > 1 for size in row[:4]] + list(row[4:])
    given = [(column, value) for column, value in enumerate(values) if value is not None]
    return set(itertools.combinations(given, 2))


def covering(axes):
    """Rows with every layout along `axes` and every pair of values that can be had."""
    layouts = [layout for size in SIZES for layout in factorisations(size, axes)]
    return cover([list(choices(layout, axes)) for layout in reversed(layouts)])


def everything():
    """The long list: for each layout, schedule and number of micro-batches one row, and more."""
    sizes = (1, 2, 4, 8)
    layouts = [
        layout for layout in itertools.product(sizes, repeat=4) if math.prod(layout) in sizes
    ] + SIXTEEN
    groups = {}
    for layout in layouts:
        for row in choices(layout, (*AXES, "schedule")):
            groups.setdefault((layout, row[-2:]), []).append(row)
    return cover(list(groups.values()))


def cover(groups):
    """One row of each group, and what else it takes to have every pair of values."""
    every = [row for group in groups for row in group]
    seen = Counter({pair: 0 for row in every for pair in pairs(row)})
    rows = []

    def take(candidates):
        # The most new pairs; of equals the pairs that were rarest so far, then the smallest world.
        def value(row):
            size = math.prod(row[:4])
            return sum(not seen[p] for p in pairs(row)), -sum(seen[p] for p in pairs(row)), -size

        rows.append(max(candidates, key=value))
        seen.update(pairs(rows[-1]))

    for group in groups:
        take(group)
    while 0 in seen.values():
        take(every)
    return rows


def flags_of(row, layers=8, most=SEQUENCES):
    """Two command lines: of a row, and of the same training in one process and one micro-batch.

    In a pipeline of so many layers, or one a stage, and at most so many micro-batches.
    """
    tp, cp, dp, pp, engine, sequence_parallel, kind, tied, micro_batches, schedule = row
    same = COMMON + SHAPES[tp * cp * dp % 3 == 0]
    same += f"--num_hidden_layers {max(layers, pp) if pp > 1 else 2} "
    same += "--tie_word_embeddings yes " if tied else ""
    if micro_batches is None:
        micro_batches = 2 if SEQUENCES // dp % 2 == 0 else 3
    elif micro_batches == "all" or SEQUENCES // dp % micro_batches:
        micro_batches = min(SEQUENCES // dp, most)
    own = f"--micro_batch_size {SEQUENCES // dp // micro_batches} "
    own += f"--gradient_accumulation_steps {micro_batches} {kind} "
    sizes = zip(AXES, row[:4], strict=True)
    own += "".join(f"--{axis}_size {size} " for axis, size in sizes if size > 1)
    own += f"--dp_engine {engine} " if engine else ""
    own += f"--pp_engine {schedule} " if schedule else ""
    own += "--sequence_parallel " if sequence_parallel else ""
    return same + own, same + f"--micro_batch_size {SEQUENCES}"
