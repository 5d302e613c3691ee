"""A directory of checkpoints: their names, what each says of itself, and which may be deleted.

    DIR/step_00000020/   a checkpoint: tensors, the tokenizer, and checkpoint.json, which names its
                         run and step, and has checksums of all other files and of itself
    DIR/.run_id          a random number that each checkpoint written here contains

A checkpoint is complete or absent: written under a hidden name, then renamed. Deleted is only what
has a name of ours exactly, and was written here.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
from pathlib import Path

from corpus import load_tokenizer
from errors import UserError, in_one_line, note

NAME, HIDDEN = re.compile(r"step_\d{8}"), re.compile(r"\.step_\d{8}-[0-9a-f]{8}")
KEYS = {
    *("step", "run", "flags", "tokenizer", "special_tokens", "dtype", "model", "data"),
    *("files", "others"),
}


def name_of(step):
    return f"step_{step:08d}"


def checkpoints(directory):
    """What has a checkpoint's name in a directory, oldest first; links are followed."""
    found = [path for path in Path(directory).glob("step_*") if NAME.fullmatch(path.name)]
    return sorted(path for path in found if path.is_dir())


def find(flag, directory):
    """The checkpoint that a flag's directory is, or the latest in it; raises UserError."""
    path = Path(directory)
    found = [path] if (path / "checkpoint.json").exists() else checkpoints(path)
    if not found:
        raise UserError(f"{flag} {directory}: no checkpoint there, nor in it; name one")
    return found[-1]


# --- what a checkpoint says of itself -------------------------------------------------------------


def sealed(about):
    """The text of checkpoint.json: a dict, behind a checksum of how it is written."""
    text = json.dumps(about, indent=1)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f'{{"sha256": "{digest}",\n"about": {text}}}\n'


def write_about(directory, about):
    """Write checkpoint.json, the last file of a checkpoint."""
    with open(directory / "checkpoint.json", "w") as file:
        file.write(sealed(about))
        file.flush()
        os.fsync(file.fileno())


def read_about(flag, path, remedy=", name another one"):
    """The checkpoint.json of a checkpoint, once its files are found to be there and whole.

    The tensors' checksums are compared when they are read. Raises UserError.
    """

    def damaged(why):
        return UserError(f"{flag} {path}: {why}: the checkpoint is damaged{remedy}")

    try:
        text = (path / "checkpoint.json").read_text()
        about = json.loads(text)
        if isinstance(about, dict) and "step" in about:
            raise UserError(
                f"{flag} {path}: a checkpoint of an older format, which only the program that "
                f"wrote it can read{remedy}"
            )
        if text != sealed(about["about"]) or not KEYS <= (about := about["about"]).keys():
            raise damaged("checkpoint.json is not as it was written")
        for name, file in about["files"].items():
            if (size := (path / name).stat().st_size) != file["bytes"]:
                raise damaged(f"{name} has {size} of {file['bytes']} bytes")
        for name, digest in about["others"].items():
            if hashlib.sha256((path / name).read_bytes()).hexdigest() != digest:
                raise damaged(f"{name} is not as it was written")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(in_one_line(error)) from None
    if NAME.fullmatch(path.name) and path.name != name_of(about["step"]):
        raise damaged(f"its name is not that of step {about['step']}")
    return about


def newest_sound(flag, found):
    """The newest checkpoint of a list in which `read_about` finds no damage, and what that returns.

    (None, None) for an empty list. A note names each newer one. Raises UserError if none is sound.
    """
    for path in reversed(found):
        try:
            return path, read_about(flag, path, remedy="")
        except UserError as error:
            problem = error
            note(f"{error}" if path == found[0] else f"{error}; an older one is tried")
    if found:
        raise UserError(f"{problem}; none here is sound: name another directory")
    return None, None


# --- writing and deleting -------------------------------------------------------------------------


def run_id(directory):
    """What is written into this directory's checkpoints; made when first asked for."""
    path = Path(directory) / ".run_id"
    said = path.read_bytes() if path.is_file() else b""
    if not re.fullmatch(rb"[0-9a-f]{16}\n", said):  # none, or cut off by a loss of power
        said = secrets.token_hex(8).encode() + b"\n"
        aside = path.with_name(f".run_id-{secrets.token_hex(4)}")
        try:
            aside.write_bytes(said)
            aside.rename(path)
        finally:
            aside.unlink(missing_ok=True)
    return said.decode().strip()


def check_config(directory):
    """Raise UserError where config.json is not of a run, as in a directory with a model."""
    path = Path(directory) / "config.json"
    try:
        flags = json.loads(path.read_text()) if path.exists() else {"checkpoint_dir": None}
    except (OSError, ValueError, RecursionError):
        flags = None
    if not isinstance(flags, dict) or "checkpoint_dir" not in flags:
        raise UserError(
            f"--checkpoint_dir {directory}: its config.json is not of a run; name another directory"
        )


def begin(directory, step):
    """Make a directory to write a checkpoint into; returns its name, which is hidden."""
    clean(directory)
    name = f".{name_of(step)}-{secrets.token_hex(4)}"
    (Path(directory) / name).mkdir()
    return name


def complete(aside, directory, step):
    """Give a whole checkpoint its name. What has that name already, a damaged one, gets another."""
    path = Path(directory) / name_of(step)
    if os.path.lexists(path):
        number = 1
        while os.path.lexists(other := path.with_name(f"{path.name}.damaged{number}")):
            number += 1
        path.rename(other)
        note(f"{path} is {other.name} now: step {step} is saved anew")
    aside.rename(path)
    for changed in (path, path.parent):  # that a name is there survives a loss of power
        handle = os.open(changed, os.O_RDONLY)
        with contextlib.suppress(OSError):  # not every file system does that for directories
            os.fsync(handle)
        os.close(handle)


def own(directory):
    """The checkpoints that were written into this directory, oldest first."""
    found = []
    for path in checkpoints(directory):
        try:
            if read_about("", path)["run"] == run_id(directory):
                found.append(path)
        except UserError:  # damaged: not ours to delete
            pass
    return found


def keep(directory, last, every=None, kept=()):
    """Delete our own checkpoints, save the `last`, one `every` so many steps, and `kept`."""
    for path in own(directory)[:-last]:
        step = int(path.name.removeprefix("step_"))
        if path not in kept and (every is None or step % every):
            delete(path)


def delete(path):
    """Delete a checkpoint, or the link to one. Where that can't be done, say so and go on."""
    try:
        if path.is_symlink():
            path.unlink()
        else:
            hidden = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
            path.rename(hidden)
            shutil.rmtree(hidden)
    except OSError as error:
        say_once(f"{path} can't be deleted ({error.strerror}) and stays")


say_once = functools.cache(note)


def clean(directory):
    """Delete hidden directories, of a save or a deletion that did not end, and an old RESUME."""
    for left in Path(directory).glob(".step_*"):
        if HIDDEN.fullmatch(left.name) and not left.is_symlink():
            try:
                shutil.rmtree(left)
            except OSError as error:
                say_once(f"{left} can't be deleted ({error.strerror}) and stays")
    resume = Path(directory) / "RESUME"
    if resume.exists() and NAME.fullmatch(resume.read_text(errors="replace").strip()):
        resume.unlink()


# --- the tokenizer --------------------------------------------------------------------------------


@functools.cache
def tokenizer_files(name):
    """The files of a tokenizer, {name: bytes}; none for `bytes`, which is made of code."""
    if name == "bytes":
        return {}
    with tempfile.TemporaryDirectory() as folder:
        load_tokenizer(name).save_pretrained(folder)
        defaults = Path(name) / "generation_config.json"  # an export hands them on
        if defaults.exists():
            shutil.copy(defaults, folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def write_tokenizer(name, directory):
    """Put a copy of the tokenizer into a checkpoint; {file: sha256}."""
    digests = {}
    for file, content in tokenizer_files(name).items():
        (directory / "tokenizer").mkdir(exist_ok=True)
        (directory / "tokenizer" / file).write_bytes(content)
        digests[f"tokenizer/{file}"] = hashlib.sha256(content).hexdigest()
    return digests
