"""What tests of texts run in a process of a step: data sets loaded, with what was said of them."""

import contextlib
import io
import json
import os
import signal
import time
from pathlib import Path
from unittest.mock import patch


def load(argv, world, cache=None, tmp="/tmp"):
    """{tokens, held_out (bytes or None), about, notes, error} of one command line, a list."""
    import torch

    import corpus
    import errors
    import token_cache
    import train

    said = io.StringIO()
    result = {"tokens": None, "held_out": None, "about": None, "error": None}
    environment = {"TMPDIR": tmp} | ({"XDG_CACHE_HOME": str(cache)} if cache else {})
    with contextlib.redirect_stdout(said), patch.dict(os.environ, environment):
        try:
            args = train.parse_args(argv)
            found = corpus.load_tokens(args, world, torch.device("cpu"))
            folder = Path(found[0].filename).parent
            result["about"] = token_cache.read_about(folder)
            assert all(x is None or Path(x.filename).parent == folder for x in found)
            result["tokens"], result["held_out"] = (
                None if x is None else bytes(x.astype("uint8")) for x in found
            )
        except errors.UserError as error:
            result["error"] = str(error)
        result["libraries"] = os.environ.get("HF_HOME")
    notes = said.getvalue().splitlines()
    assert all(line.startswith("note: ") for line in notes), notes
    return result | {"notes": notes}


def the_world():
    import process_group as pg

    pg.init_processes("cpu")
    return pg.Mesh(dp=pg.dist.get_world_size()).world


def loaded(calls, *options):
    """`load` of each command line."""
    world = the_world()
    return [load(argv, world, *options) for argv in calls]


def peak_megabytes(argv, cache):
    """(peak memory while a data set is loaded, over what there was before, in MB; its tokens)."""
    import corpus

    world = the_world()
    corpus.load_tokenizer("bytes")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew

    def peak():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

    before = peak()
    result = load(argv, world, cache)
    return peak() - before, result


def cut_and_whole(tokenizer_folder, documents, sizes):
    """(tokens of the documents through slices of some sizes, their tokens without) of each size."""
    import corpus
    import texts

    tokenizer = corpus.load_tokenizer(tokenizer_folder)
    ids_of = corpus.encoder(tokenizer)
    whole = []
    for document in documents:
        document = document.replace("\0", "")
        whole += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        whole += [tokenizer.eos_token_id]
    results = []
    for small, large in sizes:
        with patch.object(texts, "SLICE", small), patch.object(texts, "LONGEST_SLICE", large):
            for block in (100, 10**6):  # as a file is read, and as a row is
                pieces = (
                    (document[start : start + block], start + block >= len(document))
                    for document in documents
                    for start in range(0, len(document), block)
                )
                found = [
                    corpus.encode_batch(batch, ids_of, [tokenizer.eos_token_id], "uint32").tolist()
                    for batch in corpus.cut_batches(texts.slices(pieces))
                ]
                results.append((sum(found, []), whole))
    return results


def in_a_child(function):
    """What a function returns in a process of its own, as JSON can say it."""
    read, write = os.pipe()
    if child := os.fork():
        os.close(write)
        with open(read) as answer:
            text = answer.read()
        os.waitpid(child, 0)
        return json.loads(text)
    try:
        answer = json.dumps(function())
    except BaseException as error:
        answer = json.dumps(repr(error))
    os.write(write, answer.encode())
    os._exit(0)


def without_home(calls, cache):
    """(what each call gives without XDG_CACHE_HOME, and with it), and the files that are made here.

    For a user without HOME, whom the system does not know.
    """
    world = the_world()
    load(calls[0], world, f"{cache}-other")  # imports what that user may not be able to read

    def as_nobody():
        os.chdir(cache)
        os.setgroups([])
        os.setresgid(54321, 54321, 54321)
        os.setresuid(54321, 54321, 54321)
        for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME"):
            os.environ.pop(name, None)
        found = [(load(argv, world), load(argv, world, cache)) for argv in calls]
        for result in sum(found, ()):
            del result["tokens"]  # bytes are no JSON
        return found, os.listdir(".")

    return in_a_child(as_nobody)


def leftovers(cache, argv):
    """(names in the cache while one process writes there and one was killed, and after a load)."""
    import token_cache

    world, folder = the_world(), Path(cache) / "four-d-from-scratch"

    def begin():
        """The id of a process that writes and does not come to an end."""
        read, write = os.pipe()
        child = os.fork()
        if not child:
            try:
                with token_cache.room_for(folder / "never") as part:
                    (part / "tokens.npy").write_bytes(b"some")
                    os.write(write, b"x")
                    signal.pause()
            finally:
                os._exit(1)
        os.close(write)
        assert os.read(read, 1), "it did not begin"
        return child

    killed = begin()
    os.kill(killed, signal.SIGKILL)
    os.waitpid(killed, 0)
    (folder / "aside-mine").mkdir()  # not one of our names
    before = sorted(os.listdir(folder))
    writing = begin()  # and what was killed is gone
    during = sorted(os.listdir(folder))
    result = load(argv, world, cache)
    after = sorted(os.listdir(folder))
    os.kill(writing, signal.SIGKILL)
    os.waitpid(writing, 0)
    load([*argv, "--text_column", "other"], world, cache)
    return before, during, after, sorted(os.listdir(folder)), result["error"]


def orphans(argv, cache):
    """How many tokenising processes there were, and how many outlive their parent by 5 s."""
    import corpus

    world = the_world()
    child = os.fork()
    if not child:
        try:
            corpus.encode_batch = lambda *_, **__: time.sleep(600)
            load(argv, world, cache)
        finally:
            os._exit(1)

    def children(of):
        try:
            tasks = Path(f"/proc/{of}/task").iterdir()
            return [int(c) for t in tasks for c in (t / "children").read_text().split()]
        except OSError:
            return []

    deadline = time.monotonic() + 20
    while len(started := children(child)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)

    def there(process):
        try:
            return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
        except OSError:
            return False

    deadline = time.monotonic() + 5
    while any(map(there, started)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return len(started), sum(map(there, started))
