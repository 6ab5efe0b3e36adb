# SPDX-License-Identifier: Apache-2.0
"""What a terminal shows while bytes go from one place to another."""

from __future__ import annotations

import io

from mb_ckpt.progress_bar import ProgressBar, size


class Terminal(io.StringIO):
    def isatty(self):
        return True


def drawn(stream):
    return stream.getvalue().split("\r\x1b[K")[1:]


def test_it_shows_share_bytes_speed_and_what_is_left():
    clock = iter([0.0, 10.0, 10.05, 20.0, 20.01]).__next__
    stream = Terminal()
    with ProgressBar("copying", stream=stream, clock=clock) as bar:
        bar(250_000_000, 1_000_000_000)
        bar(260_000_000, 1_000_000_000)  # too soon to be worth a line
        bar(500_000_000, 1_000_000_000)
        bar(1_000_000_000, 1_000_000_000)  # soon, but the last
    assert drawn(stream) == [
        "copying  25% [######..................] 250.0 MB of 1.0 GB, 25.0 MB/s, 00:30 left",
        "copying  50% [############............] 500.0 MB of 1.0 GB, 25.0 MB/s, 00:20 left",
        "copying 100% [########################] 1.0 GB of 1.0 GB, 50.0 MB/s, 00:00 left",
        "",  # the line is taken back
    ]


def test_long_times_have_hours_and_no_bytes_are_all_bytes():
    clock = iter([0.0, 1.0, 2.0]).__next__
    stream = Terminal()
    bar = ProgressBar("copying", stream=stream, clock=clock)
    bar(1, 4000)
    bar(0, 0)
    first, second = drawn(stream)
    assert first.endswith("1 B/s, 1:06:39 left")
    assert second.startswith("copying 100% ")
    assert second.endswith("--:-- left")


def test_what_is_no_terminal_stays_empty():
    stream = io.StringIO()
    with ProgressBar("copying", stream=stream) as bar:
        bar(1, 2)
    assert not stream.getvalue()


def test_sizes_are_in_decimal_units():
    words = [size(n) for n in (0, 999, 1000, 2_500_000, 3e9, 4e12, 5e15)]
    assert words == ["0 B", "999 B", "1.0 KB", "2.5 MB", "3.0 GB", "4.0 TB", "5000.0 TB"]
