"""A run's flags as a JSON file: read by --config, written beside what the run leaves."""

import json
from pathlib import Path

from errors import UserError


def parse_with_file(parser, argv):
    """Parse argv after the flags of the file that its --config names; what comes later wins.

    Returns the arguments, and as `flags` all of them by name, as they were given. Raises UserError.
    """
    file = parser.parse_args(argv).config_file
    args = parser.parse_args([*(flags_in(file, parser) if file else []), *argv])
    args.flags = {name: value for name, value in vars(args).items() if name != "config_file"}
    return args


def flags_in(file, parser):
    """The command line that a file stands for: {"tp_size": 2, "sequence_parallel": true}.

    Raises UserError for a file that can't be read, and for wrong flags in it.
    """
    try:
        values = json.loads(Path(file).read_text())
        if not isinstance(values, dict):
            raise UserError("not an object with the names of flags")
        if "config" in values:
            raise UserError("a file can't name another one: leave --config out of it")
        argv = []
        # A command line has no NUL, nor half a character ("\ud800"), for which encode() raises.
        if "\0" in "".join(map(str, values.values())).encode().decode():
            raise UserError("a value with a NUL in it")
        for name, value in values.items():
            if value is not None and value is not False:  # 0 may be given, and 0 == False
                argv.append(f"--{name}" if value is True else f"--{name}={value}")
        parser.parse_args(argv)  # only to see whether it raises
    except (OSError, ValueError, UserError, RecursionError) as error:
        raise UserError(f"--config {file}: {getattr(error, 'strerror', error)}") from None
    return argv


def write_config(args):
    """Write the flags to `config.json` among the checkpoints; raises UserError if that can't be."""
    if args.checkpoint_dir is not None:
        place = Path(args.checkpoint_dir) / "config.json"
        try:
            place.write_text(json.dumps(args.flags, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"{place}: {error.strerror}; name another folder") from None
