"""What the checks of step 3's pages about mixes and prepared texts run."""

import json
import math
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
from workers_step3 import arguments, refused

OURS = Path(__file__).resolve().parents[2] / "step3_dataloader"


def names(folder):
    from text_names import parts_of, weights_of

    mix, file = f"{folder}/mix.json", f"{folder}/a,b:1.txt"
    Path(mix).write_text('{"a": 0.1, "b": 0.2}')
    Path(file).write_text("")
    for name, due in (
        ("a/:0.7,b.txt:.3", {"a/": Fraction(7, 10), "b.txt": Fraction(3, 10)}),
        (mix, {"a": Fraction(1, 10), "b": Fraction(1, 5)}),
        (file, {file: 1}),
        ("plain.txt", {"plain.txt": 1}),
    ):
        found = weights_of(name)
        assert found == due, f"weights_of({name!r}) is {found}, not {due}; as exact fractions"
    parts = parts_of(weights_of(mix), mix)
    assert parts == {"a": 1, "b": 2}, (
        f"parts_of: 0.1 and 0.2 have the parts {parts}, not 1 and 2: the shares are 1/3 and 2/3, "
        "and the period is their common denominator"
    )
    refused(lambda: weights_of("a:0.7,b"), "a:0.7,b", "weight", by="weights_of")
    refused(lambda: weights_of("a:1,a:2"), "once", by="weights_of")
    refused(lambda: weights_of("a:0,b:1"), "above 0", by="weights_of")
    odd = {"a": Fraction("0.123457"), "b": Fraction("0.9")}
    refused(lambda: parts_of(odd, "a:0.123457,b:0.9"), "digits", by="parts_of")


def periods():
    from mixes import period_of

    # The fourth is one where it is not enough to take whoever is owed most.
    for parts in ([1], [3, 2], [1, 1, 1, 5], [49, 6, 25, 13, 54, 3, 49]):
        texts, came = period_of(parts), [0] * len(parts)
        for place, text in enumerate(texts, 1):
            came[text] += 1
            for number, (part, count) in enumerate(zip(parts, came, strict=True)):
                due = place * part / sum(parts)
                assert abs(count - due) < 1, (
                    f"period_of({parts}): after {place} places text {number} came {count} times "
                    f"and should have come {due:.2f} times, to within less than one"
                )
        assert came == parts, f"period_of({parts}) has {came} of each"


def rows():
    from dataloader import Order
    from mixes import MixedOrder, period_of

    def made():
        return MixedOrder([3, 2], [Order(5, 4, "a"), Order(3, 4, "b")], [0, 5])

    texts, orders, turns = period_of([3, 2]), [Order(5, 4, "a"), Order(3, 4, "b")], [0, 0]
    due = []
    for place in range(23):
        text = texts[place % 5]
        due.append([0, 5][text] + orders[text].sequence(turns[text]))
        turns[text] += 1
    order = made()
    found = [order.sequence(place) for place in range(23)]
    assert found == due, (
        f"MixedOrder: with the parts 3 and 2 the row begins with {found}; it should be {due}: the "
        "next window of the text whose turn it is, counted from where its windows start"
    )
    late = made().sequence(17)
    assert late == due[17], (
        f"MixedOrder: place 17 asked for at once gives window {late}, in a row {due[17]}: a place "
        "must not depend on what was asked before"
    )
    assert next(made().cut(4, 2)) == due[8:12], "MixedOrder.cut: step 2 is not the places 8 to 11"


def two_texts():
    from mixes import Text

    about = {"tokens": 641, "held_out": 101, "bytes": {"tokens": 1282, "held_out": 303}}
    first, second = arguments(seed="3 text 0"), arguments(seed="3 text 1", eval_tokens=40)
    validation = np.arange(2000, 2101, dtype=np.uint16)
    return [
        Text(first, 3, np.arange(641, dtype=np.uint16), None, about),
        Text(second, 1, np.arange(1000, 1641, dtype=np.uint16), validation, about),
    ]


def loaded():
    import mixes

    args = arguments(texts={"a": 3, "b": 1}, dataset_name="a:3,b:1")
    asked = []

    def load_tokens(own, world, device):
        asked.append((own.dataset_name, own.seed))
        return np.arange(10, dtype=np.uint32), None

    with patch.object(mixes, "load_tokens", load_tokens):
        texts = mixes.load_texts(args, None, "cpu")
        args.texts = {"a": 1}
        alone = mixes.load_texts(args, None, "cpu")[0]
    assert [name for name, _ in asked] == ["a", "b", "a"], (
        f"load_texts loads the data sets {[name for name, _ in asked]}; each by its own name"
    )
    assert [text.part for text in texts] == [3, 1], "load_texts: each text has its own part"
    assert texts[0].args.seed != texts[1].args.seed, (
        "load_texts: both texts have the same seed, so two texts of the same size would be read in "
        "the same order"
    )
    assert alone.args.seed == 3, "load_texts: a text that is alone has the seed of the run"
    size = texts[0].bytes_per_token
    assert size is None, f"bytes_per_token of random tokens is {size}, not None"
    found = [text.bytes_per_token for text in two_texts()]
    assert found == [2, 3], f"bytes_per_token: {found}, not [2, 3]: of the text that is held out"


def made():
    import torch

    from mixes import batches, parts_of

    texts = two_texts()
    data = batches(texts, torch.device("cpu"))
    seen = [batch[0] for step in range(4) for batch in data.micro_batches(step)]
    starts = torch.cat(seen)[:, 0].tolist()
    of_second = sum(1000 <= start < 2000 for start in starts)
    assert of_second == 4, (
        f"batches: of 16 sequences {of_second} come from the second text, whose share is 1/4: "
        "whose windows does `starts` count from?"
    )
    assert max(starts) < 2000, "batches trains on a text that is for validation"
    parts = parts_of(data)
    assert len(parts) == 2, f"parts_of: {len(parts)} parts of a mix of two texts"
    last = [next(iter(part.evaluation()))[0][0, 0].item() for part in parts]
    assert 0 <= last[0] < 1000 and last[1] >= 2000, (
        f"parts_of: the held-out parts of the two texts begin with the tokens {last}; the second "
        "text has one of its own, from 2000 on"
    )
    alone = batches(texts[:1], torch.device("cpu"))
    assert parts_of(alone) == [alone], "parts_of one text is a list of just that"


def reports():
    from held_out import held_out_metrics, readable_held_out

    texts = two_texts()
    for name, text in zip("ab", texts, strict=True):
        text.args.dataset_name = name
    found = held_out_metrics([2.0, 4.0], texts)
    due = {"held_out": 2.5, "bits_per_byte": 2.5 / math.log(2) / 2.25}
    due |= {"held_out/a": 2.0, "held_out/b": 4.0}
    for name, value in due.items():
        assert name in found, f"held_out_metrics: {name} is not there, only {[*found]}"
        assert math.isclose(found[name], value), (
            f"held_out_metrics: {name} is {found[name]}, not {value}, for losses of 2 and 4, "
            "shares of 3/4 and 1/4, and 2 and 3 bytes a token"
        )
    line = readable_held_out(found)
    assert line == "held-out loss 2.5000 | 1.6030 bits a byte | a 2.0000 | b 4.0000", (
        f"readable_held_out says {line!r}"
    )
    texts[0].about["bytes"]["tokens"] = None
    found = held_out_metrics([2.0], texts[:1])
    assert found == {"held_out": 2.0, "bits_per_byte": None}, (
        f"held_out_metrics of random tokens is {found}: there are no bytes, and only one text"
    )


# --- 11. and 12. prepared texts -------------------------------------------------------------------


def mapped(folder):
    from prepared import Shards

    sizes, files, parts = (5, 0, 3, 8), [], []
    for number, size in enumerate(sizes):
        parts.append(np.arange(10 * number, 10 * number + size, dtype=np.uint16))
        files.append(Path(folder) / f"tokens_{number:05d}.npy")
        np.save(files[-1], parts[-1])
    whole, shards = np.concatenate(parts), Shards(files)
    assert len(shards) == len(whole), f"Shards: a length of {len(shards)}, not {len(whole)}"
    for start in range(len(whole)):
        for stop in range(start + 1, len(whole) + 1):
            found = shards[start:stop].tolist()
            assert found == whole[start:stop].tolist(), (
                f"Shards: of shards of 5, 0, 3 and 8 tokens the slice {start}:{stop} is {found}, "
                f"not {whole[start:stop].tolist()}"
            )


def prepared(folder, argv, shard_bytes, stop_after=None):
    """Run prepare.py on a folder of documents; the error or None."""
    import corpus
    import prepare
    from errors import UserError

    write, count = prepare.write_shard, iter(range(1000))

    def writing(*rest):
        if next(count) == stop_after:
            raise KeyboardInterrupt
        return write(*rest)

    changed = patch.multiple(prepare, SHARD_BYTES=shard_bytes, write_shard=writing)
    with changed, patch.object(corpus, "BATCH", shard_bytes // 2):
        try:
            prepare.main(prepare.parse_args(argv))
        except (UserError, KeyboardInterrupt) as error:
            return str(error) or "stopped"


def prepared_by_us(argv):
    """A folder of several shards by our own prepare.py, which a later milestone is about."""
    code = (
        "import sys, corpus, prepare; prepare.SHARD_BYTES = 2**12; corpus.BATCH = 2**11; "
        "prepare.main(prepare.parse_args(sys.argv[1:]))"
    )
    subprocess.run([sys.executable, "-c", code, *argv], cwd=OURS, check=True, capture_output=True)


def raw_folder(folder):
    raw = Path(folder) / "raw"
    raw.mkdir()
    rows = [f"{n} times {n} is {n * n}, é 問題 \n" * 3 for n in range(200)]
    (raw / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return ["--input_dir", str(raw)], rows


def tokenizers(folder):
    from transformers import AutoTokenizer

    from corpus import encoder

    given, rows = raw_folder(folder)
    given += ["--output_dir", f"{folder}/out", "--tokenizer_type", "bpe", "--vocab_size", "300"]
    said = prepared(folder, given, 2**20)
    assert said is None, f"prepare.py --tokenizer_type bpe: {said}"
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/out/tokenizer")
    texts = [rows[7], "new words \t\r\n  ", "a<|endoftext|>b", "\u2028ﬁ"]
    for text, ids in zip(texts, encoder(tokenizer)(texts), strict=True):
        assert tokenizer.eos_token_id not in ids, f"the text {text!r} has the end token in it"
        back = tokenizer.decode(ids)
        assert back == text, f"bpe: {text!r} comes back as {back!r}; each byte must be a symbol"


def restarted(folder):
    given, rows = raw_folder(folder)
    given += ["--tokenizer_type", "bytes", "--output_dir"]
    assert prepared(folder, [*given, f"{folder}/whole"], 2**11) is None
    said = prepared(folder, [*given, f"{folder}/cut"], 2**11, stop_after=2)
    assert said == "stopped" and not Path(f"{folder}/cut").exists(), (
        "prepare.py that is stopped must leave no folder with the name that was asked for"
    )
    done = sorted(Path(folder).glob(".cut.unfinished/*/*.npy"))
    times = [file.stat().st_mtime_ns for file in done]
    assert prepared(folder, [*given, f"{folder}/cut"], 2**11) is None
    name = done[0].parent.name
    again = [(Path(folder) / "cut" / name / file.name).stat().st_mtime_ns for file in done]
    assert times == again, "a shard that was whole has been made again"
    files = sorted((Path(folder) / "whole" / name).glob("*.npy"))
    tokens = [np.load(file) for file in files]
    for file, one in zip(files, tokens, strict=True):
        other = Path(folder) / "cut" / name / file.name
        assert other.exists() and (np.load(other) == one).all(), (
            f"{file.name} is another one after a stop: how many slices were skipped?"
        )
    found = np.concatenate(tokens).astype(np.uint8).tobytes()
    due = "".join(row + "\0" for row in rows).encode()
    assert found == due, "write_shards: the tokens are not those of all documents, in order"


def checked(folder):
    from prepared import prepared_text

    given, _ = raw_folder(folder)
    given += ["--tokenizer_type", "bytes", "--output_dir", f"{folder}/out"]
    prepared_by_us(given)
    text = next(path for path in Path(f"{folder}/out").iterdir() if path.name.startswith("0_"))
    assert prepared_text(str(text)) == text, "prepared_text does not find what prepare.py made"
    assert prepared_text(folder) is None, "prepared_text: another folder is none of prepare.py's"
    file = sorted(text.glob("*.npy"))[1]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    refused(lambda: prepared_text(str(text)), file.name, by="prepared_text")


def taken_over(folder):
    from prepared import choose_prepared

    given, _ = raw_folder(folder)
    given += ["--tokenizer_type", "bytes", "--output_dir", f"{folder}/out"]
    prepared_by_us(given)

    def asked(**flags):
        args = SimpleNamespace(tokenizer_name=None, vocab_size=None, model_name="debug")
        args.__dict__.update(flags)
        return args, choose_prepared(args, {f"{folder}/out": Fraction(1), "x": Fraction(3)})

    args, found = asked()
    assert found == {f"{folder}/out/0_raw": 1, "x": 3}, f"choose_prepared gives {found}"
    assert args.vocab_size == 256 and args.tokenizer_name == f"{folder}/out/tokenizer", (
        f"choose_prepared: the vocabulary is {args.vocab_size} and the tokenizer "
        f"{args.tokenizer_name}; both are those of the folder"
    )
    assert asked(vocab_size=300)[0].vocab_size == 300, "a --vocab_size that is given stays"
    refused(lambda: asked(tokenizer_name="gpt2"), "--tokenizer_name gpt2", by="choose_prepared")
