"""What usually causes a wrong number: the sentences, and when each of them fits.

Names of functions are those of the lessons; a step of one's own may name them otherwise.
"""

import numpy as np
from tensor_names import and_join, first_in_backward, kind_of, layer_of, norms_of, tables_of

# By the factor's key in `Sizes.factors`: (found is so many times the expected, or this part of it).
LOSS = {
    "micro-batches": (
        "Each micro-batch's loss was divided by its own targets only. Divide it by the targets of "
        "all micro-batches of the step (`tokens_per_step`); then add the losses up.",
        "The loss was divided by the number of micro-batches once too often, or only one "
        "micro-batch's loss was counted. Each loss is divided by the targets of the whole step "
        "already, so the losses must be added up.",
    ),
    "dp and cp": (
        "Each rank divided by the targets that it saw itself. Divide by the targets of all ranks "
        "(`tokens_per_step`); then add up over dp and cp.",
        "The loss of one rank alone was reported, or a mean over ranks was taken. Each rank's loss "
        "is divided by the targets of all ranks already, so the ranks' losses must be added up "
        "(an `all_reduce` with a sum over dp and cp).",
    ),
    "dp": (
        "Each dp rank divided by the targets of its own sequences only. Divide by the targets of "
        "all ranks (`tokens_per_step`); then add up over dp and cp.",
        "The sum goes over cp only. It must go over dp and cp together.",
    ),
    "cp": (
        "Each cp rank divided by the targets of its own part of the sequences. Divide by the "
        "targets of all ranks (`tokens_per_step`); then add up over dp and cp.",
        "The sum goes over dp only. It must go over dp and cp together.",
    ),
    "both": (
        "Each micro-batch's loss was divided by the targets that this rank saw in it. Divide by "
        "the targets of all micro-batches and all ranks (`tokens_per_step`).",
        "The loss of one micro-batch of one rank was reported, or a mean was taken of what was "
        "divided by all targets already.",
    ),
    "tp": (
        "The loss was added up over tp. But each tp rank computes the loss of all its targets: "
        "every tp rank has the same number already.",
        "A mean over tp was taken of something that has to be added up.",
    ),
    "pp": (
        "The loss was added up over the pipeline's stages, and each of them had it already. Only "
        "the last stage has a loss; the others must add zero.",
        "A mean over the pipeline's stages was taken. Only the last stage has a loss; the others "
        "add zero, so the sum is right.",
    ),
    "replicas": (
        "The loss was added up over replicas, which all have the same loss.",
        "The loss was divided by the number of replicas, which all have the same loss.",
    ),
    "targets": (
        "The loss is a sum over the targets. Divide it by their number (`tokens_per_step`).",
        "The loss was divided by the number of targets twice.",
    ),
}
GRADIENT = {
    **LOSS,
    "micro-batches": (
        "The loss that goes backward was divided by the targets of one micro-batch only. Divide it "
        "by the targets of all micro-batches of the step (`tokens_per_step`).",
        "The gradients were divided by the number of micro-batches. Each micro-batch's loss is "
        "divided by the targets of the whole step already, so the gradients must be added up.",
    ),
    "dp and cp": (
        "The gradients were added up over dp and cp twice. Or the loss that goes backward was "
        "divided by the targets of one rank only.",
        "The gradients were averaged over dp and cp (or divided by the number of these ranks). The "
        "loss is divided by the targets of all ranks already, so the gradients must be added up, "
        "and no other factor may stand anywhere.",
    ),
    "both": (
        "The loss that goes backward was divided by the targets that one rank sees in one "
        "micro-batch. Divide it by those of all micro-batches and all ranks (`tokens_per_step`).",
        "The gradients were averaged over micro-batches and ranks. They must be added up: the loss "
        "is divided by all targets already.",
    ),
    "tp": (
        "A sum over tp too many: each tp rank had the whole gradient already. An all-reduce in the "
        "forward pass has no communication in its backward pass, and the other way round.",
        "A sum over tp is missing, or a mean was taken in its place.",
    ),
    "pp": (
        "A sum over the pipeline's stages too many: a stage's gradients are whole already.",
        "The gradients were divided by the number of stages. No such factor is needed.",
    ),
    "replicas": (
        "The gradients were added up over replicas, which all have the same gradient.",
        "The gradients were divided by the number of replicas, which all have the same gradient.",
    ),
}
FORWARD = {  # by axis: what a wrong loss without a known factor often is
    "tp": "tp: the outputs of row-parallel layers must be added up over tp. In the embedding and "
    "in the loss a rank must leave out the symbols that other ranks hold. The loss needs the "
    "logits of all tp ranks.",
    "cp": "cp: three things must agree (the zigzag): the tokens that a rank gets, the positions by "
    "which it rotates queries and keys, and the order that attention takes for granted. A token "
    "needs the keys and values of all tokens before it, also those of other ranks. Blocks of a "
    "softmax must be merged with their denominators.",
    "dp": "dp: the ranks must read different sequences, together exactly those that one process "
    "reads.",
    "pp": "pp: a stage must pass its output on to the stage that has the next layers, in the order "
    "of the micro-batches.",
}


TIED = "The embedding and the head are one weight here. Its gradient is the sum of both uses."
TIED_STAGES = " The first stage has one use and the last stage the other (`sum_shared_gradients`)."
RING = (
    "With cp the keys and values of a rank are used on all ranks. Their gradients must come back "
    "to the rank that computed them, and be added up there (`send_home`)."
)


def factor_meanings(quantity, ratio, sizes):
    """Sentences for found / expected = ratio of a "loss" or a "gradient"; none for a strange one.

    Of a loss also a factor that is nearly one of the run's sizes counts: each rank and micro-batch
    has other tokens, so the loss of one of them is about its part of all.
    """
    if ratio is None:
        return []
    if ratio == 0:
        return [
            "It is zero: it was never computed, or what should fill it never ran, like a hook that "
            "nobody kept, or a sum that nobody waited for."
        ]
    table, found = (LOSS if quantity == "loss" else GRADIENT), []
    for number, key, words in sizes.factors():
        for factor, written in ((number, ""), (1 / number, f" 1 / {number}")):
            near = abs(ratio / factor - 1)
            if near < 1e-4 or (quantity == "loss" and near < 0.05):
                about = "is" if near < 1e-4 else "is about"
                value = (
                    f"{ratio:.4g} {about}{written}, and {number} is"
                    if written
                    else (
                        f"{number} is"
                        if near < 1e-4
                        else f"{ratio:.4g} is about {number}, which is"
                    )
                )
                found.append(f"{value} {words}. {table[key][factor < 1]}")
    if len(found) > 1:
        found.append("To see which of these it is, run with sizes that are different numbers.")
    if not found and quantity == "gradient" and abs(ratio - 1) > 1e-3:
        found.append(
            f"{ratio:.4g} is none of the run's sizes: look for a constant by which these gradients "
            "are multiplied or divided."
        )
    return found


def loss_meanings(sizes):
    """Of a first loss that is wrong by no known factor, while the initial weights are right."""
    axes = [axis for axis in FORWARD if getattr(sizes, axis) > 1]
    start = "The factor is none of the run's sizes, so the forward pass computes something else: "
    if not axes:
        return [start + "other tokens or targets than the run it is compared with, or another sum."]
    return [start + "see how each axis takes part in it.", *(FORWARD[axis] for axis in axes)]


def gradient_meanings(wrong, names, common, sizes, stages):
    """Of gradients that are wrong, by which tensors these are; common: their factor or None."""
    if len(wrong) == len(names):
        return [] if common is not None else lost_contributions(sizes)
    kinds = set(map(kind_of, wrong))
    if {name for name in names if kind_of(name) in kinds} == set(wrong):
        return only_meanings(wrong, kinds, sizes)
    return start_meanings(wrong, names, sizes, stages)


def start_meanings(wrong, names, sizes, stages):
    """Of gradients that are wrong from some tensor on, in the order of the backward pass."""
    first, found = first_in_backward(wrong), []
    if any(first_in_backward([name, first]) == name != first for name in names):
        found.append(
            f"The backward pass goes from the loss to the embedding. On this way {first} is the "
            "first tensor with a wrong gradient. Look at what is computed between it and the "
            "tensors that come before it on this way, whose gradients are right."
        )
    layer = layer_of(first)
    start = {kind_of(name) for name in wrong if layer_of(name) == layer} - {"input_layernorm"}
    if start <= {"k_proj", "v_proj"} and sizes.cp > 1:
        found.append(RING)
    every = set().union(*stages.values()) if stages else set()
    last = max(set().union(*(stages[name] for name in wrong))) if stages else None
    if last is not None and last + 1 in every:
        found.append(
            f"Stage {last} is the last one with wrong gradients. It starts its backward pass from "
            f"a gradient that stage {last + 1} sends: does it arrive whole, and for the right "
            "micro-batch?"
        )
    if sizes.tp > 1:
        found.append(
            "With tp the gradient for the input x of a column-parallel layer must be added up over "
            "tp in the backward pass, before the layers below use it."
        )
    return found


def lost_contributions(sizes):
    """Of gradients that are all wrong, without a common factor."""
    found = []
    if sizes.micro_batches > 1:
        found.append(
            f"Each of the {sizes.micro_batches} micro-batches must add its gradient, once. Nothing "
            "may set the gradients to zero between them."
        )
    if (count := sizes.dp * sizes.cp) > 1:
        found.append(
            f"Each of the {count} ranks along dp and cp saw other tokens. Their gradients must be "
            "added up once. What is a sum over ranks already must not be added up again together "
            "with the next micro-batch (`finish_gradients`)."
        )
    return found or [
        "All tensors are wrong: look at what they all depend on, the loss and the head."
    ]


def only_meanings(wrong, kinds, sizes):
    """Of gradients that are wrong in all tensors of some kinds, and in no other."""
    found = []
    if norms_of(wrong) == wrong:
        if sizes.tp > 1 and sizes.sequence_parallel:
            found.append(
                "With sequence parallelism each tp rank has other tokens at the norms. So the "
                "gradient of a norm's weight must be added up over tp (`SumGradient`)."
            )
        elif sizes.tp > 1:
            found.append(
                "Without sequence parallelism each tp rank has all tokens at the norms. So the "
                "gradient of a norm's weight is whole on each of them and is not added up over tp."
            )
        if sizes.dp * sizes.cp > 1:
            found.append(
                "The sum over dp and cp must not leave out the norms' weights: every parameter "
                "belongs to it."
            )
    elif tables_of(wrong) == wrong:
        if sizes.tied:
            found.append(TIED + (TIED_STAGES if sizes.pp > 1 else ""))
        if sizes.tp > 1:
            found.append(
                "The tp ranks hold different rows of these tables. A symbol that another rank "
                "holds must add nothing to the gradient here (`local_symbol`)."
            )
    elif kinds <= {"k_proj", "v_proj"} and sizes.cp > 1:
        found.append(RING)
    elif kinds <= {"q_proj", "k_proj", "v_proj"} and sizes.tp > 1:
        found.append(
            "Each tp rank computes some of the heads: its slices of q_proj, k_proj and v_proj must "
            "belong to the same heads."
        )
    return found


def weight_meanings(what, weights, sizes):
    """Of weights: before the first step, or where all gradients so far were right.

    weights: the comparison of them, None where only later numbers show that they are wrong.
    """
    if what == "initial weight":
        return initial_meanings(weights, sizes)
    found = [
        "All losses, gradients and gradient norms before the last update are right, so the update "
        "is wrong: its learning rate, the clipping, the weight decay (on matrices only) or the "
        "optimizer's state. Or the forward pass does not use the updated weights."
    ]
    if sizes.engine.startswith("zero") and sizes.dp * sizes.cp > 1:
        found.append(
            f"With {sizes.engine} each rank updates its shard only. The others need it before the "
            "next forward pass: see that the weights are gathered after the update "
            "(`finish_update`), and that none gathered before it are kept."
        )
    return found


def initial_meanings(weights, sizes):
    found = []
    for name in weights.wrong:
        for other, expected in weights.expected.items():
            if other != name and np.array_equal(expected, weights.found[name]):
                found.append(
                    f"{name} has the initial values of {other}. A layer keeps its number in the "
                    "whole model: stages of a pipeline must not count their layers from 0."
                )
                break
        if found:
            break
    if repeats := [name for name in weights.wrong if repeated(weights.found[name], sizes.tp)]:
        found.append(
            f"All {sizes.tp} tp ranks have the same part of {and_join(repeats[:2])}. Each must "
            "take the part of its own tp rank (`held`) out of the full tensor."
        )
    return found or [
        "An initial weight depends on the seed and on the tensor's name, on nothing else. Draw the "
        "full tensor, with the name and the shape of the whole model, then keep the slice `held`."
    ]


def repeated(tensor, count):
    """Whether a matrix consists of `count` equal parts, along any of its dims."""
    for dim in range(tensor.ndim if tensor.ndim > 1 and count > 1 else 0):
        if tensor.shape[dim] % count == 0:
            first, *others = np.split(tensor, count, dim)
            if all(np.array_equal(first, other) for other in others):
                return True
    return False
