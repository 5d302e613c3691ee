"""What a failed check says: each message on small inputs, some on mistakes planted in a step."""

import re

import numpy as np
import pytest
from conftest import ROOT
from diagnosis import Sizes
from harness import Run, assert_close
from replicas import assemble
from tensor_names import which
from test_layouts import SHAPE, WHOLE

SHAPES = {
    "self_attn.q_proj": (4, 4),
    "self_attn.k_proj": (2, 4),
    "self_attn.v_proj": (2, 4),
    "self_attn.o_proj": (4, 4),
    "mlp.gate_proj": (6, 4),
    "mlp.up_proj": (6, 4),
    "mlp.down_proj": (4, 6),
    "input_layernorm": (4,),
    "post_attention_layernorm": (4,),
}


def tensors(layers=2, seed=0):
    """A tensor for each name of a small Llama."""
    draw = np.random.default_rng(seed).standard_normal
    inside = {
        f"model.layers.{layer}.{name}.weight": draw(shape)
        for layer in range(layers)
        for name, shape in SHAPES.items()
    }
    outside = {"model.norm.weight": draw(4), "lm_head.weight": draw((8, 4))}
    return {"model.embed_tokens.weight": draw((8, 4)), **inside, **outside}


class Small(Run):
    """A Run of one step from numbers and tensors that are given."""

    def __init__(self, loss=2.0, norm=None, gradients=None, sizes=None, before=None, after=None):
        self.gradients = [gradients or tensors()]
        if norm is None:
            norm = np.sqrt(sum((g**2).sum() for g in self.gradients[0].values()))
        self.metrics = [{"loss": loss, "grad_norm": norm, "learning_rate": 1e-3}]
        self.before, self.after = before or tensors(seed=1), after or tensors(seed=2)
        self.sizes = sizes or Sizes()
        layers = len(self.gradients[0]) // len(SHAPES)
        self.stages = {}  # the layers dealt out evenly
        for name in self.gradients[0]:
            found = re.search(r"layers\.(\d+)", name)
            stage = int(found[1]) * self.sizes.pp // layers if found else 0
            self.stages[name] = {self.sizes.pp - 1 if name in LAST else stage}


LAST = ("model.norm.weight", "lm_head.weight")


def said_by(run, reference=None):
    with pytest.raises(AssertionError) as error:
        run.assert_same_as(reference or Small())
    return str(error.value)


def scaled(factor, chosen=lambda name: True, **how):
    return {n: g * factor if chosen(n) else g for n, g in tensors(**how).items()}


def mixed(chosen, **how):
    """Gradients of which some are wrong without a common factor."""
    other = tensors(seed=9, **{k: v for k, v in how.items() if k != "seed"})
    return {n: other[n] if chosen(n) else g for n, g in tensors(**how).items()}


# --- a wrong number -------------------------------------------------------------------------------


def test_a_loss_says_what_was_found_and_expected_and_what_a_factor_means():
    sizes = Sizes(micro_batches=4)
    lines = said_by(Small(loss=8.0, gradients=scaled(4), sizes=sizes)).splitlines()
    assert lines[0] == "loss of step 1: found 8, expected 2 (found / expected = 4)"
    assert "  wrong: loss (4 times the expected)" in lines
    assert "  wrong: gradients of all 21 tensors (4 times the expected)" in lines
    assert "  right: learning_rate" in lines
    assert "  largest relative difference: 3, of " in "\n".join(lines)
    assert "  the run: 1 rank, 4 micro-batches on each" in lines
    assert (
        "- 4 is the number of micro-batches. Each micro-batch's loss was divided by its own "
        in ("\n".join(lines))
    )


@pytest.mark.parametrize(
    "loss, sizes, said",
    [
        (0.5, Sizes(micro_batches=4), "0.25 is 1 / 4, and 4 is the number of micro-batches"),
        (6.0, Sizes(ranks=3, dp=3), "3 is the number of ranks that see different tokens"),
        (0.68, Sizes(ranks=3, dp=3), "0.34 is about 1 / 3, and 3 is .* loss of one rank alone"),
        (4.0, Sizes(ranks=2, tp=2), "2 is the number of tp ranks. The loss was added up over tp"),
        (8.0, Sizes(ranks=4, pp=4), "4 is the number of pipeline stages"),
        (6.0, Sizes(ranks=3), "3 is the number of replicas"),
        (1024.0, Sizes(targets=512), "512 is the number of targets .* is a sum over the targets"),
        (12.0, Sizes(ranks=2, dp=2, micro_batches=3), "6 is micro-batches x dp x cp"),
        (4.0, Sizes(ranks=6, dp=2, cp=3), "2 is the number of dp ranks. Each dp rank divided by"),
        (0.0, Sizes(), "It is zero"),
        (2.1, Sizes(ranks=4, cp=2, tp=2), "none of the run's sizes[^@]*- tp: [^@]*- cp: .*zigzag"),
    ],
)
def test_a_wrong_loss(loss, sizes, said):
    gradients = mixed(lambda name: True)
    text = said_by(Small(loss=loss, gradients=gradients, sizes=sizes))
    assert re.search(said, text), text


def test_a_loss_that_is_only_reported_wrongly():
    text = said_by(Small(loss=1.0, sizes=Sizes(ranks=2, dp=2)))
    assert "only the loss that is reported is wrong" in text


def test_two_sizes_that_are_the_same_number_are_both_named():
    text = said_by(Small(gradients=scaled(0.5), sizes=Sizes(ranks=2, dp=2, micro_batches=2)))
    assert text.count("0.5 is 1 / 2") == 2 and "averaged over dp and cp" in text
    assert "run with sizes that are different numbers" in text
    text = said_by(Small(gradients=scaled(0.5), sizes=Sizes(ranks=2, dp=2, micro_batches=3)))
    assert text.count("0.5 is 1 / 2") == 1 and "different numbers" not in text


def is_norm(name):
    return "norm" in name


def layer_below(layer):
    return lambda name: "embed" in name or any(f"layers.{i}." in name for i in range(layer))


def until_keys_of_the_last_layer(name):
    """What is wrong when the gradients of the last layer's keys and values are."""
    return layer_below(1)(name) or bool(re.search(r"1\..*(k_proj|v_proj|input_layernorm)", name))


TP, SP = Sizes(ranks=2, tp=2), Sizes(ranks=2, tp=2, sequence_parallel=True)
CP, DP = Sizes(ranks=2, cp=2), Sizes(ranks=2, dp=2, micro_batches=3)


@pytest.mark.parametrize(
    "gradients, sizes, which_tensors, said",
    [
        (scaled(0.5, is_norm), SP, "only the norms' weights (0.5 times", "With sequence para"),
        (scaled(2, is_norm), TP, "only the norms' weights (2 times", "not added up over tp"),
        (scaled(2, lambda n: not is_norm(n)), TP, "all tensors but the norms' weights (2", ""),
        (mixed(lambda n: "_proj" in n and "o_" not in n and "mlp" not in n), TP,
         "only q_proj, k_proj and v_proj of all layers (no common", "belong to the same heads"),
        (mixed(lambda n: "k_proj" in n or "v_proj" in n), CP, "only k_proj and v_proj", "send_ho"),
        (mixed(until_keys_of_the_last_layer), CP,
         "only these: all of layer 0; embed_tokens; k_proj, v_proj and input_layernorm of layer 1",
         "send_home"),
        (mixed(layer_below(1)), TP, "only these: all of layer 0; embed_tokens (no common",
         "this way model.layers.0.mlp.down_proj.weight is the first"),
        (mixed(lambda n: "embed" in n), Sizes(tied=True), "only model.embed_tokens", "both uses"),
        (mixed(lambda n: "embed" in n or "head" in n), TP, "embed_tokens and lm_head", "local_sym"),
        (mixed(layer_below(2), layers=4), Sizes(ranks=2, pp=2),
         "only the tensors of pipeline stage 0", "a gradient that stage 1 sends"),
        (mixed(lambda n: True), DP, "all 21 tensors (no common", "Each of the 3 micro-batches"),
        (mixed(lambda n: True), DP, "all 21 tensors (no common", "Each of the 2 ranks along dp"),
        (scaled(0), DP, "all 21 tensors (found is zero)", "a hook that nobody kept"),
        (scaled(1.5), DP, "all 21 tensors (1.5 times", "none of the run's sizes"),
    ],
)  # fmt: skip
def test_wrong_gradients(gradients, sizes, which_tensors, said):
    layers = len(gradients) // len(SHAPES)
    reference = Small(gradients=tensors(layers))
    text = said_by(Small(gradients=gradients, sizes=sizes), reference)
    assert text.startswith("grad_norm of step 1: found")
    assert "The loss is right, so the mistake is in the backward pass or after it." in text
    assert which_tensors in text and said in text, text


def test_different_factors_are_told_apart():
    gradients = scaled(0.5, is_norm)
    gradients["lm_head.weight"] = gradients["lm_head.weight"] * 3
    text = said_by(Small(gradients=gradients, sizes=SP))
    assert "  wrong: gradients of only the norms' weights (0.5 times the expected)" in text
    assert "  wrong: gradient of only lm_head.weight (3 times the expected)" in text
    assert "  right: loss, learning_rate, the other 15 gradients" in text


@pytest.mark.parametrize(
    "counted, sizes, said",
    [
        (lambda n: 1 + is_norm(n), TP, "which the norms' weights are counted 2 times"),
        (lambda n: 3, Sizes(ranks=3, dp=3), "which all tensors are counted 3 times"),
        (lambda n: 1 - (n in LAST or "layers.1" in n), Sizes(ranks=2, pp=2),
         "exactly the norm without the tensors of pipeline stage 1"),
        (lambda n: 1.1, TP, "too large"),
        (lambda n: 0.9, TP, "too small: squares of other ranks"),
    ],
)  # fmt: skip
def test_a_wrong_norm_of_right_gradients(counted, sizes, said):
    norm = np.sqrt(sum(counted(name) * (g**2).sum() for name, g in tensors().items()))
    text = said_by(Small(norm=norm, sizes=sizes))
    assert text.startswith(f"grad_norm of step 1: found {norm:.12g}, expected ")
    assert "right: loss, learning_rate, the 21 gradients" in text
    assert said in text, text


def test_wrong_weights():
    before = tensors(seed=1)
    spoiled = {
        **before,
        "model.layers.1.mlp.up_proj.weight": before["model.layers.0.mlp.up_proj.weight"],
    }
    text = said_by(Small(before=spoiled))
    assert text.startswith("initial weight of model.layers.1.mlp.up_proj.weight: found differs")
    assert "has the initial values of model.layers.0.mlp.up_proj.weight" in text
    name = "model.layers.0.self_attn.q_proj.weight"
    half = before[name][:2]
    text = said_by(Small(before={**before, name: np.concatenate([half, half])}, sizes=TP))
    assert f"All 2 tp ranks have the same part of {name}" in text
    text = said_by(Small(before={**before, name: -before[name]}, sizes=TP))
    assert "depends on the seed and on the tensor's name" in text
    engine = Sizes(ranks=2, dp=2, engine="zero1")
    text = said_by(Small(after=tensors(seed=3), sizes=engine))
    assert "so the update is wrong" in text and "finish_update" in text


def test_what_is_wrong_from_the_second_step_on_is_the_update():
    runs = Small(sizes=Sizes(ranks=2, dp=2, engine="zero3")), Small()
    for run in runs:
        run.metrics, run.gradients = run.metrics * 2, run.gradients * 2
    runs[0].metrics = [runs[0].metrics[0], {**runs[0].metrics[1], "loss": 4.0}]
    text = said_by(*runs)
    assert text.startswith("loss of step 2: found 4, expected 2")
    assert "before the last update are right" in text and "With zero3" in text


def test_the_first_line_names_the_wrong_tensor_that_backward_meets_first():
    wrong = mixed(lambda n: "down_proj" in n or "embed" in n)
    with pytest.raises(AssertionError) as error:
        assert_close(tensors(), wrong, "step 1, gradient")
    assert str(error.value).startswith("step 1, gradient of model.layers.1.mlp.down_proj.weight: ")


def test_small_differences_and_numbers_that_are_none():
    text = said_by(Small(gradients=scaled(1 + 1e-7), sizes=DP))
    assert "nothing may be computed in float32" in text
    name = "model.layers.1.mlp.up_proj.weight"
    text = said_by(Small(norm=1.0, gradients={**tensors(), name: tensors()[name] * np.nan}))
    assert "wrong: gradient of only model.layers.1.mlp.up_proj.weight" in text
    with pytest.raises(AssertionError, match=rf"gradient of {name}: found a number that is not f"):
        assert_close({name: np.ones(2)}, {name: np.array([1, np.nan])}, "step 1, gradient")
    with pytest.raises(AssertionError, match="No rank holds tensors of layers 1 and 2") as error:
        three = tensors(3)
        assert_close(three, tensors(1), "step 1, gradient")
    assert "Nobody expects" not in str(error.value)


def test_sets_of_tensors_in_words():
    names = list(tensors(4))
    assert which([n for n in names if "layers.1." in n or "layers.2." in n], names) == (
        "only all of layers 1 and 2"
    )
    assert which([n for n in names if "q_proj" in n and "layers.0" not in n], names) == (
        "only q_proj of layers 1 to 3"
    )
    assert which(names[3:4], names) == f"only {names[3]}"
    scattered = [names[0], names[1], names[12], names[23], names[34]]
    assert which(scattered, names).startswith("5 of 39 tensors, among them model.embed_tokens")


# --- replicas that differ, and parts that nobody holds --------------------------------------------


def held_by(places, values):
    """Pieces for `assemble`: by rank the slice of dim 0 and what fills it, None for no piece."""
    return [
        [(NAME, (4, 2), (place, slice(0, 2)), slice(None), np.full((len(ROWS[place]), 2), value))]
        if value is not None
        else []
        for place, value in zip(places, values, strict=True)
    ]


ROWS = range(4)
NAME, ALL = "model.layers.0.mlp.up_proj.weight", slice(0, 4)
NORM, TABLE = "model.norm.weight", "model.embed_tokens.weight"


def replicas(values, name=NAME):
    return [[(name, (2,), (slice(0, 2),), slice(None), np.full(2, float(v)))] for v in values]


@pytest.mark.parametrize(
    "ranks, what, sizes, first, said",
    [
        (replicas([1, 1, 2, 2]), "step 1, gradient", Sizes(ranks=4, tp=2, dp=2),
         "rank 2 holds another value than rank 0", "differ along dp.*finish_gradients"),
        (replicas([1, 1, 2, 2]), "step 1, gradient", Sizes(ranks=4, cp=2, dp=2),
         "rank 2 holds another value than rank 0", "Along cp they agree"),
        (replicas([1, 2, 3, 4]), "step 1, gradient", Sizes(ranks=4, cp=2, dp=2),
         "rank 1 holds another value than rank 0", "differ along cp and dp.*finish_gradients"),
        (replicas([1, 2, 1, 2]), "step 1, gradient", Sizes(ranks=4, tp=2, dp=2),
         "rank 1 holds another value than rank 0", "differ along tp.*column-parallel"),
        (replicas([1, 2], NORM), "step 1, gradient", SP, "rank 1 .* rank 0", "SumGradient"),
        (replicas([1, 2], NORM), "step 1, gradient", TP, "rank 1 .* rank 0", "row-parallel"),
        (replicas([1, 2], TABLE), "step 1, gradient", Sizes(ranks=2, pp=2, tied=True),
         "rank 1 .* rank 0", "differ along pp.*sum_shared_gradients"),
        (replicas([1, 2]), "initial weight", DP, "initial weight of .*: rank 1", "never on the ra"),
        (replicas([1, 2]), "final weight", DP, "rank 1", "updates differ.*finish_update"),
        (replicas([1, 2]), "final weight", TP, "rank 1", "updates differ.*gradient_norm"),
        (replicas([1, 2]), "step 1, gradient", Sizes(ranks=2), "rank 1", "same tokens"),
        (replicas([1, 1 + 1e-15]), "step 1, gradient", DP, "rank 1", "order of a sum"),
    ],
)  # fmt: skip
def test_replicas_that_differ(ranks, what, sizes, first, said):
    with pytest.raises(AssertionError) as error:
        assemble(ranks, what, sizes)
    text = str(error.value)
    assert re.search(first, text.splitlines()[0]), text
    assert re.search(said, text, re.DOTALL), text
    with pytest.raises(AssertionError, match="holds another value than rank"):
        assemble(ranks)  # without any words


@pytest.mark.parametrize(
    "ranks, sizes, said",
    [
        (held_by([slice(0, 2), slice(2, 4), slice(0, 2)], [1, None, 1]),
         Sizes(ranks=4, tp=2, dp=2),
         r"\[2:4\] of dim 0 \(size 4\), 4 of 8 numbers.*tp rank 1: global ranks 1 and 3"),
        (held_by([slice(0, 2), slice(0, 2)], [1, 1]), TP, "tp rank 1: global rank 1 should"),
        ([[(NAME, (4, 2), (ALL, slice(0, 2)), slice(0, 6), np.ones(6))], []],
         Sizes(ranks=2, dp=2, engine="zero2"), r"\[3:4\] of dim 0.*With zero2 each of the 2 ranks"),
        (held_by([ALL, ALL], [float("nan")] * 2), TP, "holds a NaN on rank 0 and 1"),
    ],
)  # fmt: skip
def test_parts_that_nobody_holds(ranks, sizes, said):
    ranks = ranks + [[]] * (sizes.ranks - len(ranks))
    ranks = [held or [(NORM, (1,), (slice(0, 1),), slice(None), np.ones(1))] for held in ranks]
    other = "model.layers.0.input_layernorm.weight"  # of the same layer, on all ranks
    ranks = [[*held, (other, (1,), (slice(0, 1),), slice(None), np.ones(1))] for held in ranks]
    with pytest.raises(AssertionError) as error:
        assemble(ranks, "step 1, gradient", sizes)
    assert re.search(said, str(error.value), re.DOTALL), str(error.value)
    assert NAME in str(error.value).splitlines()[0]


def test_the_place_of_a_rank_along_each_axis():
    sizes = Sizes(ranks=24, tp=2, cp=3, dp=2, pp=2)
    assert sizes.place(0) == {"tp": 0, "cp": 0, "dp": 0, "pp": 0}
    assert sizes.place(5) == {"tp": 1, "cp": 2, "dp": 0, "pp": 0}
    assert sizes.place(23) == {"tp": 1, "cp": 2, "dp": 1, "pp": 1}
    assert Sizes(ranks=3).place(2) == {"replicas": 2}


# --- mistakes in a step ---------------------------------------------------------------------------

PLANTED = [
    ("mean_of_micro_batches", "step3_dataloader", "--gradient_accumulation_steps 4",
     "loss of step 1: found 22.*4 is the number of micro-batches. Each micro-batch's loss was div"),
    ("norm_gradients_of_own_tokens", "step4_tensor_parallel", "--tp_size 2 --sequence_parallel",
     "rank 1 holds another value than rank 0.*differ along tp.*`SumGradient`"),
    ("gradients_not_summed", "step6_data_parallel", "--dp_size 2 --dp_engine naive",
     "rank 1 holds another value than rank 0.*all 21 tensors.*along dp.*finish_gradients"),
    ("mean_over_ranks", "step6_data_parallel", "--dp_size 2",
     "gradients of all 21 tensors .0.5 times.*engine bucket.*averaged over dp and cp"),
    ("norm_of_the_own_stage", "step7_pipeline_afab", "--pp_size 2",
     "grad_norm of step 1.*the 21 gradients.*norm without the tensors of pipeline stage 1"),
]  # fmt: skip


@pytest.mark.parametrize("mistake, step, flags, said", PLANTED, ids=[case[0] for case in PLANTED])
def test_a_mistake_in_a_step_is_explained(train_on, mistake, step, flags, said):
    splits = re.search(r"(dp_size|steps) (\d+)", flags)
    argv = f"{SHAPE} {flags} --micro_batch_size {8 // int(splits[2]) if splits else 8}"
    size = 1 if step.startswith("step3") else 2
    with pytest.raises(AssertionError) as error:
        run = train_on(ROOT / step, size, argv, 1, break_it=mistake)
        run.assert_same_as(train_on(ROOT / "step3_dataloader", 1, WHOLE, 1))
    assert re.search(said, str(error.value), re.DOTALL), str(error.value)
