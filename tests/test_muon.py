"""N8 of Muon: whole matrices in every layout, each made orthogonal once, and what that sends."""

import json

import pytest
import torch
import workers_messages
import workers_muon
import workers_setup
from conftest import ROOT
from harness import assert_close
from launch import launch, ranks_of
from test_checkpoint import SHAPE, assert_same_curve, batch, train
from test_ledger import SHORT
from test_optimizers import slow_unless

pytestmark = pytest.mark.steps(9)
MUON = SHAPE + "--optimizer muon --dtype float64 "
STEPS = f"--max_tokens {5 * 8 * 32} "
# One of each kind: an engine that deals weights out or not, with and without tp, stages, chunks.
LAYOUTS = [
    "--tp_size 2 --dp_size 2 --dp_engine zero1",
    "--tp_size 2 --dp_size 2 --dp_engine bucket",
    "--pp_size 2 --dp_size 2 --dp_engine zero3",
    "--tp_size 2 --sequence_parallel --cp_size 2 --dp_engine zero2",
    "--tp_size 2 --cp_size 2 --dp_engine zero3",
    "--pp_size 2 --pp_engine interleaved --cp_size 2 --dp_engine zero1",
    "--pp_size 2 --tp_size 2 --tie_word_embeddings yes",
    "--dp_size 4 --dp_engine naive",
    "--tp_size 4",
    "--pp_size 4",
]


@pytest.mark.parametrize("layout", [slow_unless(place == 2, x) for place, x in enumerate(LAYOUTS)])
def test_muon_in_each_layout(step_dir, train_on, layout):
    """By the bound of all optimizers, N5. See MUON.md for why it may be as small as that."""
    tied = "--tie_word_embeddings yes" if "tie" in layout else ""
    one = train_on(step_dir, 1, MUON + batch(tied), 4)
    train_on(step_dir, ranks_of(layout), MUON + batch(layout), 4).assert_same_as(one)
    moved = [abs(one.after[n] - one.before[n]).max() for n in one.after]
    assert min(moved) > 1e-3, "an optimizer that moves nothing shows nothing"


TINY = "--hidden_size 8 --num_attention_heads 2 --num_key_value_heads 1 --num_hidden_layers 1"
THREES = (
    "--hidden_size 48 --num_attention_heads 6 --num_key_value_heads 3 --seq_len 36 "
    "--tie_word_embeddings yes"
)
UNEVEN = "--pp_size 2 --pp_engine interleaved --dp_size 2 --dp_engine zero2"


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape, layout",
    [
        ('--optimizer_args {"nesterov":false,"momentum":0.5}', LAYOUTS[0]),
        ('--optimizer_args {"iterations":3,"betas":[0.8,0.9],"eps":1e-6}', LAYOUTS[2]),
        ("", "--tp_size 2 --dp_size 4 --dp_engine zero3"),
        ("", "--tp_size 2 --cp_size 2 --pp_size 2 --dp_engine zero1"),
        (TINY, "--dp_size 8 --dp_engine bucket"),  # more ranks than matrices
        (TINY, "--dp_size 8 --dp_engine zero1"),
        (THREES, "--tp_size 3 --sequence_parallel"),
        ("--seq_len 36", "--cp_size 3 --dp_engine zero2"),
        ("--num_hidden_layers 5", UNEVEN),
        (
            '--optimizer_args {"momentum":0}',
            "--tp_size 2 --cp_size 2 --dp_engine zero3 --activation_checkpointing",
        ),
    ],
)
def test_more_of_muon(step_dir, train_on, shape, layout):
    micro_batches = 2 if "interleaved" in layout else 1
    one = train_on(step_dir, 1, MUON + batch(shape, micro_batches), 3)
    argv = MUON + batch(f"{layout} {shape}", micro_batches)
    train_on(step_dir, ranks_of(layout), argv, 3).assert_same_as(one)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS[:4])
def test_buckets_of_matrices_change_no_number(step_dir, train_on, layout):
    one = train_on(step_dir, 1, MUON + batch(""), 4)
    argv, small = MUON + batch(layout), "small_buckets_of_matrices"
    train_on(step_dir, ranks_of(layout), argv, 4, break_it=small).assert_same_as(one)


@pytest.mark.parametrize(
    "mistake, layout, seen_in",
    [
        ("parts_orthogonalised", "--tp_size 2", "loss of step 2"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("parts_orthogonalised", "--dp_size 2 --dp_engine zero1", "loss of step 2"),
                ("size_of_the_part", "--tp_size 2", "loss of step 2"),
                ("momentum_of_owners_only", "--tp_size 2", "loss of step 3"),
                ("parts_put_as_rows", "--tp_size 2", "loss of step 2"),
                ("updates_for_the_own_group", "--dp_size 2", "another value"),
            )
        ),
    ],
)
def test_a_mistake_of_muon_is_noticed(step_dir, train_on, mistake, layout, seen_in):
    one = train_on(step_dir, 1, MUON + batch(""), 4)
    with pytest.raises(AssertionError, match=seen_in):
        spoiled = train_on(step_dir, 2, MUON + batch(layout), 4, break_it=mistake)
        spoiled.assert_same_as(one)


@pytest.mark.parametrize("layout", [slow_unless(x == LAYOUTS[0], x) for x in LAYOUTS[:6]])
def test_each_matrix_is_made_orthogonal_once(step_dir, worlds, layout):
    ranks = worlds(step_dir, ranks_of(layout)).run(
        workers_muon.made_orthogonal, SHAPE + "--optimizer muon " + batch(layout)
    )
    names = [name for mine, _ in ranks for name in mine]
    stages = {tuple(names) for _, names in ranks}
    assert sorted(names) == sorted(name for stage in stages for name in stage)
    assert len(names) == len({*names}) == 4 * 7
    work = [sum(min(x) ** 2 * (2 * max(x) + min(x)) for x in mine.values()) for mine, _ in ranks]
    assert max(work) < 1.15 * sum(work) / len(ranks), f"not evenly dealt: {work}"


CASES = [
    "--tp_size 2 --dp_size 2 --dp_engine bucket",
    "--tp_size 2 --dp_size 2 --dp_engine zero3 --dtype float64",
    "--pp_size 2 --pp_engine interleaved --num_hidden_layers 4 --gradient_accumulation_steps 4 "
    "--cp_size 2 --dp_engine zero1",
    '--dp_size 4 --dp_engine naive --optimizer_args {"dtype":"bfloat16"}',
    "--tp_size 2 --cp_size 2 --dp_engine zero2 --dtype bfloat16",
]


@pytest.mark.parametrize("flags", [slow_unless(x == CASES[1], x) for x in CASES])
def test_traffic_of_muon(step_dir, worlds, flags):
    argv = SHORT + "--optimizer muon " + flags
    for counted, predicted in worlds(step_dir, ranks_of(flags)).run(
        workers_messages.ledger_of, argv
    ):
        assert counted == predicted


WEIGHTS = 3 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 384 * 128)  # of the matrices of three layers


SENT = [
    # An owner has one half, gets the other one, and gives that back.
    ("--tp_size 2", 1, 1),
    # Every rank has all gradients, and gets the updates of the other ranks.
    ("--dp_size 4 --dp_engine bucket", 3, 3),
    ("--tp_size 2 --dp_size 2 --dp_engine bucket", 2, 2),
    # Most owners have all of their matrices already.
    ("--dp_size 4 --dp_engine zero1", 0.02, 0.2),
]


@pytest.mark.parametrize(
    "flags, least, most", [slow_unless("zero1" in case[0], *case) for case in SENT]
)
def test_what_muon_sends(step_dir, worlds, flags, least, most):
    """All ranks together, in units of the matrices' bytes."""
    argv = SHORT + "--optimizer muon " + flags
    sent = worlds(step_dir, ranks_of(flags)).run(workers_muon.traffic_of_muon, argv)
    assert least <= sum(sent) / (4 * WEIGHTS) <= most


@pytest.mark.parametrize("layout", [slow_unless(x == LAYOUTS[2], x) for x in LAYOUTS[:4]])
def test_muon_goes_on_bit_for_bit(step_dir, worlds, tmp_path, layout):
    argv = SHAPE + STEPS + "--optimizer muon " + batch(layout)
    numbers, weights = train(worlds, step_dir, argv)
    argv += f"--checkpoint_dir {tmp_path / 'run'} --save_every 1 "
    first, _ = train(worlds, step_dir, argv, until=3)
    rest, final = train(worlds, step_dir, argv + "--resume auto")
    assert first + rest == numbers
    assert_close(weights, final, "final weight", tolerance=0)


ROUTES = [
    (LAYOUTS[0], "--pp_size 2"),
    ("", LAYOUTS[3]),
    (LAYOUTS[2], LAYOUTS[1]),
    (LAYOUTS[5], "--tp_size 4"),
]


@pytest.mark.slow
@pytest.mark.parametrize("before, after", ROUTES)
def test_muon_goes_on_on_another_layout(step_dir, worlds, tmp_path, before, after):
    shape = MUON + STEPS
    numbers, weights = train(worlds, step_dir, shape + batch(""))
    argv = shape + f"--checkpoint_dir {tmp_path / 'run'} --save_every 1 "
    first, _ = train(worlds, step_dir, argv + batch(before), until=3)
    rest, final = train(worlds, step_dir, argv + batch(after) + "--resume auto")
    assert_same_curve(numbers, first + rest)
    assert_close(weights, final, "final weight")


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (32, 32)])
def test_singular_values_go_towards_one(step_dir, worlds, shape):
    ((low, high, rest),) = worlds(step_dir, 1).run(workers_muon.singular_values, *shape, 0.05)
    assert 0.68 < low < 0.8 < 1 < high < 1.14, (low, high)
    assert rest < 1e-12, "the singular vectors should stay"


@pytest.mark.parametrize("shape", [(48, 32), (32, 48)])
def test_an_update_is_that_of_pytorch(step_dir, worlds, shape):
    ((ours, theirs),) = worlds(step_dir, 1).run(workers_muon.beside_torch, *shape)
    assert (ours - theirs).abs().max() == 0


STEEPEST = 3.4445**5  # the slope of five iterations at 0


def test_how_much_five_iterations_enlarge_a_change(step_dir, worlds):
    """The bound of MUON.md, 485, is nearly reached where most singular values are 0."""
    world = worlds(step_dir, 1)
    full, low = (world.run(workers_muon.slope, 64, 96, rank, 1e-13)[0] for rank in (64, 8))
    assert full < 100 < 300 < low < STEEPEST * 1.01, (full, low)


@pytest.mark.parametrize("size", [1e-18, 1e-12])
def test_a_gradient_that_is_only_rounding_stays_small(step_dir, worlds, size):
    """As that of q_proj where a sequence has one token. A norm counts as 1e-7 at least."""
    (found,) = worlds(step_dir, 1).run(workers_muon.made_of_rounding, 64, 96, size)
    assert 0 < found <= STEEPEST * size / 1e-7


WRONG = {
    '{"momentum":1}': ("--optimizer muon --optimizer_args", "momentum 1", "less than 1"),
    '{"iterations":2.5}': ("--optimizer muon --optimizer_args", "iterations 2.5", "1 or more"),
    '{"dtype":"int8"}': ("--optimizer muon --optimizer_args", "dtype int8", "bfloat16"),
    '{"ns_steps":5}': (
        "--optimizer muon --optimizer_args",
        "ns_steps",
        "documentation of muon.Muon",
    ),
    '{"betas":[0.9,2]}': ("--optimizer muon --optimizer_args", "beta", "muon.Muon"),
    '{"lr":1}': ("--optimizer_args", "--learning_rate"),
}


def test_what_muon_does_not_take(step_dir, worlds, subtests):
    argvs = [f"--optimizer muon --optimizer_args {given}" for given in WRONG] + ["--optimizer muno"]
    (answers,) = worlds(step_dir, 1).run(workers_setup.refusals_of_setup, argvs)
    for said, words in zip(answers, [*WRONG.values(), ("adamw", "muon")], strict=True):
        with subtests.test(said):
            assert "\n" not in said and all(word in said for word in words), said


def test_a_checkpoint_of_adamw_is_refused(step_dir, worlds, tmp_path):
    argv = SHAPE + STEPS + batch("") + f"--checkpoint_dir {tmp_path / 'run'} --save_every 1 "
    train(worlds, step_dir, argv, until=1)
    with pytest.raises(Exception, match="saved with --optimizer adamw, not muon"):
        train(worlds, step_dir, argv + "--optimizer muon --resume auto")


def test_the_curves_that_the_page_shows():
    """Of three seeds each, Muon's worst is better than AdamW's best; no best rate is at an end."""
    runs = json.loads((ROOT / "assets" / "muon.json").read_text())["runs"]
    found = {}  # by optimizer and rate, the held-out losses
    for flags, run in runs.items():
        optimizer, rate = flags.split()[1:4:2]
        found.setdefault(optimizer, {}).setdefault(float(rate), []).append(run["held_out"])
    at_best = {}
    for optimizer, rates in found.items():
        best = min(rates, key=lambda rate: rates[rate][0])
        assert min(rates) < best < max(rates) and len(rates[best]) == 3
        at_best[optimizer] = rates[best]
    assert max(at_best["muon"]) < min(at_best["adamw"])


@pytest.mark.slow
def test_muon_learns_more_from_the_same_tokens(step_dir):
    """The first 100 steps of the default run, at the best rates of the curves."""
    ends = {}
    for flags in (
        "--optimizer adamw --learning_rate 1e-3",
        "--optimizer muon --learning_rate 1e-2",
    ):
        result = launch(step_dir, flags + " --max_tokens 51200 --decay_steps 1")
        assert result.code == 0, result.errors
        ends[flags.split()[1]] = sum(step["loss"] for step in result.metrics[-20:]) / 20
    assert ends["muon"] < ends["adamw"] - 0.1, ends


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS[:4])
def test_muon_on_gpus(step_dir, train_on, layout):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    argv = MUON + "--device cuda "
    one = train_on(step_dir, 1, argv + batch(""), 4)
    train_on(step_dir, ranks_of(layout), argv + batch(layout), 4).assert_same_as(one)
