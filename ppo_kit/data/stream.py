"""Rows of a file too large for memory, again and again, with a cursor that can be saved."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Generic, TypeVar

from .bad_rows import BadRow, RowReport
from .order import permutation
from .rows import Source, decode_row, place, read_raw, source_name

logger = logging.getLogger(__name__)
Item = TypeVar("Item")


class Stream(Iterator[Item], Generic[Item]):
    """An endless iterator over the encoded rows of a file: epoch after epoch, in memory one buffer of rows.

    Args:
        source: see :func:`ppo_kit.data.read_rows`; rows from memory must be iterable more than once.
        encode: row to item, raising :class:`ppo_kit.data.BadRow`; for instance ``Encoder(...).prompt``.
        report: decides about bad rows and counts over all epochs, as in ``read_rows``; share it with the
            encoder. Where it stops at a bad row, the next item is the row after it. The log has it after each
            epoch.
        shuffle_buffer: in rows. The file is cut into blocks of this many, and each is shuffled by
            ``(seed, epoch, block)``: rows do not move between blocks, so shuffle a file that is sorted by
            topic beforehand. 0 keeps the file's order.
        rank, world_size: rank r of w reads rows r, r + w, r + 2w, …: no row twice, none left out; the ranks'
            shares differ by one row at most.

    Raises:
        BadRow: the report stops at bad rows.
        ValueError: a whole epoch has no usable row for this rank.

    >>> stream = Stream(["a", "b", "c"], str.upper)
    >>> next(stream), stream.take(3)
    ('A', ['B', 'C', 'A'])
    >>> cursor = stream.state_dict()
    >>> again = Stream(["a", "b", "c"], str.upper)
    >>> again.load_state_dict(cursor)
    >>> stream.take(4) == again.take(4)
    True
    """

    def __init__(
        self,
        source: Source,
        encode: Callable[[Any], Item],
        *,
        report: RowReport | None = None,
        shuffle_buffer: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if isinstance(source, Iterator):
            raise ValueError("source: got an iterator, which ends; needs a file, a list or a dataset")
        if shuffle_buffer < 0:
            raise ValueError(f"shuffle_buffer: got {shuffle_buffer}, needs 0 or more rows")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: got {rank}, needs 0 to world_size - 1 = {world_size - 1}")
        self.source, self.encode = source, encode
        self.report = RowReport() if report is None else report
        self._settings = {
            "shuffle_buffer": shuffle_buffer,
            "seed": seed,
            "rank": rank,
            "world_size": world_size,
        }
        self.epoch = 0
        self._position = 0  # rows of this rank's share that are done in this epoch, bad ones too
        self._running: Iterator[Item] | None = None

    def take(self, size: int) -> list[Item]:
        """The next ``size`` items, across the end of an epoch where it comes."""
        return list(islice(self, size))

    def __next__(self) -> Item:
        if self._running is None:
            self._running = self._run()
        try:
            return next(self._running)
        except BaseException:
            # A generator that raised is over; the next call starts another one behind the row that raised.
            self._running = None
            raise

    def state_dict(self) -> dict[str, int]:
        """The cursor: where the next item comes from, and the settings of the order. Plain integers."""
        return {"epoch": self.epoch, "position": self._position, **self._settings}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where the stream that gave ``state`` was. The rows before are read over, not parsed.

        Raises:
            ValueError: the state is of a stream with other settings, under which it is another order.
        """
        wrong = {name: state.get(name) for name, value in self._settings.items() if state.get(name) != value}
        if wrong:
            raise ValueError(f"state: got {wrong}, this stream has {self._settings}")
        self.epoch, self._position = state["epoch"], state["position"]
        self._running = None

    def _run(self) -> Iterator[Item]:
        while True:
            usable = self._position > 0
            for line, raw in self._rest_of_epoch():
                self._position += 1
                self.report.rows += 1
                try:
                    item = self.encode(decode_row(raw))
                except BadRow as error:
                    self.report.bad(error.at(place(self.source, line)))
                else:
                    usable = True
                    yield item
            if not usable:
                raise ValueError(f"{source_name(self.source)}: no usable row; {self.report}")
            self.epoch, self._position = self.epoch + 1, 0
            if self.report.skipped or self.report.notes:
                logger.warning("after %d epochs: %s", self.epoch, self.report)

    def _rest_of_epoch(self) -> Iterator[tuple[int, Any]]:
        settings = self._settings
        size = settings["shuffle_buffer"] or 1
        block, done = divmod(self._position, size)
        share = islice(read_raw(self.source), settings["rank"], None, settings["world_size"])
        share = islice(share, block * size, None)
        while rows := list(islice(share, size)):
            order = permutation(len(rows), settings["seed"], self.epoch, block) if size > 1 else [0]
            yield from (rows[slot] for slot in order[done:])
            block, done = block + 1, 0
