"""What a wrong number usually means, in words, for one who writes a step.

A `Comparison` finds which tensors of one kind differ, and by which factor. `explain` takes those of
one training step together and adds what usually causes such a difference. It knows the run by its
`Sizes`: a factor of 4 means one thing with 4 micro-batches and another with 4 ranks.
"""

import math
import re
from dataclasses import dataclass

import numpy as np
from causes import factor_meanings, gradient_meanings, loss_meanings, weight_meanings
from tensor_names import first_in_backward, listed, norms_of, tables_of, which

AXES = ("tp", "cp", "dp", "pp")  # the fastest one first: neighbouring ranks differ along tp
NUMBERS = ("loss", "grad_norm", "learning_rate")
TINY = 1e-5  # a relative difference that looks like rounding


@dataclass(frozen=True)
class Sizes:
    """What a run is split into. A step that lacks a flag has 1 of it."""

    ranks: int = 1
    micro_batches: int = 1  # of one rank in one step
    targets: int = 0  # of all ranks in one step; 0 where unknown
    tp: int = 1
    cp: int = 1
    dp: int = 1
    pp: int = 1
    engine: str = ""
    sequence_parallel: bool = False
    tied: bool = False

    @classmethod
    def of(cls, args, ranks):
        """From a step's `args` and the number of processes."""
        return cls(
            ranks=ranks,
            micro_batches=getattr(args, "gradient_accumulation_steps", 1),
            targets=getattr(args, "tokens_per_step", 0),
            engine=getattr(args, "dp_engine", ""),
            sequence_parallel=getattr(args, "sequence_parallel", False),
            tied=getattr(args.config, "tie_word_embeddings", False),
            **{axis: getattr(args, f"{axis}_size", 1) for axis in AXES},
        )

    @property
    def replicas(self):
        """How many ranks do the same work: all of them where no axis exists (steps 2 and 3)."""
        return self.ranks if self.tp * self.cp * self.dp * self.pp == 1 else 1

    def place(self, rank):
        """{axis: place of a rank along it}."""
        if self.replicas > 1:
            return {"replicas": rank}
        places = {}
        for axis in AXES:
            rank, places[axis] = divmod(rank, getattr(self, axis))
        return places

    def factors(self):
        """(number, its key in the tables of `causes.py`, what it counts), where above 1."""
        see_others = self.dp * self.cp
        known = [
            (self.micro_batches, "micro-batches", "the number of micro-batches"),
            (see_others, "dp and cp", "the number of ranks that see different tokens (dp x cp)"),
            (self.micro_batches * see_others, "both", "micro-batches x dp x cp"),
            (self.tp, "tp", "the number of tp ranks"),
            (self.pp, "pp", "the number of pipeline stages"),
            (self.replicas, "replicas", "the number of replicas"),
            (self.targets, "targets", "the number of targets of a step"),
        ]
        if self.dp > 1 and self.cp > 1:
            known += [(self.dp, "dp", "the number of dp ranks")]
            known += [(self.cp, "cp", "the number of cp ranks")]
        if self.micro_batches == 1 or see_others == 1:
            known = [one for one in known if one[1] != "both"]
        return [one for one in known if one[0] > 1]

    def __str__(self):
        axes = [f"{axis} {getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1]
        if self.replicas > 1:
            axes = ["all replicas"]
        words = [
            f"{self.ranks} rank{'s' * (self.ranks > 1)}" + f" ({', '.join(axes)})" * bool(axes)
        ]
        words.append(f"{self.micro_batches} micro-batch{'es' * (self.micro_batches > 1)} on each")
        words += [f"engine {self.engine}"] if self.engine and self.dp * self.cp > 1 else []
        words += ["sequence parallelism"] if self.sequence_parallel and self.tp > 1 else []
        words += ["tied embeddings"] if self.tied else []
        return ", ".join(words)


def ratio_of(expected, found):
    """found / expected where that is nearly one number for the whole tensor, else None."""
    square = np.vdot(expected, expected)
    if not square or not np.isfinite(found).all():
        return None
    ratio = float(np.vdot(expected, found) / square)
    rest = np.abs(found - ratio * expected).max()
    return ratio if rest <= 1e-4 * np.abs(found).max() else None


def in_words(ratio, off=None):
    """Of a ratio: "4 times the expected"; where that says little, how far it is off."""
    if ratio is None:
        return "no common factor"
    if ratio == 0:
        return "found is zero"
    if abs(ratio - 1) > 1e-3:
        return f"{ratio:.4g} times the expected"
    return "off by less than 0.1 %" if off is None else f"off by {off:.2g} of the expected"


class Comparison:
    """Tensors of one kind, of one moment, beside those that are expected.

    what: "step 1", "step 1, gradient", "initial weight" and the like. expected, found: arrays by
    name. off: by name, the largest difference as a share of the largest expected number.
    """

    def __init__(self, what, expected, found, off, tolerance):
        self.what, self.expected, self.found = what, expected, found
        self.off, self.tolerance = off, tolerance
        # Not `off > tolerance`, which is false for a NaN.
        self.wrong = [name for name in off if not off[name] <= tolerance]
        self.ratios = {name: ratio_of(expected[name], found[name]) for name in self.wrong}
        kinds = "weight", "gradient"
        self.kind = next((kind for kind in kinds if kind in what), "numbers")

    def worst(self):
        return max(self.wrong, key=lambda name: np.nan_to_num(self.off[name], nan=np.inf))

    def common_ratio(self):
        """found / expected where it is one number for all that is wrong, else None."""
        ratios = [self.ratios[name] for name in self.wrong]
        if None in ratios or not ratios or max(ratios) - min(ratios) > 1e-4 * abs(max(ratios)):
            return None
        return ratios[0]

    def headline(self):
        """The first line: which quantity, what was found and what was expected."""
        name = self.wrong[0]
        if self.kind == "gradient":  # a mistake starts where the backward pass meets it first
            name = first_in_backward(self.wrong)
        label = f"{name} of {self.what}" if name in NUMBERS else f"{self.what} of {name}"
        expected, found, ratio = self.expected[name], self.found[name], self.ratios[name]
        if not np.isfinite(found).all():
            return f"{label}: found a number that is not finite (NaN or infinite)"
        if expected.size == 1:
            text = f"{label}: found {found.item():.12g}, expected {expected.item():.12g}"
            return text + (f" (found / expected = {ratio:.6g})" if ratio is not None else "")
        factor = f", {in_words(ratio)}" if ratio is not None else ""
        return f"{label}: found differs from expected by {self.off[name]:.3g} (relative){factor}"

    def wrong_in_words(self, stages):
        """Which are wrong, each set with its factor: "gradients of ... (0.5 times ...)"."""
        if set(self.off) <= set(NUMBERS):
            return [f"{n} ({in_words(self.ratios[n], self.off[n])})" for n in self.wrong]
        groups = {}  # by the factor as it is written
        for name in self.wrong:
            groups.setdefault(in_words(self.ratios[name]), []).append(name)
        if len(groups) > 3:
            groups = {in_words(None): self.wrong}
        texts = []
        for factor, names in groups.items():
            several = "s" if len(names) > 1 else ""
            kind = "" if self.kind == "numbers" else f"{self.kind}{several} of "
            texts.append(f"{kind}{which(names, list(self.off), stages)} ({factor})")
        return texts

    def right_in_words(self):
        right = [name for name in self.off if name not in self.wrong]
        if set(self.off) <= set(NUMBERS) or not right:
            return right
        kind = "number" if self.kind == "numbers" else self.kind
        others = "other " if self.wrong else ""
        return [f"the {others}{len(right)} {kind}s" if len(right) > 1 else f"the {others}{kind}"]


def norm_meanings(norm, gradient, sizes, stages):
    """Of a gradient norm that is wrong though all gradients are right."""
    found = ["All gradients are right, so the mistake is in how their norm is computed."]
    squares = {name: float(np.vdot(g, g)) for name, g in gradient.expected.items()}
    total, names = sum(squares.values()), list(squares)
    groups = [("all tensors", names), ("the norms' weights", norms_of(names))]
    groups.append(("the embedding and the head", tables_of(names)))
    for stage in range(sizes.pp if stages else 0):
        held = [name for name in names if stage in stages[name]]
        groups.append((f"the tensors of pipeline stage {stage}", held))
    numbers = sorted({number for number, key, _ in sizes.factors() if key != "targets"} | {0})
    for words, members in groups:
        share = sum(squares[name] for name in members)
        for number in numbers if share else ():
            if math.isclose(norm**2, total + (number - 1) * share, rel_tol=1e-6):
                if number:
                    found.append(
                        f"It is exactly the norm in which {words} are counted {number} times. What "
                        "several ranks hold must be counted on one of them only (`counted`), and "
                        "squares must not be added up over ranks that hold the same."
                    )
                else:
                    found.append(
                        f"It is exactly the norm without {words}. The squares must be added up "
                        "over all ranks that hold different parts of the model."
                    )
    if len(found) == 1 and norm**2 > total:
        found.append("It is too large: something is counted on several ranks that hold the same.")
    elif len(found) == 1:
        found.append(
            "It is too small: squares of other ranks are missing. Add them up over all ranks that "
            "hold different parts of the model: tp, pp, and for engines that shard dp and cp."
        )
    return found


def step_meanings(numbers, gradient, first, sizes, stages):
    """What usually causes the differences of one step; numbers, gradient: comparisons or None."""
    ratios = numbers.ratios if numbers else {}
    wrong_gradient = gradient is not None and bool(gradient.wrong)
    common = gradient.common_ratio() if wrong_gradient else None
    if not first:
        return weight_meanings("updated weight", None, sizes)
    if "loss" in ratios:
        found = factor_meanings("loss", ratios["loss"], sizes)
        if gradient is not None and not wrong_gradient:
            found.insert(0, "The gradients are right: only the loss that is reported is wrong.")
        elif found and common is not None and math.isclose(common, ratios["loss"], rel_tol=1e-4):
            found.insert(
                0, "The gradients have the same factor: it is in the loss, before backward."
            )
        return found or loss_meanings(sizes)
    if wrong_gradient:
        found = ["The loss is right, so the mistake is in the backward pass or after it."]
        found = found if numbers else []
        if common is not None:
            found += factor_meanings("gradient", common, sizes)
        return found + gradient_meanings(gradient.wrong, list(gradient.off), common, sizes, stages)
    if "grad_norm" in ratios and gradient is not None:
        norm = numbers.found["grad_norm"].item()
        return norm_meanings(norm, gradient, sizes, stages)
    if "grad_norm" in ratios:
        return factor_meanings("gradient", ratios["grad_norm"], sizes)
    if "learning_rate" in ratios:
        return ["The learning rate is a function of the step's number and of the flags alone."]
    return []


def explain(comparisons, sizes=None, stages=None):
    """The text for comparisons of one moment, of which at least one is wrong.

    stages: by name of a tensor, the pipeline stages that hold it; None where unknown.
    """
    wrong = [one for one in comparisons if one.wrong]
    largest = max(wrong, key=lambda one: np.nan_to_num(one.off[one.worst()], nan=np.inf))
    name = largest.worst()
    lines = [wrong[0].headline()]
    lines += [f"  wrong: {words}" for one in wrong for words in one.wrong_in_words(stages)]
    if right := [words for one in comparisons for words in one.right_in_words()]:
        lines.append("  right: " + ", ".join(right))
    lines.append(
        f"  largest relative difference: {largest.off[name]:.3g}, of {name} "
        f"(allowed: {largest.tolerance:.3g})"
    )
    found = []
    if sizes is not None:
        lines.append(f"  the run: {sizes}")
        by_kind = {comparison.kind: comparison for comparison in comparisons}
        if "weight" in by_kind:
            weights = by_kind["weight"]
            what = "initial weight" if "initial" in weights.what else "updated weight"
            found = weight_meanings(what, weights, sizes)
        else:
            step = re.search(r"step (\d+)", wrong[0].what)
            first = step is None or step[1] == "1"
            numbers, gradient = by_kind.get("numbers"), by_kind.get("gradient")
            found = step_meanings(numbers, gradient, first, sizes, stages)
    if largest.off[name] < TINY:
        found.insert(
            0,
            "So small a difference is often one of precision: in a float64 run nothing may be "
            "computed in float32, no table, no sum and no buffer.",
        )
    return "\n".join(lines) + listed(found)
