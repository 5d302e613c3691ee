"""N8 of learning rates and optimizers: every layout, and a run that stops and goes on."""

import json

import pytest
from harness import assert_close
from launch import ranks_of
from test_checkpoint import SHAPE, assert_same_curve, batch, train

# Not Rprop: it takes steps by the signs of gradients, and rounding has a sign, too.
OPTIMIZERS = {
    "adadelta": "--learning_rate 1",
    "adagrad": '--optimizer_args {"lr_decay":0.1}',
    "adam": '--optimizer_args {"amsgrad":true}',
    "adamax": "",
    "asgd": '--optimizer_args {"t0":2} --learning_rate 3e-2',
    "nadam": "",
    "radam": '--optimizer_args {"betas":[0.8,0.9]} --learning_rate 3e-2',
    "rmsprop": '--optimizer_args {"momentum":0.5,"centered":true}',
    "sgd": '--optimizer_args {"momentum":0.9,"nesterov":true} --learning_rate 1e-2',
}
LAYOUTS = [
    "--tp_size 2 --dp_size 2 --dp_engine zero1",
    "--pp_size 2 --dp_size 2 --dp_engine zero3",
    "--tp_size 2 --sequence_parallel --cp_size 2 --dp_engine zero2",
    "--dp_size 4 --dp_engine bucket",
    "--pp_size 4",
]
SCHEDULES = [
    "--lr_schedule linear --min_lr_ratio 0",
    "--lr_schedule wsd --decay_steps 2",
    "--lr_schedule constant",
]
STEPS = f"--max_tokens {5 * 8 * 32} "


def optimizer(name):
    return f"--optimizer {name} {OPTIMIZERS[name]} "


def slow_unless(now, *values):
    return pytest.param(*values, marks=() if now else pytest.mark.slow)


# Two optimizers on a layout each by default; all of them on all layouts with `-m slow`.
PAIRS = [
    slow_unless(number == place % len(LAYOUTS) and name in ("adam", "sgd"), name, layout)
    for place, name in enumerate(OPTIMIZERS)
    for number, layout in enumerate(LAYOUTS)
]


@pytest.mark.steps(9)
@pytest.mark.parametrize("name, layout", PAIRS)
def test_each_optimizer_in_each_layout(step_dir, train_on, name, layout):
    argv = SHAPE + STEPS + optimizer(name) + "--dtype float64 "
    one = train_on(step_dir, 1, argv + batch(""), 4)
    run = train_on(step_dir, ranks_of(layout), argv + batch(layout), 4)
    run.assert_same_as(one)
    moved = [abs(one.after[n] - one.before[n]).max() for n in one.after]
    assert min(moved) > 1e-5, "an optimizer that moves nothing shows nothing"


@pytest.mark.steps(9)
@pytest.mark.parametrize(
    "name", [slow_unless(name == "nadam", name) for name in [*OPTIMIZERS, "rprop"]]
)
def test_each_optimizer_goes_on_bit_for_bit(step_dir, worlds, tmp_path, name):
    """Each on a layout of its own, through the files."""
    flags = optimizer(name) if name in OPTIMIZERS else f"--optimizer {name} "
    layout = LAYOUTS[[*OPTIMIZERS, "rprop"].index(name) % 2]
    argv = SHAPE + STEPS + flags + batch(layout)
    numbers, weights = train(worlds, step_dir, argv)
    argv += f"--checkpoint_dir {tmp_path / 'run'} --save_every 1 "
    first, _ = train(worlds, step_dir, argv, until=3)
    rest, final = train(worlds, step_dir, argv + "--resume auto")
    assert first + rest == numbers
    assert_close(weights, final, "final weight", tolerance=0)


@pytest.mark.steps(9)
@pytest.mark.parametrize(
    "name, before, after",
    [
        pytest.param("sgd", LAYOUTS[1], LAYOUTS[2], marks=pytest.mark.slow),
        pytest.param("nadam", LAYOUTS[2], "--pp_size 2", marks=pytest.mark.slow),
        pytest.param("asgd", LAYOUTS[0], LAYOUTS[1], marks=pytest.mark.slow),
        pytest.param("rmsprop", "", LAYOUTS[0], marks=pytest.mark.slow),
        pytest.param("adam", LAYOUTS[4], "--tp_size 4", marks=pytest.mark.slow),
    ],
)
def test_an_optimizer_goes_on_on_another_layout(step_dir, worlds, tmp_path, name, before, after):
    shape = SHAPE + STEPS + optimizer(name) + "--dtype float64 "
    numbers, weights = train(worlds, step_dir, shape + batch(""))
    argv = shape + f"--checkpoint_dir {tmp_path / 'run'} --save_every 1 "
    first, _ = train(worlds, step_dir, argv + batch(before), until=3)
    rest, final = train(worlds, step_dir, argv + batch(after) + "--resume auto")
    assert_same_curve(numbers, first + rest)
    assert_close(weights, final, "final weight")


@pytest.mark.steps(9)
@pytest.mark.parametrize("flags", [slow_unless("wsd" in flags, flags) for flags in SCHEDULES])
def test_a_schedule_goes_on_bit_for_bit(step_dir, worlds, tmp_path, flags):
    argv = SHAPE + STEPS + flags + " " + batch("--tp_size 2")
    numbers, _ = train(worlds, step_dir, argv)
    argv += f"--checkpoint_dir {tmp_path / 'run'} --save_every 1 "
    first, _ = train(worlds, step_dir, argv, until=3)
    rest, _ = train(worlds, step_dir, argv + "--resume auto")
    assert first + rest == numbers


@pytest.mark.steps(9)
def test_a_checkpoint_of_another_optimizer_is_refused(step_dir, worlds, tmp_path):
    argv = SHAPE + STEPS + batch("") + f"--checkpoint_dir {tmp_path / 'run'} --save_every 1 "
    train(worlds, step_dir, argv + optimizer("nadam"), until=1)
    about = json.loads((tmp_path / "run" / "step_00000001" / "checkpoint.json").read_text())
    assert about["about"]["scalars"].keys() == {"step", "mu_product"}
    for flags, words in (
        ("--optimizer sgd", "saved with --optimizer nadam, not sgd"),
        ('--optimizer nadam --optimizer_args {"eps":1e-6}', "saved with --optimizer_args {}, not"),
    ):
        with pytest.raises(Exception, match=words):
            train(worlds, step_dir, argv + flags + " --resume auto")
