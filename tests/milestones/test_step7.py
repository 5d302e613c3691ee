"""The milestones of step 7: stages of a pipeline, in one process and on ranks, beside the whole."""

import itertools
import json

import pytest
import step7_stages
from stages import answered, same_layout
from step7_stages import APPLY

pytestmark = pytest.mark.usefixtures("worlds")

# --- 1. a part of the layers ----------------------------------------------------------------------


@pytest.mark.milestone(7, 1)
def test_layers_are_dealt_out(step_dir, worlds):
    (found,) = worlds(step_dir, 1).run(step7_stages.dealt_layers)
    for (layers, count), parts in found.items():
        what = f"deal_layers gives {count} stages of {layers} layers {parts}"
        assert sum(parts, []) == list(range(layers)), f"{what}; each layer goes to one, in order"
        sizes = [len(part) for part in parts]
        assert len(parts) == count and max(sizes) - min(sizes) <= 1, f"{what}; deal more evenly"


@pytest.mark.milestone(7, 1)
@pytest.mark.parametrize("count", [2, 3])
def test_stages_in_a_row_are_the_model(step_dir, worlds, count):
    worlds(step_dir, 1).run(step7_stages.parts_in_a_row, count)


@pytest.mark.milestone(7, 1)
def test_the_ends_share_a_tied_weight(step_dir, worlds):
    found = answered(worlds(step_dir, 3), step7_stages.tied_ends)
    made = [count for _, count in found]
    assert len(set(made)) == 1, (
        f"{APPLY}, tied embeddings: the stages make {made} groups. All should make equally many: "
        "torch puts that number into the name of the next one"
    )
    for rank, (shared, _) in enumerate(found):
        counted = rank == 0
        due = {} if rank == 1 else {"model.embed_tokens.weight": ((0, 2), [0, 2], counted)}
        assert shared == due, (
            f"{APPLY}, tied embeddings: stage {rank} of 3 shares {shared}, not {due}: name, ranks, "
            "ranks in torch, and whether the gradient norm counts it, on one of the two"
        )


# --- 2. one stage ---------------------------------------------------------------------------------


@pytest.mark.milestone(7, 2)
def test_a_timeline_notes_spans(step_dir, worlds):
    worlds(step_dir, 1).run(step7_stages.noted_spans)


@pytest.mark.milestone(7, 2)
def test_what_a_stage_knows(step_dir, worlds):
    ((shapes, neighbours),) = worlds(step_dir, 1).run(step7_stages.what_stages_know)
    for (flags, found), tokens in zip(shapes.items(), (32, 16, 32, 16, 8), strict=True):
        assert found == (3, tokens, 32), (
            f"message_shape with {flags} of 3 sequences of 32 tokens is {found}, not "
            f"{(3, tokens, 32)}: cp deals out the tokens, and tp only with sequence parallelism"
        )
    due = [(None, 1), (0, 2), (1, None)]
    assert neighbours == due, (
        f"Stage.__init__ gives three stages the neighbours (before, after) {neighbours}, not "
        f"{due}: a pipeline is no ring"
    )


@pytest.mark.milestone(7, 2)
@pytest.mark.parametrize("count", [2, 3])
def test_micro_batches_pass_through_stages(step_dir, worlds, count):
    worlds(step_dir, 1).run(step7_stages.stages_by_hand, count)


# --- 3. neighbours talk ---------------------------------------------------------------------------


@pytest.mark.milestone(7, 3)
@pytest.mark.parametrize("count", [2, 3])
def test_neighbours_talk(step_dir, worlds, count):
    answered(worlds(step_dir, count), step7_stages.messages, timeout=12)


# --- 4. all forward, all backward -----------------------------------------------------------------


@pytest.mark.milestone(7, 4)
def test_the_order_of_the_passes(step_dir, worlds):
    for schedule in ("all_forward", "all_forward_all_backward"):
        for rank in range(3):
            (found,) = worlds(step_dir, 1).run(step7_stages.deeds, schedule, 3, rank)
            due = list(step7_stages.deeds_due(schedule, 3, rank))
            for one, other in itertools.zip_longest(found, due, fillvalue="nothing"):
                assert one == other, (
                    f"{schedule} on stage {rank} of 3, two micro-batches: {one}, where {other} is "
                    f"due: {', '.join(due)}"
                )


@pytest.mark.milestone(7, 4)
@pytest.mark.parametrize("count, due", [(1, "fbfbfbfb"), (2, "ffffbbbb"), (3, "ffffbbbb")])
def test_a_step_of_stages(step_dir, worlds, count, due):
    for order in answered(worlds(step_dir, count), step7_stages.a_step):
        how = "one_by_one" if count == 1 else "all_forward_all_backward"
        assert order == due, (
            f"Stage.run with {count} stages: passes {order}, not {due} (f forward, b backward): "
            f"call {how}"
        )


# --- 5. the whole program -------------------------------------------------------------------------

FOUR = "--num_hidden_layers 4 --micro_batch_size 1 --gradient_accumulation_steps 4 "
ONE = "--num_hidden_layers 4 --micro_batch_size 4 "


@pytest.mark.milestone(7, 5)
def test_only_the_own_weights_are_made(step_dir, worlds):
    argv = "--pp_size 2 --dataset_name random --hidden_size 32 --num_hidden_layers 2"
    for made, kept in answered(worlds(step_dir, 2), step7_stages.weights_made, argv):
        assert made == kept, (
            f"a stage makes {len(made)} weights and keeps {len(kept)}; setup should call "
            "apply_pipeline_parallel before materialize"
        )


@pytest.mark.milestone(7, 5)
def test_two_stages_train_as_one_process(step_dir, worlds, train_on):
    hints = {
        "loss of step": "Only the last stage has a loss, and the others zero: does mean_loss in "
        "train.py sum over pp as well?",
        "grad_norm of step": "Each stage has other weights: does train_step in train.py give "
        "gradient_norm a group that contains pp?",
    }
    same_layout(step_dir, worlds, train_on, 2, FOUR + "--pp_size 2", ONE, hints)


@pytest.mark.milestone(7, 5)
def test_tied_embeddings_on_three_stages(step_dir, worlds, train_on):
    hint = (
        "Untied it is right. Does sum_shared_gradients add up the gradients of the two ends, and "
        "does forward_backward in train.py call it?"
    )
    tied = "--tie_word_embeddings yes "
    same_layout(step_dir, worlds, train_on, 3, FOUR + tied + "--pp_size 3", ONE + tied, hint)


@pytest.mark.milestone(7, 5)
def test_tied_embeddings_with_zero1(step_dir, worlds, train_on):
    hint = (
        "Without dp it is right. Does forward_backward in train.py call sum_shared_gradients when "
        "the sums of the engine have come, after finish_gradients?"
    )
    tied = "--tie_word_embeddings yes "
    flags = f"{FOUR}{tied}--pp_size 2 --dp_size 2 --dp_engine zero1 --gradient_accumulation_steps 2"
    same_layout(step_dir, worlds, train_on, 4, flags, ONE + tied, hint)


@pytest.mark.milestone(7, 5)
def test_zero3_in_a_pipeline(step_dir, worlds, train_on):
    hints = {
        "grad_norm of step": "With zero3 a rank has shards of the gradients: does the group in "
        "train_step contain engine.axes?",
        "": "Without zero3 it is right: look at Zero3.after_model, which fetches weights again.",
    }
    flags = FOUR + "--pp_size 2 --dp_size 2 --dp_engine zero3 --gradient_accumulation_steps 2"
    same_layout(step_dir, worlds, train_on, 4, flags, ONE, hints)


@pytest.mark.milestone(7, 5)
def test_spans_are_events_of_a_trace(step_dir, worlds, tmp_path):
    path = tmp_path / "timeline.json"
    spans = [[("forward", 7.5, 8.0)], [("wait", 7.0, 7.75), ("forward", 8.0, 8.5)]]
    worlds(step_dir, 1).run(step7_stages.write_spans, path, spans)
    found = [
        {key: event.get(key) for key in ("name", "ph", "tid", "ts", "dur")}
        for event in json.loads(path.read_text())["traceEvents"]
    ]
    due = [
        {"name": name, "ph": "X", "tid": rank, "ts": (start - 7) * 1e6, "dur": (end - start) * 1e6}
        for rank, of_rank in enumerate(spans) for name, start, end in of_rank
    ]  # fmt: skip
    for one, other in itertools.zip_longest(found, due):
        assert one == other, (
            f"Timeline.write_spans writes the event {one}, not {other}: microseconds since the "
            "first start, a row (tid) for each rank"
        )


@pytest.mark.milestone(7, 5)
def test_the_program_writes_a_timeline(step_dir, worlds, tmp_path):
    path = tmp_path / "timeline.json"
    argv = "--pp_size 2 --gradient_accumulation_steps 2 --dataset_name random --seq_len 16 "
    argv += f"--hidden_size 32 --num_hidden_layers 2 --max_tokens 128 --timeline {path}"
    answered(worlds(step_dir, 2), step7_stages.program, argv)
    assert path.exists(), "--timeline wrote no file: main calls state.stage.timeline.write(world)"
    events = json.loads(path.read_text())["traceEvents"]
    for rank in (0, 1):
        names = [event["name"] for event in events if event["tid"] == rank]
        assert names.count("backward") == 2, (
            f"the timeline has {names.count('backward')} backward passes of rank {rank}, not 2: "
            "Timeline.write gathers the spans of all ranks"
        )
        assert "wait" in names, f"rank {rank} should have a span for waiting"
    assert min(event["ts"] for event in events) == 0, "the trace should begin at 0 microseconds"
