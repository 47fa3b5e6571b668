import time

import pytest

from .in_memory import *


@pytest.mark.parametrize("link", ["none", "100mbit,5ms"])
def test_a(tiny, tmp_path, link):
    c = tiny({"pipeline.stages": 4, "link.link": link, "codec.codec": "int4"})
    t = time.time()
    r = run_reference(c, tmp_path / "r")
    print("ref", time.time() - t)
    t = time.time()
    s = run_in_memory(c, tmp_path / "s")
    print("mem", time.time() - t)
    print(s)
    assert r == s


@pytest.mark.parametrize("at", ["read", "write"])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 11])
def test_b(tiny, tmp_path, n, at):
    c = tiny({"pipeline.stages": 3})
    t = time.time()
    r = run_reference(c, tmp_path / "r")
    print("ref", time.time() - t)
    t = time.time()
    s = run_in_memory(c, tmp_path / "s", cuts={0: [Cut(frame=n, at=at)] * 10, 1: [Cut(frame=n + 1, at=at)] * 10})
    print("mem", time.time() - t)
    print(s.connections, s.sent_bytes)
    assert r == s
