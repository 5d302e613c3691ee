"""The traffic of the ring, by formula."""

from flags import DTYPES


def context_parallel_traffic(args, model, group):
    """What this rank sends in a step: rows of (axis, collective, calls, bytes)."""
    cp, config = args.cp_size, args.config
    if cp == 1:
        return []
    number = DTYPES[args.dtype].itemsize  # bytes of one
    tokens = args.micro_batch_size * args.seq_len // cp
    block = 2 * tokens * config.num_key_value_heads // args.tp_size * config.head_dim
    rings = args.gradient_accumulation_steps * len(model.model.layers)
    forwards = 2 if args.activation_checkpointing else 1
    travels = forwards * (cp - 1) + cp - 2  # the way back begins with a block that is there
    later = cp - 1 - group.rank  # ranks to which all their keys' gradients go; to others, half
    return [
        ("cp", "send", rings * (travels + later), block * number),
        ("cp", "send", rings * group.rank, block * number // 2),
        *(("cp", "all_reduce", 1, parameter.nbytes) for parameter in model.parameters()),
    ]
