"""Progress bars: one line that is rewritten on a terminal, lines in a log file."""

import io

import pytest

from megatrain.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A list whose last entry is the time in seconds that tqdm reads."""
    times = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: times[-1])
    return times


def run_bar(stream, clock, *, times, total=None):
    with progress_bar(total, unit="B", description="read", stream=stream) as bar:
        for time in times:
            clock.append(time)
            bar.set_postfix_str("5.0M tokens", refresh=False)
            bar.update(20_000_000)
    return stream.getvalue() if stream else None


def test_log_has_a_line_every_ten_seconds_and_one_at_the_end(clock):
    text = run_bar(io.StringIO(), clock, times=[5, 20, 21, 29, 31, 32])
    assert text.splitlines() == [
        "read: 40.0MB [00:20, 2.00MB/s, 5.0M tokens]",
        "read: 100MB [00:31, 3.23MB/s, 5.0M tokens]",
        "read: 120MB [00:32, 3.75MB/s, 5.0M tokens]",
    ]


def test_terminal_shows_one_line_that_is_rewritten(clock):
    text = run_bar(Terminal(), clock, times=[0.1, 0.6, 0.7, 1.2], total=80_000_000)
    assert text.count("\r") >= 3
    assert text.count("\n") == 1
    assert "100%" in text
    assert "80.0M/80.0M" in text


@pytest.mark.parametrize("stream", [None, io.StringIO(), Terminal()])
def test_short_work_and_no_stream_show_nothing(clock, stream):
    assert run_bar(stream, clock, times=[0.1, 0.2]) in (None, "")
