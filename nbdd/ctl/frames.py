# SPDX-License-Identifier: MIT
"""Samples of the I/O of all devices, and the screen or the lines that show them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import IO, TYPE_CHECKING, Any

from nbdd.bus.caller.device import DeviceView
from nbdd.ctl.common import order
from nbdd.ctl.rates import Rates, Sample, between
from nbdd.ctl.show import Look, table
from nbdd.errors import NbddError
from nbdd.text import one_line, printable

if TYPE_CHECKING:
    from nbdd.bus.caller.client import ManagerProxy

HEAD = ("NAME", "NODE", "STATE", "CONNS", "rMB/s", "wMB/s", "r/s", "w/s", "r_await", "w_await", "INFLIGHT", "BUSY")
"""The figures under the names that iostat gives them."""
FIGURES = HEAD[3:]
SPARE = ("BUSY", "CONNS", "NODE", "r/s", "w/s", "INFLIGHT")
"""What a narrow terminal goes without, the first one first."""

PATIENCE = 30.0
"""Seconds that nbdd may be away after it has answered once: a restart takes a moment."""


@dataclass(slots=True)
class Frame:
    """One sample of all devices that have a node."""

    span: float
    """Seconds since the sample before."""
    rows: list[tuple[DeviceView, Rates | None]] = field(default_factory=list)
    problem: str = ""
    """Why there are no rows."""

    def cells(self) -> Iterator[tuple[str, ...]]:
        """A row for each device, in the order of HEAD; "" if there is no figure."""
        for device, rates in self.rows:
            start = (printable(device.name), printable(device.node), printable(device.state))
            connections = f"{device.live_connections}/{device.connections}"
            yield (*start, connections, *(_figures(rates) if rates is not None else [""] * (len(FIGURES) - 1)))

    def sum(self) -> str:
        """The totals on one line."""
        known = [rates for _, rates in self.rows if rates is not None]
        read, written = (sum(getattr(rates, key) for rates in known) / 1e6 for key in ("read_bytes", "written_bytes"))
        attached = f"{len(self.rows)} attached" if self.rows else "nothing is attached"
        return self.problem or f"{attached}, reading {read:.1f} MB/s, writing {written:.1f} MB/s"

    def to_json(self) -> dict[str, Any]:
        """The JSON object; times are in seconds, but for `time`, in microseconds since 1970."""
        devices = []
        for device, rates in self.rows:
            figures = asdict(rates) if rates is not None else dict.fromkeys(Rates.__slots__)
            known = {"name": device.name, "node": device.node, "state": device.state}
            connections = {"connections": device.connections, "live-connections": device.live_connections}
            devices.append(known | connections | {key.replace("_", "-"): value for key, value in figures.items()})
        return {"time": time.time_ns() // 1000, "seconds": round(self.span, 3), "devices": devices}


def _figures(rates: Rates) -> list[str]:
    latencies = [f"{each * 1000:.1f}" if each is not None else "" for each in (rates.read_latency, rates.write_latency)]
    return [
        f"{rates.read_bytes / 1e6:.1f}",
        f"{rates.written_bytes / 1e6:.1f}",
        f"{rates.reads:.0f}",
        f"{rates.writes:.0f}",
        *latencies,
        str(rates.in_flight),
        f"{rates.busy:.0%}",
    ]


class Sampler:
    """Samples the devices and keeps the sample before, since a rate needs two."""

    def __init__(self, client: ManagerProxy, clock: Callable[[], float] = time.monotonic) -> None:
        self._client = client
        self._clock = clock
        self._samples: dict[str, Sample] = {}
        self._sampled = self._answered = clock()
        self._begun = False

    async def sample(self) -> Frame:
        """What happened since the sample before. Raises NbddError if nbdd is not there at first, or stays away."""
        now = self._clock()
        frame = Frame(span=now - self._sampled)
        self._sampled = now
        try:
            devices = await self._client.devices()
            frame.rows = await self._rows([device for device in devices if device.node])
        except NbddError as error:
            if not self._begun or now - self._answered > PATIENCE:
                raise
            frame.problem = one_line(str(error))
            return frame
        self._begun, self._answered = True, now
        return frame

    async def _rows(self, devices: list[DeviceView]) -> list[tuple[DeviceView, Rates | None]]:
        import asyncio  # noqa: PLC0415 - comes with the bus

        ordered = sorted(devices, key=lambda device: order(device.name))
        samples = await asyncio.gather(*(self._counters(device.name) for device in ordered))
        found = list(zip(ordered, samples, strict=True))
        rates = [between(self._samples.get(device.name), sample) if sample else None for device, sample in found]
        self._samples = {device.name: sample for device, sample in found if sample}
        return list(zip(ordered, rates, strict=True))

    async def _counters(self, name: str) -> Sample | None:
        try:
            counts = await self._client.statistics(name)
        except NbddError:
            return None  # it was detached meanwhile, or is being detached
        return Sample(self._clock(), counts)


@contextmanager
def display(as_json: bool, stream: IO[str]) -> Iterator[Callable[[Frame], None]]:
    """A place for frames: the screen of a terminal, or lines."""
    look = Look.of(stream)
    if as_json:
        import json  # noqa: PLC0415 - most commands print text

        yield lambda frame: print(json.dumps(frame.to_json()), flush=True)
    elif look.terminal and os.environ.get("TERM") != "dumb":
        with _screen(look) as show:
            yield show
    else:
        yield lambda frame: print(f"{_heading(frame)}\n{_plain(frame, look)}\n", flush=True)


def _heading(frame: Frame) -> str:
    return f"{time.strftime('%H:%M:%S')}  {frame.sum()}"


def _plain(frame: Frame, look: Look) -> str:
    return table(HEAD, frame.cells(), look, right=FIGURES, flexible=HEAD[:1], spare=SPARE)


@contextmanager
def _screen(look: Look) -> Iterator[Callable[[Frame], None]]:
    # rich takes as long to load as all of `nbdctl list`; only the live screen is worth that, so tables are our own.
    from rich.console import Console  # noqa: PLC0415
    from rich.live import Live  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    console = Console(highlight=False)

    def show(frame: Frame) -> None:
        # The terminal may have another size by now. From our own colours, not as markup: a name may have brackets.
        drawn = f"{_heading(frame)}\n\n{_plain(frame, replace(look, width=console.width))}"
        live.update(Text.from_ansi(drawn, no_wrap=True, overflow="ellipsis"), refresh=True)

    with Live(console=console, screen=True, auto_refresh=False) as live:
        yield show
