"""How much memory a call needs beyond what is there."""

import json
import os
import tempfile
from itertools import accumulate
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from dynamixer.speed.clock import Call


def peak_mib(call: Call) -> float:
    """MiB of the tensors that a call makes and holds at once, at most; other memory, such as a library's own, is not seen.

    A first call, which does not count, makes what is made once.
    """
    call()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's profiler tells of its own starts and stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    return max(accumulate((size for _, size in changes), initial=0)) / 2**20
