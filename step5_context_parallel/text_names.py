"""From `--dataset_name` to the names of texts, each with its part of a mix."""

import json
import math
import re
from fractions import Fraction
from pathlib import Path

from errors import UserError
from files import local_files, shown
from prepared import choose_prepared, read_metadata

WEIGHT = re.compile(r"[0-9]*\.?[0-9]+")
MIX_BYTES = 2**16  # a JSON file that is larger is a text
LONGEST_PERIOD = 10_000  # sequences after which a mix repeats


def choose_texts(args):
    """Make `args.texts`, {name: its part of each period}, of `--dataset_name`; raises UserError.

    Where the texts were prepared, their tokenizer becomes that of the run.
    """
    weights = weights_of(args.dataset_name)
    for name in weights:
        if read_metadata(name) is None:
            local_files(name)  # raises for a path that is not there
    args.texts = parts_of(choose_prepared(args, weights), args.dataset_name)


def parts_of(weights, name):
    """{name of a text: how many sequences of each period}; raises UserError for odd weights."""
    shares = [weight / sum(weights.values()) for weight in weights.values()]
    period = math.lcm(*(share.denominator for share in shares))
    if period > LONGEST_PERIOD:
        raise UserError(
            f"--dataset_name {shown(name)}: with these weights a mix repeats only after more than "
            f"{LONGEST_PERIOD} sequences: give them fewer digits"
        )
    return dict(zip(weights, (int(share * period) for share in shares), strict=True))


def weights_of(name):
    """{name of a text: weight, a Fraction} of a mix; {name: 1} of any other name.

    A mix is "a:0.7,b:0.3", or a JSON file with {"a": 0.7, "b": 0.3}. Raises UserError.
    """
    flag = f"--dataset_name {shown(name)}"
    try:
        path = Path(name).expanduser()
        there = path.exists()
    except (OSError, RuntimeError):  # too long for a path; ~ of a user who has no home
        path, there = Path(name), False
    pairs = pairs_in(path)
    if pairs is None and not there:
        cut = [part.rpartition(":") for part in name.split(",")]
        weighted = [bool(WEIGHT.fullmatch(weight)) for _, _, weight in cut]
        if any(weighted) and not all(weighted):
            raise UserError(f"{flag}: give each text of the mix a weight, as in a.txt:0.7,b/:0.3")
        pairs = [(text, Fraction(weight)) for text, _, weight in cut] if all(weighted) else None
    if pairs is None:
        return {name: Fraction(1)}
    weights = dict(pairs)
    if len(weights) < len(pairs):
        raise UserError(f"{flag}: name each text once, with one weight")
    if "" in weights or min(weights.values()) <= 0:
        raise UserError(f"{flag}: give each text a name and a weight above 0")
    return weights


def pairs_in(path):
    """The (name, weight) of a JSON file that describes a mix; None for any other file."""
    try:
        if path.suffix != ".json" or path.stat().st_size > MIX_BYTES:
            return None
        # An object becomes a tuple of pairs, so that a name that is there twice stays twice.
        kinds = {"parse_float": Fraction, "parse_int": Fraction, "object_pairs_hook": tuple}
        found = json.loads(path.read_bytes(), **kinds)
    except (OSError, RecursionError, ValueError):
        return None  # a text, if anything: its reader says what is wrong
    if not isinstance(found, tuple) or not all(isinstance(w, Fraction) for _, w in found):
        return None
    return [*found] or None
