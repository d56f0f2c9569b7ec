"""Ctrl-C ends a script in one line with exit code 130, whatever it is doing: importing, compiling or computing.

A thread waits for the signal. A handler would run only once XLA returns, which may take a minute, and an exception
that leaves XLA's threads at work can end the process in a segmentation fault.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

kept = ""
"""What an interrupted script leaves behind, in words that follow "interrupted"."""


def end_in_one_line() -> None:
    """Starts the thread. A script calls this before its other imports; no test does."""
    # Threads that start later inherit the mask, so that the signal waits for this one.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    threading.Thread(target=_end, daemon=True).start()


def _end() -> None:
    signal.sigwait({signal.SIGINT})
    os.write(2, f"\n{os.path.basename(sys.argv[0])}: interrupted{kept}\n".encode())
    os._exit(130)
