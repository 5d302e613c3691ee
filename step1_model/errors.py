"""A wrong call gets one line on standard error that says what to do, and a non-zero exit."""

import argparse
import errno
import os
import re
import signal
import sys
import tempfile
from pathlib import Path


class UserError(Exception):
    """Its text names the flag, the values and the remedy."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse, but a wrong flag is a `UserError` like any other wrong call."""

    def error(self, message):
        raise UserError(f"{message} (see --help)")


def in_one_line(error):
    """What another library's exception says, or the one behind it, cut to fit into our line."""
    error = error.__cause__ or error
    return " ".join(str(error).split())[:300] or type(error).__name__


def note(text):
    """Tell the reader what was decided for them."""
    print(f"note: {text}", flush=True)


def check_writable(flag, path):
    """Raise UserError unless a flag's file, where one is named, can be written."""
    try:
        if path is not None:
            open(path, "a").close()
    except OSError as error:
        raise UserError(f"{flag} {path!r}: {error.strerror}; name a file to write") from None


def check_folder(flag, path):
    """Raise UserError unless a flag's folder can be made, and files in it."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"{flag} {path!r}: {error.strerror}; name a folder to write to") from None


def stop(error):
    """Print the one line and exit with code 2, before other libraries add words of their own."""
    print(end="", flush=True)  # what was said before
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in f"error: {error}")
    print(line, file=sys.stderr, flush=True)
    os._exit(2)


def interrupted(number, frame):
    """Ctrl-C or SIGUSR1: one line and the exit code that a shell would give."""
    line = f"error: stopped by {signal.Signals(number).name}\n"
    os.write(2, line.encode())  # not by print, which may be what was interrupted
    os._exit(128 + number)


if Path(sys.argv[0]).absolute().parent == Path(__file__).absolute().parent:  # not in a test
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, interrupted)


def run(main, parse_args):
    """Run a program on its command line; what is wrong with that, or with a file, is one line."""
    if sys.stdout is not None:  # as where it was closed
        sys.stdout = Output(sys.stdout)
    full = os.strerror(errno.ENOSPC)
    try:
        main(parse_args(sys.argv[1:]))
    except UserError as error:
        stop(error)
    except Exception as error:  # of a library, such as the compiler that writes to TMPDIR
        if isinstance(error, OSError) and error.filename:
            stop(UserError(f"{error.filename}: {error.strerror}"))
        if full in str(error):
            where = tempfile.gettempdir()
            stop(UserError(f"{full}: make room in {where}, or set TMPDIR to another folder"))
        raise


class Output:
    """Standard output that a run can do without.

    Where nobody reads it any more, or its disk is full, the run goes on in silence.
    """

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self.tried(lambda: self.stream.write(text))

    def flush(self):
        self.tried(self.stream.flush)

    def tried(self, act):
        try:
            act()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            if error.errno == errno.ENOSPC:
                os.write(2, f"note: standard output: {error.strerror}; the run goes on\n".encode())


def whole_number(text, least):
    """argparse type: an integer of at least `least`."""
    if not re.fullmatch("[0-9]+", text) or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} or more")
    return int(text)


def positive_int(text):
    """argparse type: 1, 2, 3, …"""
    return whole_number(text, 1)


def non_negative_int(text):
    """argparse type: 0, 1, 2, …"""
    return whole_number(text, 0)


def number(text, good, rule):
    """argparse type: a float for which good(value) is true; never so for `nan`."""
    try:
        if good(float(text)):
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a number {rule}")


def non_negative_float(text):
    """argparse type: a number of at least 0."""
    return number(text, lambda value: value >= 0, "of 0 or more")


def positive_float(text):
    """argparse type: a number above 0; `inf` is one."""
    return number(text, lambda value: value > 0, "above 0")
