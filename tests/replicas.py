"""Puts full tensors together from what the ranks hold, and says in words why they do not fit.

What several ranks hold is a replica, and must be the same on all of them to the last bit.
"""

import itertools

import numpy as np
from tensor_names import and_join, layer_of, layers_in_words, listed, norms_of, tables_of, which

GRADIENT = {  # by the axis along which replicas of a gradient differ
    "dp and cp": "Ranks that differ along dp or cp see other tokens. Their gradients must be added "
    "up before the optimizer uses them (`engine.finish_gradients`; in step 5 `sum_gradients`): for "
    "every parameter, once, after the last micro-batch, over dp and cp together.",
    "tp": "Ranks that differ along tp see the same tokens, so what both hold must have the same "
    "gradient. Often a sum over tp is missing: of the output of a row-parallel layer (forward), or "
    "of the gradient for the input x of a column-parallel layer (backward).",
    "tp, norms": "With sequence parallelism each tp rank has other tokens at the norms. So the "
    "gradient of a norm's weight must be added up over tp (`SumGradient`).",
    "pp": "Only a tied embedding is held by two stages, the first and the last. Each computes the "
    "gradient of its own use; the two must be added up (`sum_shared_gradients`).",
    "replicas": "All ranks train the same model on the same batch: each must read the same tokens "
    "and use the same flags.",
}
WEIGHT = {  # of a weight after updates, whose gradients were the same
    "dp and cp": "The gradients are the same on these ranks, so their updates differ. Look at the "
    "optimizer's state, at the factor of the clipping, and with an engine that shards at the "
    "gather of the updated weights (`finish_update`).",
    "tp": "The gradients are the same on these ranks, so their updates differ. Often each tp rank "
    "clips by the norm of what it holds itself. The gradient norm is that of the whole model: add "
    "the squares up over all ranks that hold different parts (`gradient_norm`).",
    "pp": "The gradients are the same on these stages, so their updates differ. Often each stage "
    "clips by the norm of its own layers. The gradient norm is that of the whole model.",
    "replicas": "The gradients are the same on these ranks, so their updates differ: look at the "
    "learning rate, the clipping and the optimizer's state.",
}
INITIAL = (
    "An initial weight depends on the seed and on the tensor's name, never on the rank. Draw the "
    "full tensor, then keep the slice `held`."
)


def whole_of(held, name):
    """What one rank holds of a tensor, in its full shape; NaN and False where it holds nothing."""
    (shape,) = {shape for other, shape, *_ in held if other == name}
    whole, there = np.full(shape, np.nan), np.zeros(shape, bool)
    for other, _, slices, piece, array in held:
        if other == name:
            for full, values in ((whole, array.flatten()), (there, True)):
                flat = full[slices].flatten()
                flat[piece] = values
                full[slices] = flat.reshape(full[slices].shape)
    return whole, there


def assemble(ranks, what="", sizes=None):
    """Full arrays {name: array} from the pieces of all ranks, a list for each rank.

    what: "initial weight", "step 1, gradient" and the like; sizes: the run's, for better words.
    Raises AssertionError where no rank holds an element, or two hold different values of it.
    """
    __tracebackhide__ = True  # what pytest shows ends at the caller's line
    full = {}
    for rank, held in enumerate(ranks):
        for name, shape, slices, piece, array in held:
            whole = full.setdefault(name, np.full(shape, np.nan))
            flat = whole[slices].flatten()
            there, array = flat[piece], array.flatten()
            if (~np.isnan(there) & (there != array)).any():
                raise AssertionError(why_replicas_differ(ranks, rank, name, what, sizes))
            flat[piece] = array
            whole[slices] = flat.reshape(whole[slices].shape)
    for name, whole in full.items():
        if np.isnan(whole).any():
            raise AssertionError(why_incomplete(ranks, name, what, sizes))
    return full


def label(what, name):
    return f"{what} of {name}" if what else name


# --- replicas that differ -------------------------------------------------------------------------


def holders(ranks, name):
    """{rank: (its values in the full shape, where it holds some)}, of the ranks that hold any."""
    return {
        rank: whole_of(held, name)
        for rank, held in enumerate(ranks)
        if any(other == name for other, *_ in held)
    }


def difference(one, other):
    """(largest relative difference, differing numbers, numbers that both hold) of two ranks."""
    (a, in_a), (b, in_b) = one, other
    both = in_a & in_b
    a, b = a[both], b[both]
    differs = a != b
    largest = max(np.abs(a).max(initial=0), np.abs(b).max(initial=0)) or 1
    return np.abs(a - b).max(initial=0) / largest, int(differs.sum()), a.size


def axes_between(a, b, sizes):
    """The axes along which two ranks have different places."""
    one, other = (sizes.place(rank) if sizes else {} for rank in (a, b))
    return [axis for axis in one if one[axis] != other[axis]]


def differing_axes(held, sizes):
    """The axes along which ranks hold different values; None where no two hold the same part.

    Of the pairs of ranks with different values those count that differ along the fewest axes.
    """
    pairs, shared = [], False
    for a, b in itertools.combinations(held, 2):
        _, count, size = difference(held[a], held[b])
        shared |= size > 0
        if count:
            pairs.append(axes_between(a, b, sizes))
    if not shared:
        return None
    fewest = min(map(len, pairs), default=0)
    return {axis for axes in pairs if len(axes) == fewest for axis in axes}


def why_replicas_differ(ranks, rank, name, what, sizes):
    """The message for a tensor of which a rank holds another value than one before it."""
    held = holders(ranks, name)
    earlier = [other for other in held if other < rank and difference(held[other], held[rank])[1]]
    # The one that differs along the fewest axes says most about what is missing.
    first = min(earlier, key=lambda other: len(axes_between(other, rank, sizes)))
    off, count, size = difference(held[first], held[rank])
    lines = [
        f"{label(what, name)}: rank {rank} holds another value than rank {first} ({count} of "
        f"{size} numbers differ, by at most {off:.3g} of the largest)"
    ]
    if sizes is None:
        return lines[0]
    names = list(dict.fromkeys(other for held_of in ranks for other, *_ in held_of))
    found = {other: differing_axes(holders(ranks, other), sizes) for other in names}
    axes = {other: along for other, along in found.items() if along}
    along = set().union(*axes.values())
    several = [other for other in names if found[other] is not None]
    lines.append(
        f"  wrong: {which(list(axes), several)}, on ranks that differ along {in_order(along)}"
    )
    lines.append(f"  held by several ranks: {len(several)} of the {len(names)} tensors")
    lines.append(f"  the run: {sizes}")
    return "\n".join(lines) + listed(causes_of(what, axes, along, off, sizes))


def in_order(axes):
    return and_join([axis for axis in ("tp", "cp", "dp", "pp", "replicas") if axis in axes])


def causes_of(what, axes, along, off, sizes):
    """Sentences: axes, by name of a tensor that differs, along which; along: all of these axes."""
    if off < 1e-9 and "initial" not in what:
        return [
            "So small a difference comes from the order of a sum: the same numbers were added up "
            "in another order. On all replicas a gradient must lie in the same place of a bucket "
            "of the same size, and be added up by the same collective."
        ]
    if "initial" in what:
        return [INITIAL]
    table, found = GRADIENT if "gradient" in what else WEIGHT, []
    names = list(axes)
    if along & {"dp", "cp"}:
        found.append(table["dp and cp"])
        if len(along & {"dp", "cp"}) == 1 and sizes.dp > 1 and sizes.cp > 1:
            (missing,) = along & {"dp", "cp"}
            other = "cp" if missing == "dp" else "dp"
            found.append(f"Along {other} they agree, so only the sum over {missing} is missing.")
    if "tp" in along and not along & {"dp", "cp"}:
        of_norms = norms_of(names) == names and sizes.sequence_parallel and table is GRADIENT
        found.append(table["tp, norms" if of_norms else "tp"])
    if "pp" in along and tables_of(names) == names:
        found.append(table["pp"])
    if "replicas" in along:
        found.append(table["replicas"])
    return found


# --- elements that nobody holds -------------------------------------------------------------------


def box(missing):
    """The smallest slices that hold all true elements of an array, one for each dim."""
    return tuple(slice(int(where.min()), int(where.max()) + 1) for where in np.nonzero(missing))


def why_incomplete(ranks, name, what, sizes):
    """The message for a tensor of which a part is held by nobody, or is not a number."""
    held = holders(ranks, name)
    missing = ~np.any([there for _, there in held.values()], axis=0)
    if not missing.any():
        bad = [rank for rank, (whole, there) in held.items() if np.isnan(whole[there]).any()]
        text = f"{label(what, name)}: holds a NaN on rank {and_join(bad)}."
        if "initial" in what:
            return text + " It was never filled with its initial value, or divided by zero."
        return text + " Something was divided by zero, or memory was used before it was filled."
    slices = box(missing)
    cut = [dim for dim, size in enumerate(missing.shape) if slices[dim] != slice(0, size)]
    where = ", ".join(
        f"[{s.start}:{s.stop}] of dim {dim} (size {missing.shape[dim]})"
        for dim, s in enumerate(slices)
        if dim in cut
    )
    lines = [
        f"{label(what, name)}: a part that no rank holds: {where or 'all of it'}, "
        f"{int(missing.sum())} of {missing.size} numbers. Held by rank {and_join(held)}."
    ]
    if sizes is None:
        return lines[0]
    lines += [f"  the run: {sizes}", who_should_hold(ranks, name, missing, slices, cut, sizes)]
    return "\n".join(line for line in lines if line)


def who_should_hold(ranks, name, missing, slices, cut, sizes):
    """One sentence: which ranks should hold a missing part, as far as the sizes tell."""
    along = {}  # axis: the place along it that the part belongs to
    split = [  # by tp: dims of which some rank holds a slice only
        dim
        for dim in cut
        for held in ranks
        for other, shape, held_slices, *_ in held
        if other == name and held_slices[dim].indices(shape[dim]) != (0, shape[dim], 1)
    ]
    if sizes.tp > 1 and split:
        dim = split[0]
        middle = (slices[dim].start + slices[dim].stop) / 2
        along["tp"] = int(middle * sizes.tp / missing.shape[dim])
    elif sizes.engine.startswith("zero") and sizes.dp * sizes.cp > 1:
        return (
            f"With {sizes.engine} each of the {sizes.dp * sizes.cp} ranks along dp and cp has a "
            "shard of each bucket. Look at where the shards begin and end, at the last one, which "
            "may be padded, and at `piece`, the slice of the flattened tensor that a shard has."
        )
    places = {rank: sizes.place(rank) for rank in range(len(ranks))}
    stages = {places[rank].get("pp") for rank, held in enumerate(ranks) if has_layer(held, name)}
    due = [
        rank
        for rank, place in places.items()
        if all(place.get(axis) == value for axis, value in along.items())
        and place.get("pp") in stages
    ]
    if not along or not due:
        return ""
    words = " and ".join(f"{axis} rank {value}" for axis, value in along.items())
    several = "s" if len(due) > 1 else ""
    return (
        f"It is the part of {words}: global rank{several} {and_join(due)} should hold it. Look at "
        "the slices `held` there: they must follow this rank's place along the axis."
    )


def has_layer(held, name):
    """Whether a rank holds anything of a tensor's layer; outside of layers, of the tensor."""
    if layer_of(name) is None:
        return any(other == name for other, *_ in held)
    return any(layer_of(other) == layer_of(name) for other, *_ in held)


def only_on_one_side(missing, unexpected, what, sizes=None):
    """The message for names of tensors that only one of two runs has."""
    lines = [f"{what}: the two sides do not have the same tensors."]
    if missing:
        lines.append(f"No rank holds {some_of(missing)}.")
    if unexpected:
        lines.append(f"Nobody expects {some_of(unexpected)}.")
    if sizes is not None and sizes.pp > 1:
        lines.append(
            "With pp each layer belongs to one stage, and keeps its number in the whole model: "
            "see which layers each stage keeps, and under which names."
        )
    return "\n".join(lines)


def some_of(names):
    layers = {layer_of(name) for name in names} - {None}
    outside = [name for name in names if layer_of(name) is None]
    return and_join([*([f"tensors of {layers_in_words(layers)}"] if layers else []), *outside])
