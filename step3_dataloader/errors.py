"""A wrong call gets one line on standard error that says what to do, and a non-zero exit."""

import argparse
import os
import sys
import time

RANK = int(os.environ.get("RANK", 0))


class UserError(Exception):
    """Its text names the flag, the values and the remedy."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse, but a wrong flag is a `UserError` like any other wrong call."""

    def error(self, message):
        raise UserError(f"{message} (see --help)")


def first_line(error):
    """What another library's exception says, cut to fit into our one line."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def note(text):
    """Tell the reader what was decided for them."""
    if RANK == 0:
        print(f"note: {text}", flush=True)


def stop(error):
    """Print the one line and exit with code 2."""
    if RANK > 0:
        time.sleep(10)  # the launcher ends this rank as soon as the first one has printed and left
        sys.exit(2)
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)


def positive_int(text):
    """argparse type: an integer of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def non_negative_int(text):
    """argparse type: an integer of at least 0."""
    return 0 if text == "0" else positive_int(text)


def positive_float(text):
    """argparse type: a number above 0; `inf` is one, `nan` is not."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def non_negative_float(text):
    """argparse type: a number of at least 0."""
    return 0.0 if text in ("0", "0.0") else positive_float(text)
