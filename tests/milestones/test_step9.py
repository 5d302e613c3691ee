"""The milestones of step 9: a run's directory, checkpoints, models, chunks, the run, restarts."""

import pytest
import step9_checkpoints as checkpoints
import step9_chunks as chunks
import step9_models as models
import step9_muon as muon
import step9_restarts as restarts
import step9_runs as runs
import workers_setup
import workers_trainer
from harness import assemble, assert_close
from same import SMALL, in_one_line, same_training

pytestmark = pytest.mark.usefixtures("worlds")
SOON = {"timeout": 30}  # seconds after which ranks that wait for each other are ended


@pytest.mark.milestone(9, 1)
@pytest.mark.parametrize("size", [2, 3])
def test_all_ranks_learn_of_results_and_errors(step_dir, worlds, size):
    worlds(step_dir, size).run(runs.all_ranks_learn, **SOON)


@pytest.mark.milestone(9, 2)
@pytest.mark.parametrize("check", [runs.config_files, runs.metrics_up_to])
def test_what_a_run_leaves(step_dir, worlds, tmp_path, check):
    worlds(step_dir, 1).run(check, tmp_path)


@pytest.mark.milestone(9, 3)
def test_layers_by_cost_in_chunks(step_dir, worlds):
    worlds(step_dir, 1).run(chunks.dealt)
    worlds(step_dir, 2).run(chunks.chunked)
    worlds(step_dir, 3).run(chunks.chunked)


@pytest.mark.milestone(9, 4)
def test_the_plan(step_dir, worlds):
    worlds(step_dir, 1).run(chunks.plans)


@pytest.mark.milestone(9, 5)
@pytest.mark.parametrize("size, rounds", [(2, 2), (3, 1)])
def test_chunks_that_follow_the_plan(step_dir, worlds, size, rounds):
    worlds(step_dir, size).run(chunks.interleaved, rounds, **SOON)


@pytest.mark.milestone(9, 6)
@pytest.mark.parametrize("size, check", [(1, models.shared), (2, models.rows), (1, models.switch)])
def test_one_cast_for_all_micro_batches(step_dir, worlds, size, check):
    worlds(step_dir, size).run(check, **SOON)


@pytest.mark.milestone(9, 7)
def test_a_checkpoint_is_complete_or_absent(step_dir, worlds, tmp_path):
    worlds(step_dir, 1).run(runs.complete_or_absent, tmp_path)


@pytest.mark.milestone(9, 8)
def test_only_what_is_our_own_is_deleted(step_dir, worlds, tmp_path):
    worlds(step_dir, 1).run(runs.whose, tmp_path)


@pytest.mark.milestone(9, 9)
def test_one_run_writes_into_one_directory(step_dir, worlds, tmp_path):
    worlds(step_dir, 1).run(runs.locks, tmp_path)


@pytest.mark.milestone(9, 10)
def test_rectangles_are_what_a_rank_holds(step_dir, worlds):
    world = worlds(step_dir, 1)
    world.run(checkpoints.views)
    for shape in ((7,), (3, 4)):
        ((_, wrong),) = world.run(workers_trainer.wrong_rectangles, shape)
        assert not wrong, (
            f"of a tensor {shape} the rectangles of (held, piece) {wrong[0]} are wrong"
        )


@pytest.mark.milestone(9, 11)
def test_what_two_ranks_write_three_read(step_dir, worlds, tmp_path):
    worlds(step_dir, 1).run(checkpoints.overlaps)
    first, second = worlds(step_dir, 2).run(checkpoints.write_rows, tmp_path, **SOON)
    assert first == second, "write_tensors should return the files of all ranks, on every rank"
    worlds(step_dir, 3).run(checkpoints.read_rows, tmp_path, first, **SOON)
    worlds(step_dir, 1).run(checkpoints.damaged, tmp_path, first)


def run_of(worlds, step_dir, size, *args):
    """(numbers of the steps, full weights) of a run on so many ranks."""
    ranks = worlds(step_dir, size).run(checkpoints.trained, *args, **SOON)
    return ranks[0][0], assemble([held for _, held in ranks])


ROUTE = (
    ("--tp_size 2", "--dp_size 2 --dp_engine zero1 --micro_batch_size 1"),
    ("--dp_size 2 --dp_engine zero3 --micro_batch_size 1", "--pp_size 2"),
)


@pytest.mark.milestone(9, 12)
def test_a_run_goes_on_on_another_layout(step_dir, worlds, tmp_path):
    numbers, weights = run_of(worlds, step_dir, 1, "", 3)
    for place, (before, after) in enumerate(ROUTE):
        folder = tmp_path / str(place)
        folder.mkdir()
        first, _ = run_of(worlds, step_dir, 2, before, 2, folder)
        resume = folder / "step_00000002"
        rest, final = run_of(worlds, step_dir, 2, after, 3, None, resume)
        found = first + rest
        assert found == [pytest.approx(step, rel=1e-10) for step in numbers], (
            f"load: {before}, then {after}: step, loss and gradient norm are {found}; without a "
            f"stop {numbers}. If only step 3 is wrong: does load call finish_update?"
        )
        what = f"load: {before}, then {after}: are AdamW's averages read, and does each entry of "
        assert_close(weights, final, what + "the optimizer have the step's number? The weight")


@pytest.mark.milestone(9, 12)
def test_what_makes_a_run_the_same(step_dir, worlds, tmp_path):
    worlds(step_dir, 1).run(checkpoints.what_is_the_same, tmp_path)


@pytest.mark.milestone(9, 12)
def test_where_a_stream_goes_on(step_dir, worlds):
    worlds(step_dir, 1).run(checkpoints.places)


@pytest.mark.milestone(9, 13)
def test_models_that_others_open(step_dir, worlds, tmp_path):
    worlds(step_dir, 2).run(models.exported, tmp_path / "hf", timeout=60)
    worlds(step_dir, 1).run(models.failing_export, tmp_path / "other")


@pytest.mark.milestone(9, 14)
def test_text(step_dir, worlds):
    (alone,) = worlds(step_dir, 1).run(models.text)
    found = worlds(step_dir, 2).run(models.text, **SOON)
    assert found == [alone] * 2, f"two tp ranks draw {found}; one process draws {alone}"
    worlds(step_dir, 1).run(models.draws)


@pytest.mark.milestone(9, 15)
@pytest.mark.parametrize(
    "flags",
    [
        "--pp_size 2 --pp_engine interleaved --pp_chunks 2 --gradient_accumulation_steps 2",
        "--tp_size 2 --gradient_accumulation_steps 2",
    ],
)
def test_a_step_is_that_of_one_process(step_dir, train_on, flags):
    shape = "--num_hidden_layers 4 --gradient_accumulation_steps 2"
    hint = {
        "the loss of step": "Does mean_loss sum over all groups of ranks, pp among them?",
        "grad_norm of step": "Does train_step give gradient_norm a group that contains pp and tp?",
        "": "Look at setup and train_step in train.py.",
    }
    same_training(hint, step_dir, train_on, 2, f"--num_hidden_layers 4 {flags}", one=shape)


@pytest.mark.milestone(9, 15)
def test_chunks_are_dealt_out(step_dir, worlds):
    flags = (
        "--num_hidden_layers 4 --pp_size 2 --pp_engine interleaved --gradient_accumulation_steps 2"
    )
    for rank, shapes in enumerate(worlds(step_dir, 2).run(workers_setup.shapes_of, SMALL + flags)):
        layers = {int(name.split(".")[2]) for name in shapes if ".layers." in name}
        due = {rank, rank + 2}
        assert layers == due, (
            f"setup: of two chunks each rank {rank} has the layers {layers}, not {due}; does it "
            "give --pp_chunks to apply_pipeline_parallel?"
        )


def on_two(hint, step_dir, worlds, *call):
    """What a call returns on two ranks; where it fails, with a sentence of what that means."""
    try:
        return worlds(step_dir, 2).run(*call, **SOON)
    except AssertionError as error:
        raise AssertionError(in_one_line(error, hint)) from None


@pytest.mark.milestone(9, 15)
def test_a_run_that_is_stopped_goes_on(step_dir, worlds, tmp_path):
    argv = SMALL + "--max_tokens 128 "  # four steps
    reference, _ = worlds(step_dir, 1).run(workers_trainer.train_and_save, argv)[0]
    argv += f"--checkpoint_dir {tmp_path / 'run'} "
    hint = "Rank 1 got a signal in step 2: do all stop after it, by state.stop of train_step?"
    asked = workers_trainer.asked_to_stop, argv + "--tp_size 2", 1, 2
    found = on_two(hint, step_dir, worlds, *asked)
    due = [(2, False, True), (2, True, True)]
    assert found == due, (
        "train_step: after a signal to rank 1 in step 2 the ranks have (step, asked, stop) "
        f"{found}, not {due}"
    )
    said = (tmp_path / "run" / "RESUME").read_text()
    assert said == "step_00000002\n", f"complete (checkpoint.py) writes {said!r} into RESUME"
    argv += "--resume auto --pp_size 2"
    due = [n[:3] for n in reference[2:]]
    hint = "A run with --resume auto: does setup call load?"
    for numbers, _ in on_two(hint, step_dir, worlds, workers_trainer.train_and_save, argv):
        found = [n[:3] for n in numbers]
        assert found == [pytest.approx(n, rel=1e-10) for n in due], (
            f"--resume auto after step 2: (step, loss, gradient norm) are {found}; without a stop "
            f"{due}. Does setup call load?"
        )


@pytest.mark.milestone(9, 16)
@pytest.mark.parametrize("check", [muon.orthogonal, muon.whose])
def test_a_matrix_is_made_orthogonal(step_dir, worlds, check):
    worlds(step_dir, 1).run(check)


@pytest.mark.milestone(9, 17)
@pytest.mark.parametrize(
    "size, layout",
    [(1, "all"), (2, "rows"), (2, "all"), (2, "stretches"), (3, "stretches")],
)
def test_whole_matrices_have_owners(step_dir, worlds, size, layout):
    worlds(step_dir, size).run(muon.owned, layout, **SOON)


@pytest.mark.milestone(9, 18)
def test_an_update_of_muon(step_dir, worlds):
    worlds(step_dir, 1).run(muon.updated)


@pytest.mark.milestone(9, 18)
@pytest.mark.parametrize(
    "flags", ["--tp_size 2", "--dp_size 2 --dp_engine zero1 --micro_batch_size 1"]
)
def test_muon_of_parts_is_muon_of_the_whole(step_dir, train_on, flags):
    hint = {
        "of step 2": "Does build_optimizer give the mesh to Muon, and does update take the size "
        "from full_shape?",
        "": "Look at Muon.step, and at build_optimizer.",
    }
    same_training(hint, step_dir, train_on, 2, f"{flags} --optimizer muon", one="--optimizer muon")


@pytest.mark.milestone(9, 19)
@pytest.mark.parametrize("check", [restarts.takes, restarts.chooses, restarts.tells])
def test_what_a_restart_takes(step_dir, worlds, tmp_path, check):
    worlds(step_dir, 1).run(check, tmp_path)


@pytest.mark.milestone(9, 20)
def test_a_cooldown(step_dir, worlds, tmp_path):
    worlds(step_dir, 1).run(restarts.cools_down, tmp_path)
