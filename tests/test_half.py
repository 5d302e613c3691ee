"""Float16 with a loss scale, and weights of half precision."""

import json
import math

import pytest
import torch
import workers_loss_scale
import workers_precision
from harness import Run, assemble, assert_close
from launch import on_two, ranks_of
from safetensors.torch import load_file
from test_checkpoint import SHAPE, batch, train
from test_optimizers import slow_unless

# Every engine, schedule and way to split a layer; a small norm, so that all gradients are clipped.
LAYOUTS = [
    "",
    "--tp_size 2 --dp_size 2 --dp_engine zero1",
    "--pp_size 2 --dp_size 2 --dp_engine zero3",
    "--tp_size 2 --sequence_parallel --cp_size 2 --dp_engine zero2",
    "--dp_size 2 --dp_engine bucket --activation_checkpointing",
    "--dp_size 2 --dp_engine naive --tie_word_embeddings yes",
    "--pp_size 2 --tie_word_embeddings yes --pp_engine afab",
    "--pp_size 2 --tp_size 2 --pp_engine interleaved",
]
STEPS = f"--max_tokens {6 * 8 * 32} --max_grad_norm 0.5 "


@pytest.mark.steps(9)
@pytest.mark.parametrize("layout", [slow_unless(x in LAYOUTS[7:], x) for x in LAYOUTS])
def test_a_power_of_two_changes_no_bit(step_dir, worlds, train_on, layout):
    """In float64, where nothing is too small: applied once, and taken out once."""
    argv = SHAPE + STEPS + "--dtype float64 " + batch(layout)
    run = worlds(step_dir, ranks_of(layout)).run
    scaled = Run(run(workers_loss_scale.run_scaled, argv.split(), 3, 2.0**20))
    assert {m["loss_scale"] for m in scaled.metrics} == {2.0**20}
    scaled.assert_same_as(train_on(step_dir, ranks_of(layout), argv, 3), tolerance=0)


@pytest.mark.slow
@pytest.mark.steps(1, 8)
def test_the_scale_of_each_step(step_dir, worlds, train_on):
    argv = "--num_hidden_layers 2 --seq_len 32 --dtype float64 --max_grad_norm 0.5 "
    argv += on_two(step_dir)
    ranks = ranks_of(argv)
    run = worlds(step_dir, ranks).run
    scaled = Run(run(workers_loss_scale.run_scaled, argv.split(), 2, 2.0**20))
    scaled.assert_same_as(train_on(step_dir, ranks, argv, 2), tolerance=0)


def overflow(step_dir, worlds, argv, rank, at, steps, start=None):
    """What `train_with_overflow` returns, the same on all ranks, with whole weights."""
    world = worlds(step_dir, ranks_of(argv))
    ranks = world.run(workers_loss_scale.train_with_overflow, argv, rank, at, steps, start)
    reports = [
        [{key: str(value) for key, value in m.items() if "memory" not in key} for m in result[0]]
        for result in ranks
    ]
    assert all(other == reports[0] for other in reports), "ranks report different numbers"
    assert all(result[1:4] == ranks[0][1:4] for result in ranks), "ranks did different things"
    return *ranks[0][:4], assemble([result[4] for result in ranks])


@pytest.mark.steps(9)
@pytest.mark.parametrize(
    "layout, ranks",
    [(LAYOUTS[3], [3]), *(slow_unless(False, x, range(ranks_of(x))) for x in LAYOUTS)],
)
def test_an_overflow_on_one_rank_skips_the_step_everywhere(
    step_dir, worlds, subtests, layout, ranks
):
    """Weights, moments and count stay bit for bit, and the training goes on as one process does."""
    argv = SHAPE + STEPS + f"--dtype float64 {batch(layout)}"
    alone = SHAPE + STEPS + f"--dtype float64 {batch('')}"
    alone += "--tie_word_embeddings yes " if "--tie" in layout else ""
    one, *_, weights = overflow(step_dir, worlds, alone, 0, [2], 4, 2.0**8)
    for rank in ranks:
        with subtests.test(rank=rank):
            found = overflow(step_dir, worlds, argv, rank, [2], 4, 2.0**8)
            reports, still, scales, counts, final = found
            assert still == [False, True, False, False]
            assert scales == [2.0**8, 2.0**7, 2.0**7, 2.0**7]
            assert counts == {3}
            assert [m["skipped"] for m in reports] == [False, True, False, False]
            assert math.isfinite(reports[1]["loss"]) and not math.isfinite(reports[1]["grad_norm"])
            assert [m["learning_rate"] for m in reports] == [m["learning_rate"] for m in one]
            for mine, its in zip(reports, one, strict=True):
                assert mine["loss"] == pytest.approx(its["loss"], rel=1e-10)
            assert_close(weights, final, "final weight")


ENDLESS = [math.inf] * 17


@pytest.mark.steps(1, 1)
@pytest.mark.parametrize(
    "norms, to_double, after",
    [
        ([1.0] * 5, 2, [2**16, 2**17, 2**17, 2**18, 2**18]),
        ([1.0, math.inf, 1.0, 1.0], 2, [2**16, 2**15, 2**15, 2**16]),
        ([math.nan, math.inf], 2, [2**15, 2**14]),
        (ENDLESS, 2, [2.0**k for k in range(15, -2, -1)]),
    ],
)
def test_the_scale_by_the_norms(step_dir, worlds, norms, to_double, after):
    run = worlds(step_dir, 1).run
    ((found, remedy),) = run(workers_loss_scale.scales, "", norms, to_double)
    assert [scale for _, _, scale in found] == after
    assert [scale for scale, _, _ in found] == [2**16, *after[:-1]]
    assert [skipped for _, skipped, _ in found] == [
        not math.isfinite(norm) and scale >= 1 for norm, scale in zip(norms, after, strict=True)
    ]
    assert bool(remedy) == (norms is ENDLESS)


@pytest.mark.steps(1, 1)
def test_a_first_step_that_is_skipped_leaves_no_state(step_dir, worlds):
    """torch's SGD would take memory that nobody has filled for the momentum of the step before."""
    argv = "--dtype float16 --num_hidden_layers 1 --seq_len 8 --optimizer sgd --weight_decay 0 "
    argv += '--optimizer_args {"momentum":0.9}'
    ((left, same),) = worlds(step_dir, 1).run(workers_loss_scale.first_step_overflows, argv)
    assert not left and same


@pytest.mark.steps(9)
@pytest.mark.parametrize(
    "at, until, layout",
    [
        ([2], 2, "--dp_size 2 --dp_engine zero2 "),
        pytest.param([2], 2, LAYOUTS[3], marks=pytest.mark.slow),
        pytest.param([1, 3], 1, LAYOUTS[1], marks=pytest.mark.slow),
        pytest.param([1, 2], 3, LAYOUTS[2], marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("optimizer", ["adamw", slow_unless(False, "sgd")])
def test_a_run_with_skipped_steps_goes_on_bit_for_bit(
    step_dir, worlds, tmp_path, at, until, layout, optimizer
):
    argv = SHAPE + STEPS + f"--dtype float16 --optimizer {optimizer} {batch(layout, 1)}"
    argv += '--optimizer_args {"momentum":0.9} ' if optimizer == "sgd" else ""
    reports, _, scales, counts, weights = overflow(step_dir, worlds, argv, 1, at, 5)
    argv += f"--checkpoint_dir {tmp_path / 'run'} --save_every 1 "
    first, _, before, _, _ = overflow(step_dir, worlds, argv, 1, at, until)
    saved = json.loads((tmp_path / f"run/step_{until:08d}/checkpoint.json").read_text())["about"]
    assert saved["loss_scale"]["value"] == before[-1]
    rest, _, after, again, final = overflow(step_dir, worlds, argv + "--resume auto", 1, at, 5)
    assert before + after == scales and counts == again
    for one, other in zip(first + rest, reports, strict=True):
        assert {**one, "memory_gb": None} == {**other, "memory_gb": None}
    assert_close(weights, final, "final weight", tolerance=0)


@pytest.mark.slow
@pytest.mark.steps(9)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_float16_trains_like_float32(step_dir, train_on, layout):
    """Within an eighth of the bounds of bfloat16, which has three bits less."""
    argv = SHAPE + STEPS
    argv += "--tie_word_embeddings yes " if "--tie" in layout else ""
    exact = train_on(step_dir, 1, argv + batch(""), 6)
    run = train_on(step_dir, ranks_of(layout), argv + "--dtype float16 " + batch(layout), 6)
    pairs = list(zip(run.metrics, exact.metrics, strict=True))
    loss = max(abs(a["loss"] - b["loss"]) for a, b in pairs)
    norm = max(abs(a["grad_norm"] / b["grad_norm"] - 1) for a, b in pairs)
    assert loss < 6e-4 and norm < 4e-3, f"off: loss {loss}, grad_norm {norm} (share)"


@pytest.mark.steps(9)
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_of_half_precision(step_dir, worlds, tmp_path, layout, dtype):
    """All that a rank keeps is in that dtype, is saved in it, and goes on bit for bit."""
    argv = SHAPE + STEPS + f"--dtype {dtype} --weights_dtype {dtype} {batch(layout)}"
    argv += '--optimizer_args {"eps":1e-4} '  # in float16 squares of gradients are often zero
    world = worlds(step_dir, ranks_of(layout))
    for seen in world.run(workers_precision.reduction_dtypes, argv):
        for kind in ("weights", "gradients", "optimizer"):
            assert seen[kind] == {f"torch.{dtype}"}, seen
        assert seen.get("pp_dp_cp", {"torch.float64"}) == {"torch.float64"}, "the loss"
    numbers, weights = train(worlds, step_dir, argv)
    argv += f"--checkpoint_dir {tmp_path / 'run'} --save_every 1 --save_hf {tmp_path / 'hf'} "
    first, _ = train(worlds, step_dir, argv, until=3)
    (tmp_path / "hf").rename(tmp_path / "three")
    saved = (tmp_path / "run/step_00000003/checkpoint.json").read_text()
    assert json.loads(saved)["about"]["dtype"] == dtype
    rest, final = train(worlds, step_dir, argv + "--resume auto")
    assert first + rest == numbers
    assert_close(weights, final, "final weight", tolerance=0)
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    for name, weight in exported.items():
        assert weight.dtype == getattr(torch, dtype)
        assert (weight.double().numpy() == final[name]).all(), name
