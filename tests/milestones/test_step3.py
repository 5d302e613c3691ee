"""The milestones of step 3: windows, batches, texts, tokens, and the loss of a step."""

import re

import pytest
import workers_step3 as workers
import workers_step3_mixes as mixes
import workers_step3_streaming as streaming
import workers_step3_texts as texts
import workers_step3_tokens as tokens
from harness import World
from launch import launch
from same import SMALL, same_step

pytestmark = pytest.mark.usefixtures("worlds")


def each(*functions):
    return pytest.mark.parametrize("function", functions, ids=lambda f: f.__name__)


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """cached(step_dir, size): a World whose caches are new and its own."""
    folder, made = tmp_path_factory.mktemp("cache"), {}

    def get(step_dir, size):
        if (step_dir, size) not in made:
            caches = {"XDG_CACHE_HOME": str(folder), "HF_HOME": str(folder / "hf")}
            made[step_dir, size] = World(step_dir, size, **caches)
        return made[step_dir, size]

    yield get
    for world in made.values():
        world.close()


@pytest.mark.milestone(3, 1)
@each(workers.windows, workers.order, workers.cut, workers.one_line)
def test_windows_and_their_order(step_dir, worlds, function):
    worlds(step_dir, 1).run(function)


@pytest.mark.milestone(3, 2)
@each(workers.held_out, workers.splits, workers.ahead)
def test_the_sequences_of_a_step(step_dir, worlds, function):
    worlds(step_dir, 1).run(function)


@pytest.mark.milestone(3, 3)
@each(texts.names, texts.below, texts.chosen_files)
def test_which_files(step_dir, worlds, function, tmp_path):
    worlds(step_dir, 1).run(texts.within, tmp_path, function)


@pytest.mark.milestone(3, 4)
@each(texts.readers, texts.sliced, texts.of_datasets)
def test_texts_a_piece_at_a_time(step_dir, worlds, function, tmp_path):
    worlds(step_dir, 1).run(texts.within, tmp_path, function)


@pytest.mark.milestone(3, 5)
@each(tokens.kept, tokens.stopped)
def test_complete_or_absent(step_dir, worlds, function, tmp_path):
    worlds(step_dir, 1).run(texts.within, tmp_path, function)


@pytest.mark.milestone(3, 6)
@each(tokens.in_batches, tokens.large_ids, tokens.tokens_of_texts, tokens.many_processes)
def test_from_a_name_to_tokens(step_dir, cached, function, tmp_path):
    cached(step_dir, 1).run(texts.within, tmp_path, function)


@pytest.mark.milestone(3, 6)
def test_one_rank_tokenises(step_dir, cached, tmp_path):
    (tmp_path / "a.txt").write_text("only once")
    found = cached(step_dir, 3).run(tokens.on_several_ranks, str(tmp_path))
    what = "load_tokens on three ranks:"
    assert {own for own, _ in found} == {b"only once\0"}, f"{what} they have different tokens"
    made = [count for _, count in found]
    assert made == [1, 0, 0], (
        f"{what} they made {made} tokenizers; the first one should tokenise for all"
    )


@pytest.mark.milestone(3, 7)
@pytest.mark.parametrize("sizes", [(2, 2), (1, 3, 2)], ids=["equal", "unequal"])
def test_the_mean_over_micro_batches(step_dir, worlds, sizes):
    worlds(step_dir, 1).run(workers.mean, sizes)


@pytest.mark.milestone(3, 7)
@each(workers.graphs, workers.of_a_step)
def test_the_loss_of_a_step(step_dir, worlds, function):
    worlds(step_dir, 1).run(function)


@pytest.mark.milestone(3, 8)
def test_one_update(step_dir, worlds):
    worlds(step_dir, 1).run(tokens.update)


@pytest.mark.milestone(3, 8)
def test_a_text_for_validation(step_dir, cached, tmp_path):
    cached(step_dir, 1).run(texts.within, tmp_path, tokens.apart)


@pytest.mark.milestone(3, 8)
@pytest.mark.parametrize("split", [(4, 2), (1, 8)], ids=lambda split: "{} x {}".format(*split))
def test_any_split_trains_the_same_model(step_dir, train_on, split):
    flags = "--micro_batch_size {} --gradient_accumulation_steps {}".format(*split)
    same_step(step_dir, train_on, 1, flags, one="--micro_batch_size 8")


@pytest.mark.milestone(3, 8)
def test_replicas_train_as_one_process(step_dir, train_on):
    same_step(step_dir, train_on, 2, "")


@pytest.mark.milestone(3, 8)
def test_the_program(step_dir):
    result = launch(step_dir, SMALL.replace("4096", "96"), ranks=1)
    assert result.code == 0, f"python train.py ends with {result.code}: {result.errors[0]}"
    steps = [line["step"] for line in result.metrics]
    assert steps == [1, 2, 3], f"main trains the steps {steps}; 96 tokens are three steps of 32"
    assert re.search(r"held-out loss \d", result.out), "main should end with a held-out loss"


@pytest.mark.milestone(3, 9)
def test_names_and_places(step_dir, worlds, tmp_path):
    worlds(step_dir, 1).run(mixes.names, tmp_path)
    worlds(step_dir, 1).run(mixes.periods)
    worlds(step_dir, 1).run(mixes.rows)


@pytest.mark.milestone(3, 10)
@each(mixes.loaded, mixes.made, mixes.reports)
def test_a_run_on_a_mix(step_dir, worlds, function):
    worlds(step_dir, 1).run(function)


@pytest.mark.milestone(3, 11)
@each(mixes.mapped, mixes.checked, mixes.taken_over)
def test_a_folder_that_trains(step_dir, worlds, function, tmp_path):
    worlds(step_dir, 1).run(function, tmp_path)


@pytest.mark.milestone(3, 12)
@each(mixes.tokenizers, mixes.restarted)
def test_from_raw_texts_to_tokens(step_dir, worlds, function, tmp_path):
    worlds(step_dir, 1).run(function, tmp_path)


# --- 13. and 14. STREAMING.md ---------------------------------------------------------------------


@pytest.mark.milestone(3, 13)
@each(streaming.dealt, streaming.from_a_place, streaming.kept_apart, streaming.bad_line)
def test_the_documents_of_a_shard(step_dir, worlds, function, tmp_path):
    worlds(step_dir, 1).run(texts.within, tmp_path, function)


@pytest.mark.milestone(3, 14)
@each(streaming.cut, streaming.in_turns, streaming.apart, streaming.ahead)
def test_the_sequences_of_a_stream(step_dir, worlds, function, tmp_path):
    worlds(step_dir, 1).run(texts.within, tmp_path, function)
