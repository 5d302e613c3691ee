"""One run, one directory: a file that names the process that writes there.

    DIR/LOCK    {"host": …, "boot": …, "processes": …, "process": …, "started": …, "token": …}

The holder renews the file's time every 10 s, and looks at the file before it gives a checkpoint its
name. The lock of a process that is gone is taken over: at once where that can be seen, on the same
host; elsewhere after a minute without a sign of life.
"""

import contextlib
import fcntl
import functools
import json
import os
import secrets
import socket
import subprocess
import threading
import time
from pathlib import Path

from errors import RANK, UserError, note
from run_directory import checkpoints

RENEWED, SILENT = 10, 60  # seconds between signs of life; seconds without one


def alone(main):
    """Run main(args) while the first rank holds the lock of `args.checkpoint_dir`, if any."""

    @functools.wraps(main)
    def wrapped(args):
        if args.checkpoint_dir is None or RANK > 0:
            return main(args)
        args.lock = Lock(args.checkpoint_dir)
        try:
            args.lock.take()
            if checkpoints(args.checkpoint_dir) != args.found:
                raise UserError(
                    f"--checkpoint_dir {args.checkpoint_dir}: another run has just written there; "
                    "give the same command again"
                )
            return main(args)
        finally:
            args.lock.release()

    return wrapped


class Lock:
    """Names this process in a directory, from `take` to `release`."""

    def __init__(self, directory):
        self.path = Path(directory) / "LOCK"
        own = {"process": os.getpid(), "started": start_of(os.getpid())}
        self.own = {**this_host(), **own, "token": secrets.token_hex(4)}  # of this run alone
        self.released = threading.Event()

    def take(self):
        """Write our name; raises UserError where another process is alive, or may not write."""
        try:
            silent = None  # the time of a lock that was not renewed while we waited
            while not self.taken(silent):
                silent = self.wait_for_a_sign()
            self.check()  # where a file system has no `flock` another run may have done the same
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror}; free or name another place") from None
        threading.Thread(target=self.renew, daemon=True).start()

    def taken(self, silent):
        """Take the lock if it is free; whether it was."""
        with one_at_a_time(self.path.parent):
            holder, renewed = read(self.path)
            free = holder is None or is_gone(holder) or renewed == silent
            if free:
                aside = self.path.with_name(f".LOCK-{self.own['token']}")
                try:
                    aside.write_text(json.dumps(self.own) + "\n")
                    aside.rename(self.path)
                finally:
                    aside.unlink(missing_ok=True)
        if not free and (silent is not None or is_asked_here(holder)):
            raise UserError(self.refusal(holder))
        return free

    def wait_for_a_sign(self):
        """Wait a minute, or until another host renews its lock; returns the time it had before."""
        holder, renewed = read(self.path)
        note(f"{self.path} is of {name_of(holder)}: waiting {SILENT} s for a sign of life")
        deadline = time.monotonic() + SILENT
        while time.monotonic() < deadline and read(self.path)[1] == renewed:
            time.sleep(min(1, SILENT / 10))
        return renewed or 0  # 0: there is no lock any more; None is for the first call of taken

    def refusal(self, holder):
        return (
            f"--checkpoint_dir {self.path.parent}: {name_of(holder)} writes there; wait until it "
            "has ended, or name another directory"
        )

    def renew(self):
        while not self.released.wait(RENEWED):
            with contextlib.suppress(OSError):
                if read(self.path)[0] == self.own:
                    os.utime(self.path)

    def check(self):
        """Raise UserError unless the lock is still ours."""
        holder, _ = read(self.path)
        if holder != self.own:
            raise UserError(self.refusal(holder))

    def release(self):
        self.released.set()
        with contextlib.suppress(OSError):
            if read(self.path)[0] == self.own:
                self.path.unlink()


def read(path):
    """(holder, time) of a lock: None without one; {} where it can't be understood."""
    try:
        renewed = path.stat().st_mtime_ns
        holder = json.loads(path.read_text())
    except FileNotFoundError:
        return None, None
    except (ValueError, RecursionError):
        holder = {}
    return holder if isinstance(holder, dict) else {}, renewed


def this_host():
    """What tells hosts apart, boots of one host, and containers, which number processes anew."""
    processes = "/proc/self/ns/pid"
    return {
        "host": f"{socket.gethostname()} {text_of('/etc/machine-id')}",
        "boot": text_of("/proc/sys/kernel/random/boot_id"),
        "processes": os.readlink(processes) if os.path.lexists(processes) else "",
    }


def text_of(path):
    """What a small file says; nothing where it can't be read."""
    try:
        return Path(path).read_text(errors="replace").strip()
    except (OSError, ValueError):
        return ""


def start_of(process):
    """When a process began, as text; None if there is no such process, or only its remains."""
    if text_of("/proc/self/stat"):  # Linux: fields[0] is the state, fields[19] the start
        fields = text_of(f"/proc/{process}/stat").rpartition(")")[2].split()
        return fields[19] if fields and fields[0] not in "ZX" else None
    command = ["ps", "-o", "lstart=", "-p", str(process)]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def is_asked_here(holder):
    """Whether one can see from here if a holder's process is there."""
    known = {"process", "started", "host"} <= holder.keys()
    return known and all(holder.get(key) == value for key, value in this_host().items())


def is_gone(holder):
    """Whether a holder has certainly ended: its host was started anew, or has no such process."""
    if is_asked_here(holder):
        return start_of(holder["process"]) != holder["started"]
    here = this_host()
    same = text_of("/etc/machine-id") and holder.get("host") == here["host"]
    return bool(same) and holder.get("boot") != here["boot"]


def name_of(holder):
    """A holder in words."""
    if not holder:
        return "another run"
    return f"process {holder.get('process')} on {(str(holder.get('host')).split() or '?')[0]}"


@contextlib.contextmanager
def one_at_a_time(directory):
    """Let no other process of this host look and write at the same time."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no such locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
