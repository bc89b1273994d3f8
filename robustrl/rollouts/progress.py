"""A progress bar with an ETA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(label: str, total: int, *, visible: bool) -> Iterator[Callable[[int], None]]:
    """Yields `advance(n)`; shows nothing if not visible.

    Args:
        label: what is being done.
        total: number of units (episodes).
        visible: whether to draw the bar.
    """
    if not visible:
        yield lambda n: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task(label, total=total)
        yield lambda n: progress.advance(task, n)
