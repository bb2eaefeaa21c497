"""Progress of long work, as a terminal and as a pipe see it."""

import os
import pty
import re
import subprocess
import sys
import termios

# Each item takes twenty seconds of the clocks that are read, and none of ours.
WORK = """
import time, tqdm.std
from dspo.progress import progress
now = 0.0
time.monotonic = tqdm.std.time = lambda: now
for item in progress(range(3), 3, "images"):
    now += 20
    print(item)
"""


def test_a_terminal_shows_a_bar_with_the_time_left() -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    done = subprocess.run([sys.executable, "-c", WORK], stdout=subprocess.PIPE, stderr=theirs, text=True, check=True)
    os.close(theirs)
    seen = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert done.stdout == "0\n1\n2\n"
    drawn = re.findall(r"\rimages: +(\d+)%\|[^|]*\| (\d)/3 \[(\d\d:\d\d)<(\d\d:\d\d|\?), +([^]]+)\]", seen)
    assert drawn[0] == ("0", "0", "00:00", "?", "?it/s")
    assert ("33", "1", "00:20", "00:40", "20.00s/it") in drawn
    assert drawn[-1] == ("100", "3", "01:00", "00:00", "20.00s/it")


def test_a_pipe_gets_lines_with_the_time_left() -> None:
    done = subprocess.run([sys.executable, "-c", WORK], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n1\n2\n"
    assert done.stderr.splitlines() == [
        "images: 1/3 [00:20<00:40, 20.00s/it]",
        "images: 2/3 [00:40<00:20, 20.00s/it]",
        "images: 3/3 [01:00<00:00, 20.00s/it]",
    ]
