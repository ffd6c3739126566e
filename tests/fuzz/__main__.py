# SPDX-License-Identifier: MIT
"""Fuzz for some time, or judge one input; see the docstring of the package."""

from __future__ import annotations

import argparse
import base64
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.fuzz import corpus

MAX_INPUT = 512
"""Bytes of an input: enough for every limit, short enough to be read by a person."""

MAX_SECONDS = 10
"""For one input; one takes some 0.1 ms."""

MAX_RSS = 512
"""MiB of the whole process, the fuzzer's own 45 included."""

DONE = re.compile(r"^Done (\d+) runs in (\d+) second", re.MULTILINE)
COVERED = re.compile(r"cov: (\d+) ft: (\d+)")
PEAK = re.compile(r"^stat::peak_rss_mb:\s+(\d+)", re.MULTILINE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit with 0 where every promise held."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Any server at all, against nbdd.")
    parser.add_argument("--runs", type=int, default=0, metavar="N", help="judge so many inputs")
    parser.add_argument("--seconds", type=int, default=0, metavar="S", help="or go on for so long")
    parser.add_argument("--seed", type=int, default=0, help="to do the same again (default: never the same)")
    parser.add_argument("--keep", action="store_true", help="keep what reaches something new in corpus.txt")
    parser.add_argument("--replay", metavar="INPUT", help="judge this one input, in base64, and show how it ends")
    options = parser.parse_args(arguments)
    if options.replay is not None:
        return _replay(base64.b64decode(options.replay, validate=True))
    if not (options.runs or options.seconds):
        parser.error("say how long: --runs N or --seconds S")
    if importlib.util.find_spec("atheris") is None:
        print("The fuzzer is atheris, and it is not installed: 'make deps' does that.", file=sys.stderr)
        return 2
    limits = [f"-runs={options.runs or -1}", f"-max_total_time={options.seconds}", f"-seed={options.seed}"]
    with tempfile.TemporaryDirectory(prefix="nbdd-fuzz-") as name:
        return _fuzz(Path(name), limits, keep=options.keep)


def _replay(data: bytes) -> int:
    from tests.fuzz.script import judge_script, lower_limits  # noqa: PLC0415 - the engine must be the first to import

    lower_limits()
    print(repr(judge_script(data)))
    return 0


def _fuzz(work: Path, limits: Sequence[str], *, keep: bool) -> int:
    found, crash = work / "found", work / "crash"
    found.mkdir()
    corpus.unpack(found)
    bounds = [f"-max_len={MAX_INPUT}", f"-timeout={MAX_SECONDS}", f"-rss_limit_mb={MAX_RSS}"]
    status, said = _engine(*limits, *bounds, f"-exact_artifact_path={crash}", "-print_final_stats=1", str(found))
    if status or crash.exists():
        print(said)
        if crash.exists():
            print(f"Again: python -m tests.fuzz --replay {base64.b64encode(crash.read_bytes()).decode()}")
        return 1
    runs, seconds = map(int, DONE.findall(said)[-1])
    edges, features = COVERED.findall(said)[-1]
    print(
        f"{runs} executions in {seconds} s, {runs // max(seconds, 1)} a second, at most {PEAK.findall(said)[-1]} MiB; "
        f"{edges} edges and {features} features of the code reached; every promise held."
    )
    if keep:
        smallest = work / "smallest"
        smallest.mkdir()
        status, said = _engine("-merge=1", *bounds, str(smallest), str(found))
        if status:
            print(said)
            return 1
        corpus.pack(smallest)
        print(f"{corpus.FILE} holds {len(corpus.load())} inputs now.")
    return 0


def _engine(*arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "tests.fuzz.engine", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    return done.returncode, done.stdout.decode(errors="replace")


if __name__ == "__main__":
    sys.exit(main())
