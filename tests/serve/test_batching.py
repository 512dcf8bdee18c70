"""The gate and the batches behind it."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest

from dynamixer.serve.batching import Batcher, Gate
from dynamixer.serve.settings import Refused


def run(scenario):
    async def whole():
        return await asyncio.wait_for(scenario(lambda batcher: asyncio.create_task(batcher.run())), 10)

    with ThreadPoolExecutor(1) as thread:  # Playwright's loop may run in this one
        return thread.submit(asyncio.run, whole()).result()


def test_each_gets_its_own_answer_from_batches_that_form_by_themselves():
    sizes = []

    async def work(items):
        sizes.append(len(items))
        await asyncio.sleep(0.01)
        return [item * 10 for item in items]

    async def scenario(start):
        batcher = Batcher(work, 8)
        start(batcher)
        return await asyncio.gather(*(batcher(i) for i in range(30)))

    assert run(scenario) == [10 * i for i in range(30)]
    assert max(sizes) == 8
    assert sum(sizes) == 30


def test_a_lone_item_waits_for_nobody_and_what_was_given_up_is_left_out():
    seen = []

    async def scenario(start):
        given_up = asyncio.Event()

        async def work(items):
            seen.append(list(items))
            await given_up.wait()
            return items

        batcher = Batcher(work, 8)
        start(batcher)
        first = asyncio.create_task(batcher("first"))
        await asyncio.sleep(0.01)
        second, third = asyncio.create_task(batcher("second")), asyncio.create_task(batcher("third"))
        await asyncio.sleep(0.01)
        second.cancel()
        given_up.set()
        await asyncio.gather(first, third)

    run(scenario)
    assert seen == [["first"], ["third"]]


def test_one_that_fails_does_not_fail_its_neighbours():
    async def work(items):
        if "bad" in items:
            raise RuntimeError("bad")
        return items

    async def scenario(start):
        batcher = Batcher(work, 8)
        start(batcher)
        return await asyncio.gather(*(batcher(item) for item in ("a", "bad", "b")), return_exceptions=True)

    a, bad, b = run(scenario)
    assert (a, str(bad), b) == ("a", "bad", "b")


def test_the_gate_holds():
    gate = Gate(2)
    with gate.admit(), gate.admit():
        with pytest.raises(Refused, match="2 requests are waiting already") as caught, gate.admit():
            pass
        assert (caught.value.status, caught.value.headers) == (429, {"Retry-After": "1"})
    with gate.admit():
        assert (gate.inside, gate.most) == (1, 2)
