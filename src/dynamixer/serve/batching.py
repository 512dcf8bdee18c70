"""A bounded door, and batches that form by themselves behind it."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from dynamixer.serve.settings import Refused

Item = TypeVar("Item")
Result = TypeVar("Result")


class Gate:
    """Counts what is inside and lets no more in than `capacity`: nothing behind it can grow."""

    def __init__(self, capacity: int):
        self.capacity, self.inside, self.most = capacity, 0, 0

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Be inside for a while.

        Raises:
            Refused: 429, it is full.
        """
        if self.inside >= self.capacity:
            raise Refused(429, f"{self.capacity} requests are waiting already: try again.", retry_after=1)
        self.inside += 1
        self.most = max(self.most, self.inside)
        try:
            yield
        finally:
            self.inside -= 1


class Batcher(Generic[Item, Result]):
    """Hands items to `work` in lists of at most `size`: whatever has come while the list before was worked on.

    A list that fails is tried again one by one, so that no item fails for its neighbours.
    """

    def __init__(self, work: Callable[[list[Item]], Awaitable[list[Result]]], size: int):
        self.work, self.size = work, size
        self.waiting: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self._wake = asyncio.Event()

    async def __call__(self, item: Item) -> Result:
        """What became of one item."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self.waiting.append((item, future))
        self._wake.set()
        return await future

    async def run(self) -> None:
        """Work for ever; a task of the server's."""
        while True:
            await self._wake.wait()
            taken = [self.waiting.popleft() for _ in range(min(self.size, len(self.waiting)))]
            if not self.waiting:
                self._wake.clear()
            wanted = [(item, future) for item, future in taken if not future.done()]  # others were given up meanwhile
            if wanted:
                await self._work(wanted)

    async def _work(self, wanted: list[tuple[Item, "asyncio.Future[Result]"]]) -> None:
        try:
            results = await self.work([item for item, _ in wanted])
            for (_, future), result in zip(wanted, results, strict=True):
                if not future.done():
                    future.set_result(result)
        except Exception as error:
            if len(wanted) > 1:
                for pair in wanted:
                    await self._work([pair])
            elif not wanted[0][1].done():
                wanted[0][1].set_exception(error)
