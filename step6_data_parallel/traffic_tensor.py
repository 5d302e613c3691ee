"""The traffic of tensor parallelism, by formula."""

from flags import DTYPES


def tensor_parallel_traffic(args, model):
    """What the group sends in a step: rows of (axis, collective, calls, bytes)."""
    if args.tp_size == 1:
        return []
    # Of what this rank has: layers, and whether the two tables (until step 7, both).
    steps, layers = args.gradient_accumulation_steps, len(model.model.layers)
    embedding, head = (hasattr(x, "weight") for x in (model.model.embed_tokens, model.lm_head))
    tokens = args.micro_batch_size * args.seq_len // args.cp_size
    number, weight = (DTYPES[name].itemsize for name in (args.dtype, args.weights_dtype))  # bytes
    whole, table = (tokens * args.config.hidden_size * size for size in (number, weight))

    # Forward o, down (and the embedding), backward qkv, gate-up and the head; o once more if a
    # layer is recomputed, which stops before down's sum: backward does not need it.
    sums = (4 + args.activation_checkpointing) * layers + head
    loss = ("tp", "all_gather", steps * head, 2 * tokens * max(4, number) * args.tp_size)
    if not args.sequence_parallel:
        rows = (steps * sums, whole), (steps * embedding, table)
        return [*(("tp", "all_reduce", *row) for row in rows), loss]
    # Before qkv, gate-up and the head (twice if recomputed), again for their weights' gradients,
    # and for the gradients of o and down.
    gathers = (6 + 2 * args.activation_checkpointing) * layers + 2 * head
    return [
        ("tp", "reduce_scatter", steps * sums, whole),
        ("tp", "all_gather", steps * gathers, whole),
        ("tp", "reduce_scatter", steps * embedding, table),
        ("tp", "all_gather", steps * embedding, table),
        ("tp", "all_reduce", steps * (2 * layers + head), args.config.hidden_size * weight),
        loss,
    ]
