"""provisional"""
from __future__ import annotations
import re, random
from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar
T = TypeVar("T")
class LinkError(ValueError): pass
@dataclass(frozen=True, slots=True, kw_only=True)
class LinkProfile:
    rate_bits_per_s: float | None
    latency_s: float
    jitter_s: float = 0.0
    burst_bytes: int = 16384
    @classmethod
    def parse(cls, text: str) -> "LinkProfile":
        if text == "none": return cls(rate_bits_per_s=None, latency_s=0.0)
        rate=None; lat=0.0
        for p in text.split(","):
            m = re.fullmatch(r"([\d.]+)(mbit|ms)", p.strip())
            if not m: raise LinkError(text)
            if m[2]=="mbit": rate=float(m[1])*1e6
            else: lat=float(m[1])/1e3
        return cls(rate_bits_per_s=rate, latency_s=lat)
@dataclass(frozen=True)
class Passage:
    depart_s: float
    arrive_s: float
class Shaper:
    def __init__(self, profile: LinkProfile, *, seed: int = 0) -> None:
        self.profile=profile; self._free=-1e18; self._last=0.0; self.passed_bytes=0
    def wire_free_at(self, eligible_at_s: float) -> float: return max(self._free, eligible_at_s)
    def admit(self, nbytes: int, eligible_at_s: float) -> Passage:
        s=self.wire_free_at(eligible_at_s); r=self.profile.rate_bits_per_s
        d=s+(nbytes*8/r if r else 0); self._free=d if r else -1e18; self.passed_bytes+=nbytes
        a=max(self._last,d+self.profile.latency_s); self._last=a
        return Passage(d,a)
@dataclass
class Entry(Generic[T]):
    item: T; nbytes: int; queued_at_s: float
class WireQueue(Generic[T]):
    def __init__(self) -> None: self._c=deque(); self._t=deque(); self.queued_bytes=0
    def __len__(self): return len(self._c)+len(self._t)
    def push(self,item:T,nbytes:int,*,control:bool,now:float):
        (self._c if control else self._t).append(Entry(item,nbytes,now)); self.queued_bytes+=nbytes
    def peek(self)->Entry[T]|None: return self._c[0] if self._c else (self._t[0] if self._t else None)
    def pop(self)->Entry[T]:
        e=(self._c or self._t).popleft(); self.queued_bytes-=e.nbytes; return e
class BusyMeter:
    def __init__(self): self.busy_s=0.0; self.busy_bytes=0; self._b=None; self._d=0.0
    def begin(self,now): 
        if self._b is None: self._b=now
    def delivered(self,n,now):
        if self._b is not None: self.busy_bytes+=n
    def end(self,now):
        if self._b is not None: self.busy_s+=now-self._b; self._b=None
    def rate_bits_per_s(self): return self.busy_bytes*8/self.busy_s if self.busy_s>0 else None
