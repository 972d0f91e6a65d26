"""What asks a run to end early: a signal, a file named `stop` in the run folder, or the death of its launcher.

Nothing is done in a signal handler but to take note; training looks at `Stopping.wanted` at every micro-step, while it
waits for data, evaluates, saves and starts, and the ranks agree on it.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from pathlib import Path

SAVED_RUN_ME_AGAIN = 85
"""Exit code of a run that ended early and saved what it had."""

SECONDS_BETWEEN_LOOKS = 0.5  # at the stop file and the launchers
LAUNCHERS = ("deepspeed", "torchrun", "torch.distributed.run", "torch/distributed/run")


class Stopping:
    """Why this process should end, as far as it knows; `reasons` is empty while it should not."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.run: Path | None = None
        self.at_once = True
        """End the process where it stands: while the ranks still meet, nothing can be agreed on and nothing is lost."""
        self._launchers = launchers()
        self._looked_at = 0.0
        # Python runs handlers only between two steps of the main thread, which may wait in a library for minutes;
        # the wake-up socket hears at once.
        heard, told = socket.socketpair()
        told.setblocking(False)
        signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
        self._sockets = heard, told
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda *_: None)

    def _listen(self) -> None:
        while True:
            for number in self._sockets[0].recv(16):
                if number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                    self.reasons.append(signal.Signals(number).name)
                    if self.at_once:
                        os._exit(SAVED_RUN_ME_AGAIN)

    def watch_file(self, run: Path) -> None:
        """Looks for the file `stop` in this run folder from now on; one rank is enough."""
        self.run = run

    @property
    def wanted(self) -> bool:
        """Whether anything asks this process to end."""
        now = time.monotonic()
        if not self.reasons and now - self._looked_at > SECONDS_BETWEEN_LOOKS:
            self._looked_at = now
            if self.run is not None and (self.run / "stop").exists():
                self.reasons.append("the stop file")
            dead = [name for pid, (name, began) in self._launchers.items() if _process(pid)[1:] != (name, began)]
            if dead:
                self.reasons.append(f"the death of its launcher, {dead[0]}")
        return bool(self.reasons)

    def take_file(self) -> None:
        """Removes the stop file, so that the same command goes on next time: a reason, even if a signal came first."""
        if self.run is not None and (self.run / "stop").exists():
            (self.run / "stop").unlink()
            if "the stop file" not in self.reasons:
                self.reasons.append("the stop file")


def launchers() -> dict[int, tuple[str, str]]:
    """The processes above this one that launched it (deepspeed, torchrun): pid -> (name, when it began).

    A shell that ends, as after `nohup`, is no reason to stop. Under Slurm, slurmstepd ends the tasks itself.
    """
    found = {}
    pid = os.getppid()
    while pid > 1:
        parent, name, began = _process(pid)
        if name:
            found[pid] = (name, began)
        pid = parent
    return found


def _process(pid: int) -> tuple[int, str, str]:
    """(parent, name if it is a launcher, when it began) of a process; zeros and blanks if there is none."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0, "", ""
    if fields[0] == "Z":
        return 0, "", ""
    is_python = "python" in Path(words[0]).name
    name = next((name for name in LAUNCHERS if is_python and any(name in word for word in words[1:4])), "")
    return int(fields[1]), name, fields[19]


def how_to_stop() -> str:
    """How to end this run politely, for status.json: what the launcher above it lets through."""
    if "SLURM_PROCID" in os.environ and not launchers():
        return "SIGTERM or SIGUSR1 to the job step (scancel --signal), or a file named stop in the run folder; exit 85"
    if launchers():
        return (
            "SIGTERM to the process group, or a file named stop in the run folder; the launcher dies of SIGUSR1 and "
            "returns an exit code of its own"
        )
    return "SIGINT, SIGTERM or SIGUSR1, or a file named stop in the run folder; exit 85"
