"""Text in, batches out: every kind of data set, and which sequences make up a step."""

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios

import numpy as np
import numpy_llama
import pytest
import workers_data
import workers_memory
import workers_model
from conftest import step_number
from harness import World
from launch import launch, on_two, ranks_of

pytestmark = pytest.mark.steps(3, 3)
DOCUMENTS = ["To be, or not to be,\nthat is the question.\n", "naïve – 東京\n", "", "x" * 300]
ENDED = b"".join(document.encode() + b"\0" for document in DOCUMENTS)


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """cached(step_dir, size): a World whose caches are new and its own."""
    folder = tmp_path_factory.mktemp("cache")
    made = {}

    def get(step_dir, size=1):
        if size not in made:
            made[size] = World(
                step_dir, size, XDG_CACHE_HOME=str(folder), HF_HOME=str(folder / "hf")
            )
        return made[size]

    yield get
    for world in made.values():
        world.close()


def save_to_disk(folder, split):
    import datasets

    found = datasets.Dataset.from_dict({"text": DOCUMENTS})
    (datasets.DatasetDict({"train": found}) if split else found).save_to_disk(folder)


def write(kind, folder):
    """Put DOCUMENTS into a data set of some kind; what --dataset_name takes."""
    if kind == "jsonl":
        lines = [json.dumps({"text": document, "other": 1}) for document in DOCUMENTS]
        (folder / "data.jsonl").write_text("\n".join(lines))
        return folder / "data.jsonl"
    if kind == "parquet":
        import datasets

        datasets.Dataset.from_dict({"text": DOCUMENTS}).to_parquet(folder / "data.parquet")
        return folder / "data.parquet"
    if kind.startswith("saved"):
        save_to_disk(folder / "saved", kind.endswith("split"))
        return folder / "saved"
    for index, document in enumerate(DOCUMENTS):
        (folder / f"{index}.txt").write_text(document)
    return folder


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved", "saved with a split", "texts"])
def test_every_kind_of_data_set_gives_the_same_tokens(step_dir, cached, kind, tmp_path):
    name = write(kind, tmp_path)
    ((tokens, _),) = cached(step_dir).run(workers_data.tokens_of, f"--dataset_name {name}")
    assert bytes(tokens.astype(np.uint8)) == ENDED


def test_a_single_text_file_is_one_document_and_loses_its_nuls(step_dir, cached, tmp_path):
    (tmp_path / "one.txt").write_text("a\0b\n\nc\n")
    argv = f"--dataset_name {tmp_path / 'one.txt'}"
    ((tokens, _),) = cached(step_dir).run(workers_data.tokens_of, argv)
    assert bytes(tokens.astype(np.uint8)) == b"ab\n\nc\n\0"


def test_another_column_and_more_processes(step_dir, cached, tmp_path):
    lines = [json.dumps({"story": text * 50}) for text in DOCUMENTS[:2] * 100]
    (tmp_path / "stories.jsonl").write_text("\n".join(lines))
    argv = f"--dataset_name {tmp_path} --text_column story"
    ((tokens, _),) = cached(step_dir).run(workers_data.tokens_of, argv + " --num_proc 2")
    expected = b"".join((text * 50).encode() + b"\0" for text in DOCUMENTS[:2] * 100)
    assert bytes(tokens.astype(np.uint8)) == expected


def test_the_byte_tokenizer_is_the_identity(step_dir, cached):
    text = "".join(map(chr, range(1, 2000))) + "東京 🙂  \n\n end"
    ((ids, back, end, size),) = cached(step_dir).run(workers_data.byte_tokenizer_round_trip, text)
    assert bytes(ids) == text.encode()
    assert back == text
    assert (end, size) == (0, 256)


def test_a_tokenizer_of_a_local_model(step_dir, cached, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<end>": 0, "?": 1, "to": 2, "be": 3}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(tmp_path)
    workers_model.tiny_config().save_pretrained(tmp_path)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("to be or\nnot to be")
    argv = f"--model_name {tmp_path} --dataset_name {tmp_path / 'text'}"
    ((tokens, _),) = cached(step_dir).run(workers_data.tokens_of, argv)
    assert tokens.tolist() == [2, 3, 1, 1, 2, 3, 0]
    ((tokens, _),) = cached(step_dir).run(
        workers_data.tokens_of, argv + " --tokenizer_name bytes --vocab_size 256"
    )
    assert len(tokens) == 19


def test_a_tokenizer_that_was_trained_anew_is_noticed(step_dir, cached, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    (tmp_path / "a.txt").write_text("to be")
    argv = f"--dataset_name {tmp_path / 'a.txt'} --tokenizer_name {tmp_path / 'tok'}"
    for ids in ([2, 3], [3, 2]):
        vocabulary = {"<end>": 0, "?": 1, "to": ids[0], "be": ids[1]}
        words = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        made = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
        made.save_pretrained(tmp_path / "tok")
        ((tokens, _),) = cached(step_dir).run(workers_data.tokens_of, argv)
        assert tokens.tolist() == [*ids, 0]


@pytest.mark.sampled(3, 9)
@pytest.mark.steps(3)
def test_the_first_rank_tokenises_once_and_the_others_wait(step_dir, tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    argv = f"--dataset_name {tmp_path / 'a.txt'}"
    caches = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hf")}
    size = 3 if step_number(step_dir) == 3 else 2  # replicas, or ranks of its newest axis
    with World(step_dir, size, **caches) as world:
        (first, heavy), *others = world.run(workers_data.tokens_of, argv + on_two(step_dir))
        assert heavy == {"transformers"}  # `datasets` is for the hub and for what it saved
        for tokens, heavy in others:
            assert np.array_equal(tokens, first)
            assert not heavy
    with World(step_dir, 1, **caches) as world:
        ((tokens, heavy),) = world.run(workers_data.tokens_of, argv)
        assert np.array_equal(tokens, first)
        assert not heavy, "the cache has the result"
        (tmp_path / "a.txt").write_text("some other text")
        ((tokens, heavy),) = world.run(workers_data.tokens_of, argv)
        assert bytes(tokens.astype(np.uint8)) == b"some other text\0"


def test_the_standard_library_is_megabytes_of_text(step_dir, worlds):
    ((tokens, _),) = worlds(step_dir, 1).run(workers_data.tokens_of, "")
    assert len(tokens) > 2**22
    assert tokens.max() < 256
    assert (tokens == 0).sum() > 300
    text = bytes(tokens[:100_000].astype(np.uint8)).decode(errors="ignore")
    assert "import" in text and "def " in text


def test_random_tokens_fill_the_vocabulary(step_dir, worlds):
    argv = "--dataset_name random --vocab_size 300"
    ((tokens, _),) = worlds(step_dir, 1).run(workers_data.tokens_of, argv)
    ((again, heavy),) = worlds(step_dir, 1).run(workers_data.tokens_of, argv)
    assert np.array_equal(tokens, again) and not heavy
    assert set(np.unique(tokens)) == set(range(300))


# --- batches: tokens 0 … 999 make 99 windows of 10 + 1; one is held out, 98 are for training ------

TOKENS = np.arange(1000, dtype=np.uint16)


def starts(windows):
    """Index of each window, from its first token; a window is a run of seq_len + 1 tokens."""
    assert (np.diff(windows, axis=1) == 1).all()
    assert (windows[:, 0] % 10 == 0).all()
    return (windows[:, 0] // 10).tolist()


def batches(worlds, step_dir, flags, steps, tokens=TOKENS):
    argv = f"--seq_len 10 {flags}"
    ((found, held_out, count),) = worlds(step_dir, 1).run(
        workers_data.batches_of, argv, tokens, steps
    )
    return [starts(windows) for windows in found], starts(held_out), count


def test_an_epoch_shows_each_training_sequence_once(step_dir, worlds):
    steps, held_out, count = batches(worlds, step_dir, "--micro_batch_size 7", range(28))
    assert count == 98
    assert set(held_out) == {98}
    first, second = sum(steps[:14], []), sum(steps[14:], [])
    assert sorted(first) == sorted(second) == list(range(98))
    assert first != second and first != sorted(first)


def test_a_step_may_straddle_two_epochs(step_dir, worlds):
    steps, _, _ = batches(worlds, step_dir, "--micro_batch_size 9", range(22))
    row = sum(steps, [])
    assert sorted(row[:98]) == list(range(98))
    assert sorted(row[98:196]) == list(range(98))


def test_the_last_64th_is_held_out(step_dir, worlds):
    tokens = np.arange(6401, dtype=np.uint16)  # 640 windows
    steps, held_out, count = batches(worlds, step_dir, "--micro_batch_size 5", [0], tokens)
    assert count == 630
    assert sorted(held_out) == list(range(630, 640))


@pytest.mark.parametrize("stride, hop", [(2, 8), (7, 3), (9, 1)])
def test_windows_share_as_many_tokens_as_the_stride_says(step_dir, worlds, stride, hop):
    """And training shares with what is held out no more than the one token that it always does."""
    tokens = np.arange(11 + 127 * hop, dtype=np.uint16)  # 128 windows, and no token more
    argv = f"--seq_len 10 --micro_batch_size 1 --stride {stride}"
    ((steps, held_out, count),) = worlds(step_dir, 1).run(
        workers_data.batches_of, argv, tokens, range(126)
    )
    epoch = np.concatenate(steps)[:count]
    assert sorted(epoch[:, 0]) == [place * hop for place in range(count)]
    assert min(held_out[:, 0]) == 126 * hop
    assert epoch.max() <= 126 * hop < epoch.max() + hop


def test_a_text_for_validation_is_held_out_and_nothing_else(step_dir, worlds):
    train, validation = np.arange(1000, dtype=np.uint16), np.arange(5000, 5101, dtype=np.uint16)
    argv = "--seq_len 10 --micro_batch_size 3"
    ((steps, held_out, count),) = worlds(step_dir, 1).run(
        workers_data.batches_of, argv, train, range(33), validation
    )
    assert count == 99
    assert sorted(np.concatenate(steps)[:, 0]) == list(range(0, 990, 10))
    assert set(held_out[:, 0]) <= set(range(5000, 5100, 10)) and len(held_out) == 9
    with pytest.raises(Exception, match="10 tokens"):
        worlds(step_dir, 1).run(workers_data.batches_of, argv, train, [0], validation[:10])


@pytest.mark.parametrize(
    "flags",
    [
        "--micro_batch_size 4 --gradient_accumulation_steps 2",
        "--micro_batch_size 1 --gradient_accumulation_steps 8",
        "--micro_batch_size 2 --gradient_accumulation_steps 4 --num_workers 2",
        "--micro_batch_size 8 --num_workers 3",
    ],
)
def test_the_sequences_of_a_step_do_not_depend_on_the_layout(step_dir, worlds, flags):
    in_order, held_out, count = batches(worlds, step_dir, "--micro_batch_size 8", range(41))
    steps = [0, 1, 2, 13, 3, 40]  # back and forth: the step is all of the position
    expected = [in_order[step] for step in steps], held_out, count
    assert batches(worlds, step_dir, flags, steps) == expected


def test_a_step_that_was_left_in_the_middle_starts_anew(step_dir, worlds):
    argv = "--seq_len 10 --micro_batch_size 2 --gradient_accumulation_steps 4"
    ((whole, again),) = worlds(step_dir, 1).run(workers_data.left_and_read_again, argv, TOKENS)
    assert np.array_equal(whole, again)


@pytest.mark.parametrize(
    "split, seq_len, count",
    [("8 --gradient_accumulation_steps 1", 16, 256), ("2", 16, 256), ("8", 128, 128)],
)
def test_the_held_out_loss_is_that_of_the_oracle(step_dir, worlds, split, seq_len, count):
    argv = "--dtype float64 --num_hidden_layers 1 --hidden_size 32 --intermediate_size 32 "
    argv += f"--dataset_name random --seq_len {seq_len} --micro_batch_size {split}"
    ((loss, weights, config, tokens, targets),) = worlds(step_dir, 1).run(
        workers_data.evaluated, argv
    )
    assert tokens.shape == (count, seq_len)  # 256 sequences or 16,384 tokens
    places = np.arange(seq_len)
    expected, _ = numpy_llama.loss_and_gradients(weights, config, tokens, targets, places)
    assert loss == pytest.approx(expected / targets.size, rel=1e-12)


@pytest.mark.steps(3)
@pytest.mark.sampled(7)
def test_an_evaluation_keeps_one_micro_batch_at_a_time(step_dir, worlds):
    """Nothing goes backward, so nothing lets go of what autograd keeps but the loop itself."""
    argv = "--num_hidden_layers 2 --seq_len 16 --dataset_name random" + on_two(step_dir)
    for one, three in worlds(step_dir, ranks_of(argv)).run(
        workers_memory.bytes_kept_to_evaluate, argv, [1, 3]
    ):
        assert one == three > 0


def test_the_seed_gives_the_order(step_dir, worlds):
    one = batches(worlds, step_dir, "--seed 1", [0, 1])
    assert batches(worlds, step_dir, "--seed 1", [0, 1]) == one
    assert batches(worlds, step_dir, "--seed 2", [0, 1]) != one


def test_a_micro_batch_is_loaded_while_the_one_before_is_computed(step_dir, worlds):
    """Also the first one of the next step, and all by one loader."""
    argv = (
        "--num_hidden_layers 1 --seq_len 16 --dataset_name random --gradient_accumulation_steps 2"
    )
    (events,) = worlds(step_dir, 1).run(workers_data.loads_and_passes, argv, 2)
    assert events == ["new loader", "load", *4 * ["forward", "load"]]


def test_workers_end_with_their_loader(step_dir, worlds):
    argv = "--seq_len 10 --num_workers 2"
    assert worlds(step_dir, 1).run(workers_data.forgotten_loader, argv, TOKENS) == [(2, 0)]


def test_tokenising_shows_a_progress_bar_on_a_terminal(step_dir, tmp_path):
    (tmp_path / "a.txt").write_text("words " * 5000)
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # rows, columns
    command = f"--max_tokens 1 --num_hidden_layers 1 --dataset_name {tmp_path / 'a.txt'}".split()
    with subprocess.Popen(
        [sys.executable, str(step_dir / "train.py"), *command],
        stderr=slave,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf")},
    ) as process:
        os.close(slave)
        shown = b""
        while True:
            try:
                shown += os.read(master, 4096)
            except OSError:  # how a terminal says that the other side is gone
                break
    os.close(master)
    assert process.returncode == 0
    assert b"tokenising" in shown and b"100%" in shown


def test_a_cache_that_cannot_be_written_is_one_line(step_dir):
    result = launch(step_dir, "", XDG_CACHE_HOME="/dev/null")
    (said,) = result.errors[0].splitlines()
    assert result.code != 0 and said.startswith("error: /dev/null/") and "XDG_CACHE_HOME" in said
