"""Which texts a data set's name stands for, and what is said where one can't be read."""

import bz2
import gzip
import json
import lzma
import os
import random

import pytest
import workers_texts
from harness import World

pytestmark = pytest.mark.steps(3, 3)

PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def zst(data):
    import pyarrow

    return pyarrow.compress(data, "zstd", asbytes=True)


PACKERS[".zst"] = zst


@pytest.fixture(scope="module", name="load")
def loading(tmp_path_factory):
    """load(step_dir, *names): what `workers_texts.load` says of each data set."""
    worlds = {}

    def get(step_dir, *names, flags=(), cache=None, tmp="/tmp"):
        if step_dir not in worlds:
            folder = str(tmp_path_factory.mktemp("cache"))
            worlds[step_dir] = World(step_dir, 1, XDG_CACHE_HOME=folder, HF_HOME=folder + "/hf")
        calls = [["--dataset_name", str(name), *flags] for name in names]
        (results,) = worlds[step_dir].run(workers_texts.loaded, calls, cache, str(tmp))
        return results

    yield get
    for world in worlds.values():
        world.close()


def jsonl(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


# --- names ----------------------------------------------------------------------------------------

LETTERS = "ab[]*?{}()!$&;'\" ~#%é東\n\t-_.,=+\udcff"


def make_tree(chance, folder, outside):
    """A random folder: {path: text} of what is to be read, and how many things are not."""
    texts, left_out = {}, 0
    folders = [folder]
    for index in range(chance.randrange(3, 15)):
        name = "".join(chance.choices(LETTERS, k=chance.randrange(1, 9))).lstrip(".") + f"{index}"
        path = chance.choice(folders) / name
        what = chance.randrange(9)
        ending = chance.choice([".txt", ".TXT", ".tXt"])
        packing = chance.choice(["", *PACKERS])
        text = f"{index} " * chance.randrange(20)
        packed = PACKERS[packing](text.encode()) if packing else text.encode()
        file = path.with_name(name + ending + chance.choice([packing, packing.upper()]))
        if what < 3:
            file.write_bytes(packed)
            texts[file] = text
        elif what == 3:  # a link to a file
            elsewhere = outside / f"{index}{ending}{packing}"
            elsewhere.write_bytes(packed)
            file.symlink_to(elsewhere)
            texts[file] = text
        elif what == 4:
            path.mkdir()
            folders.append(path)
        elif what == 5:  # a link to a folder
            (outside / f"{index}").mkdir()
            (outside / f"{index}" / "b.txt").write_text(text)
            path.symlink_to(outside / f"{index}")
            texts[path / "b.txt"] = text
        elif what == 6:  # a loop, or one more way to what is there
            real = [file for file in texts if file.resolve() == file]
            path.symlink_to(chance.choice([*folders, *real, path]))
            left_out += 1
        elif what == 7:
            (path.parent / f".{name}").mkdir()
            (path.parent / f".{name}" / "hidden.txt").write_text("hidden")
            (path.parent / f".{name}.txt").write_text("hidden")
            left_out += 2
        else:
            path.with_name(name + chance.choice([".py", ".parquet.gz", "", ".txt.zip"])).touch()
            left_out += 1
    return texts, left_out


def test_every_file_is_read_by_its_name_or_is_said_to_be_left_out(step_dir, load, tmp_path):
    chance, made = random.Random(13), []
    for index in range(24):
        folder = tmp_path / f"{index} " / "".join(chance.choices(LETTERS, k=5))
        folder.mkdir(parents=True)
        (tmp_path / f"out{index}").mkdir()
        made.append((folder, *make_tree(chance, folder, tmp_path / f"out{index}")))
    found = load(step_dir, *(folder for folder, _, _ in made))
    for (folder, texts, left_out), result in zip(made, found, strict=True):
        if not texts:
            assert "no file" in result["error"] and "\n" not in result["error"]
            continue
        expected = "".join(texts[path] + "\0" for path in sorted(texts))
        assert result["tokens"].decode() == expected, f"texts of {folder}: {result}"
        assert len(result["notes"]) == (left_out > 0)
        if left_out:
            said = result["notes"][0].split("left out ")[1]
            assert sum(int(n) for n in said.replace("(", "").split() if n.isdigit()) >= left_out


def test_brackets_in_names_are_no_pattern(step_dir, load, tmp_path):
    (tmp_path / "part[1].txt").write_text("the one")
    (tmp_path / "part1.txt").write_text("the other")
    (tmp_path / "v[2]").mkdir()
    (tmp_path / "v[2]" / "a.JSONL").write_bytes(jsonl("in a folder"))
    one, folder = load(step_dir, tmp_path / "part[1].txt", tmp_path / "v[2]")
    assert one["tokens"] == b"the one\0" and folder["tokens"] == b"in a folder\0"
    assert not one["notes"] and not folder["notes"]


def test_a_link_to_what_is_hidden_is_followed(step_dir, load, tmp_path):
    (tmp_path / ".store").mkdir()
    (tmp_path / ".store" / "b.txt").write_text("in a folder")
    (tmp_path / ".a.txt").write_text("a file")
    (tmp_path / "shown.txt").symlink_to(tmp_path / ".a.txt")
    (tmp_path / "store").symlink_to(tmp_path / ".store")
    (result,) = load(step_dir, tmp_path)
    assert result["tokens"] == b"a file\0in a folder\0", "two visible links lead to hidden names"
    assert result["notes"][0].endswith("left out 2 hidden (.a.txt, .store)")


def test_what_is_left_out_is_named_in_one_line_also_from_the_cache(step_dir, load, tmp_path):
    for name in ("a.txt", "._a.txt", "README.md", "b.py", "c.py", "d.py", "e.py"):
        (tmp_path / name).write_text(name)
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".ipynb_checkpoints" / "a.txt").write_text("old")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    for result in load(step_dir, tmp_path, tmp_path):
        (line,) = result["notes"]
        assert result["tokens"] == b"a.txt\0"
        for words in (
            "2 hidden (._a.txt, .ipynb_checkpoints)",
            "5 of another kind (README.md, b.py, c.py, …)",
            "(gone.txt, pipe.txt)",
            "1 reached twice by links (loop)",
        ):
            assert words in line
    (nothing,) = load(step_dir, tmp_path / ".ipynb_checkpoints")
    assert nothing["tokens"] == b"old\0", "named by its own name it is meant"


@pytest.mark.parametrize("packing", PACKERS)
def test_packed_files_are_read_and_cut_ones_named(step_dir, load, tmp_path, packing):
    text = " ".join(map(str, range(30_000)))
    rows = [text[start : start + 2000] for start in range(0, len(text), 2000)]
    whole = {f"a.txt{packing}": text.encode(), f"b.Jsonl{packing}": jsonl(*rows)}
    for name, data in whole.items():
        (tmp_path / name).write_bytes(PACKERS[packing](data))
        (tmp_path / f"cut {name}").write_bytes(PACKERS[packing](data)[:-1000])
    names = [*whole, *(f"cut {name}" for name in whole)]
    one, many, *cut = load(step_dir, *(tmp_path / name for name in names))
    assert one["tokens"].decode() == text + "\0"
    assert many["tokens"].decode() == "".join(row + "\0" for row in rows)
    for name, result in zip(names[2:], cut, strict=True):
        assert str(tmp_path / name) in result["error"], result


# --- splits ---------------------------------------------------------------------------------------

# files: (those to train on, held out, words of the note)
SPLITS = {
    "train.txt valid.txt test.txt": ("train.txt", "valid.txt", "left out 1 named test (test.txt)"),
    "train/a.txt validation/b.txt test/c.txt": ("train/a.txt", "validation/b.txt", "test/c.txt"),
    "Train_1.txt dev-1.txt val.2.txt": ("Train_1.txt", "dev-1.txt val.2.txt", "held out 2"),
    "train1.txt train2.txt": ("train1.txt train2.txt", None, None),
    "c4-train.00000-of-00002.txt c4-validation.00000-of-00001.txt": (
        "c4-train.00000-of-00002.txt",
        "c4-validation.00000-of-00001.txt",
        "held out 1",
    ),
    "bullet_train.txt test.txt": ("bullet_train.txt test.txt", None, None),
    "trains.txt validation.txt tests/a.txt": ("tests/a.txt trains.txt validation.txt", None, None),
    "src/a.txt tests/train/b.txt tests/test/c.txt": (
        "src/a.txt tests/train/b.txt",
        None,
        "left out 1 named test (tests/test/c.txt)",
    ),
    "train.txt notes.txt": ("train.txt", None, "1 beside train, named for no split (notes.txt)"),
    "train/test.txt train/a.txt": ("train/a.txt train/test.txt", None, None),
}


@pytest.mark.parametrize("names", SPLITS)
def test_names_of_splits_count_beside_train(step_dir, load, tmp_path, names):
    for name in names.split():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)
    train, held_out, words = SPLITS[names]
    (result,) = load(step_dir, tmp_path)
    assert result["tokens"].decode().split("\0")[:-1] == train.split()
    if held_out is None:
        assert result["held_out"] is None
    else:
        assert result["held_out"].decode().split("\0")[:-1] == held_out.split()
    if words is None:
        assert not result["notes"]
    else:
        (line,) = result["notes"]
        assert words in line and "trained on" in line


def test_a_file_that_is_named_by_itself_is_trained_on(step_dir, load, tmp_path):
    for name in ("train.txt", "test.txt"):
        (tmp_path / name).write_text(name)
    (result,) = load(step_dir, tmp_path / "test.txt")
    assert result["tokens"] == b"test.txt\0" and not result["notes"]


def test_splits_of_a_saved_data_set(step_dir, load, tmp_path):
    import datasets

    sets = {
        "all": (["test", "train", "validation"], ["held out the split validation", "out test"]),
        "other": (["extra", "test"], ["trained on the split extra", "left out test"]),
        "train": (["train"], []),
    }
    for name, (splits, _) in sets.items():
        rows = {split: datasets.Dataset.from_dict({"text": [split]}) for split in splits}
        datasets.DatasetDict(rows).save_to_disk(tmp_path / name)
    for _ in range(2):  # tokenised, and from the cache
        found = dict(zip(sets, load(step_dir, *(tmp_path / name for name in sets)), strict=True))
        assert found["all"]["tokens"] == b"train\0" == found["train"]["tokens"]
        assert found["other"]["tokens"] == b"extra\0"
        assert found["all"]["held_out"] == b"validation\0" and not found["other"]["held_out"]
        for name, (_, words) in sets.items():
            assert len(found[name]["notes"]) == bool(words)
            assert all(word in found[name]["notes"][0] for word in words)


# --- large texts ----------------------------------------------------------------------------------


def random_text(chance, words, length):
    blanks = " | | |  |      |\n| \n|\r\n|\t|\u00a0|\n\n  |\0| \0 ".split("|")
    parts = []
    while length > 0:
        parts += [chance.choice(words), chance.choice(blanks)]
        length -= len(parts[-1]) + len(parts[-2])
    return "".join(parts)


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "whitespace"])
def test_slices_do_not_change_the_tokens_of_a_tokenizer_that_splits_at_spaces(
    step_dir, worlds, tmp_path, kind
):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    chance = random.Random(15)
    letters = "abcdeé東,.!'{}()12"
    words = ["".join(chance.choices(letters, k=chance.randrange(1, 9))) for _ in range(200)]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt2")
    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    before = {
        "gpt2": byte_level,
        "llama3": pre_tokenizers.Sequence([split, byte_level]),
        "whitespace": pre_tokenizers.Whitespace(),
    }
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = before[kind]
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<end>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([random_text(chance, words, 20_000)], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    made.save_pretrained(tmp_path)
    documents = [random_text(chance, words, size) for size in (10, 3000, 40_000)]
    sizes = [(1, 1000), (50, 2000), (2**12, 2**16)]
    (results,) = worlds(step_dir, 1).run(
        workers_texts.cut_and_whole, str(tmp_path), documents, sizes
    )
    for cut, whole in results:
        assert cut == whole


def test_a_large_text_is_read_in_little_memory(step_dir, tmp_path):
    """One piece would take 0.2 GB for each of its MB. Letters lie across blocks too."""
    chance = random.Random(7)
    words = ["東京", "é", "word", "🙂", "longer-word", "x" * 300_000]
    text = "".join(f"{chance.choice(words[:5])} " for _ in range(450_000)) + words[5]
    (tmp_path / "large.txt").write_text(text)
    argv = ["--dataset_name", str(tmp_path / "large.txt")]
    with World(step_dir, 1) as world:
        ((megabytes, result),) = world.run(workers_texts.peak_megabytes, argv, str(tmp_path))
    assert result["tokens"] == text.encode() + b"\0"
    assert megabytes < 300


# --- what is in the files -------------------------------------------------------------------------


def table(kind):
    import pyarrow as pa

    texts = pa.array(["one", None, "naïve 東京"])
    made = {"dictionary": lambda: texts.dictionary_encode()}.get(kind, lambda: texts.cast(kind))
    return pa.table({"n": [1, 2, 3], "text": made()})


def test_only_the_text_column_is_read(step_dir, load, tmp_path):
    """Others differ from file to file, and are null for the first 10 MB."""
    rows = [{"text": "a", "pad": "x" * 10_000, "other": None}] * 1100 + [{"text": "b", "other": 1}]
    rows += [{"other": {"deep": ["x"]}}, {"text": None}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "b.jsonl").write_text('{"other": "x", "text": "c"}\r\n')
    (tmp_path / "c.json").write_text(json.dumps([{"text": "d"}, {"text": "e"}], indent=1))
    (tmp_path / "d.json").write_text('{\n"text":\n"f"}')
    (result,) = load(step_dir, tmp_path)
    assert result["tokens"] == b"a\0" * 1100 + b"b\0\0\0c\0d\0e\0f\0"


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_every_kind_of_text_in_parquet(step_dir, load, tmp_path, kind):
    from pyarrow.parquet import write_table

    write_table(table(kind), tmp_path / "a.parquet", row_group_size=2)
    (result,) = load(step_dir, tmp_path / "a.parquet")
    assert result["tokens"] == "one\0\0naïve 東京\0".encode()


def test_byte_order_marks_are_dropped_and_other_bytes_kept(step_dir, load, tmp_path):
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.txt").write_bytes(mark + "a\r\nb\ufeff\r".encode())
    (tmp_path / "b.jsonl").write_bytes(mark + jsonl("c"))
    (tmp_path / "c.json").write_bytes(mark + b'[{"text": "d"}]')
    (tmp_path / "d.jsonl").write_bytes(b"")
    found = load(step_dir, *(tmp_path / name for name in sorted(os.listdir(tmp_path))))
    expected = ["a\r\nb\ufeff\r\0".encode(), b"c\0", b"d\0", b""]
    assert [result["tokens"] for result in found] == expected


BAD = {  # name: (content, words of the error)
    "latin.txt": (b"x" * 300_000 + b"caf\xe9 x", "byte 300003: 0xe9 is not utf-8"),
    "cut.txt": ("é".encode()[:1], "byte 0: 0xc3 is not utf-8"),
    "straddling.txt": (b"x" * (2**18 - 1) + b"\xc3x", "byte 262143: 0xc3 is not utf-8"),
    "latin.jsonl": (jsonl("a", "b") + b'{"text": "caf\xe9"}\n', "line 3: 0xe9 is not utf-8"),
    "broken.jsonl": (jsonl("a") + b"\n{text}\n", "line 3: Expecting property name"),
    "list.jsonl": (jsonl("a") + b"[1]\n", "line 2: no object but [1]"),
    "half.jsonl": (jsonl("a") + b'{"text": "\\ud800"}\n', "line 2: "),
    "deep.jsonl": (jsonl("a") + b"[" * 200_000, "line 2: maximum recursion depth"),
    "broken.json": (b'[{"text": "a"},\n {"text": }]', "line 2: Expecting value"),
    "numbers.json": (b'[{"text": "a"}, {"text": 1}]', "object 2: no text there but int64"),
    "column.jsonl": (b'{"story": "a", "n": 1}\n' * 1500 + b"x", "the columns are ['story', 'n']"),
    "empty.parquet": (b"", ""),
    "not.txt.gz": (b"not packed", "gzip"),
}


def test_an_error_names_the_file_among_others_and_the_place(step_dir, load, tmp_path):
    from pyarrow.parquet import write_table

    good = {".txt": b"good", ".jsonl": jsonl("good"), ".json": jsonl("good")}
    for name, (content, _) in BAD.items():
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (folder / f"15 {name}").write_bytes(content)
        ending = ".txt" if name.endswith("gz") else os.path.splitext(name)[1]
        for index in set(range(31)) - {15}:
            path = folder / f"{index:02}{ending}"
            if ending == ".parquet":
                write_table(table("string"), path)
            else:
                path.write_bytes(good[ending])
    found = load(step_dir, *(tmp_path / name.replace(".", "_") for name in BAD))
    for (name, (_, words)), result in zip(BAD.items(), found, strict=True):
        assert f"15 {name}" in result["error"] and words in result["error"], result["error"]
        assert "\n" not in result["error"]
