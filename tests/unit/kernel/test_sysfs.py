# SPDX-License-Identifier: MIT
from __future__ import annotations

from pathlib import Path

import pytest

from nbdd.errors import KernelError
from nbdd.kernel.sysfs import Node, find, highest_index, module_loaded, nodes


def make(root: Path, index: int, **files: str) -> Node:
    directory = root / "block" / f"nbd{index}"
    (directory / "queue").mkdir(parents=True)
    for name, text in files.items():
        (directory / name.replace("__", "/")).write_text(text + "\n")
    return Node(index, sysfs=str(root))


def partition(root: Path, index: int, number: int) -> Path:
    directory = root / "block" / f"nbd{index}" / f"nbd{index}p{number}"
    (directory / "holders").mkdir(parents=True)
    (directory / "partition").write_text(f"{number}\n")
    (directory / "dev").write_text(f"43:{number}\n")
    return directory


def test_node_idle_has_no_pid_no_size_and_no_backend(tmp_path: Path) -> None:
    node = make(tmp_path, 0, size="0", ro="0")
    assert (node.path, node.pid, node.bound, node.size, node.backend) == ("/dev/nbd0", None, False, 0, None)


def test_node_bound_reports_sizes_in_bytes(tmp_path: Path) -> None:
    files = {
        "pid": "42",
        "size": "2048",
        "backend": "backup",
        "ro": "1",
        "diskseq": "17",
    }
    node = make(tmp_path, 1, **files, queue__logical_block_size="4096", queue__io_timeout="30000")
    assert (node.pid, node.size, node.backend, node.read_only) == (42, 1 << 20, "backup", True)
    assert (node.diskseq, node.block_size, node.io_timeout) == (17, 4096, 30000)


def test_node_gone_reports_nothing(tmp_path: Path) -> None:
    node = Node(9, sysfs=str(tmp_path))
    assert not node.exists
    assert (node.pid, node.size, node.backend, node.partitions(), node.statistics()) == (None, 0, None, [], {})


def test_node_io_timeout_is_written_in_milliseconds(tmp_path: Path) -> None:
    node = make(tmp_path, 0, queue__io_timeout="")
    node.set_io_timeout(1000)
    assert node.io_timeout == 1000


def test_node_io_timeout_of_a_gone_device_is_an_error_and_no_new_file(tmp_path: Path) -> None:
    node = make(tmp_path, 0)
    with pytest.raises(KernelError, match="/dev/nbd0 can't be set to 1000 ms"):
        node.set_io_timeout(1000)
    assert not (tmp_path / "block" / "nbd0" / "queue" / "io_timeout").exists()


def test_node_partitions_are_sorted_by_number(tmp_path: Path) -> None:
    node = make(tmp_path, 0, dev="43:0")
    for number in (10, 2, 1):
        partition(tmp_path, 0, number)
    (tmp_path / "block" / "nbd0" / "nbd0stray").mkdir()
    assert node.partitions() == ["nbd0p1", "nbd0p2", "nbd0p10"]
    assert node.devices() == {"nbd0": "43:0", "nbd0p1": "43:1", "nbd0p2": "43:2", "nbd0p10": "43:10"}


def test_node_statistics_have_the_kernels_names_and_order(tmp_path: Path) -> None:
    node = make(tmp_path, 0, stat=" ".join(str(number) for number in range(1, 18)))
    statistics = node.statistics()
    assert statistics["read-requests"] == 1
    assert statistics["write-sectors"] == 7
    assert statistics["in-flight"] == 9
    assert statistics["flush-milliseconds"] == 17


def test_nodes_are_sorted_by_index_and_nothing_else_is_among_them(tmp_path: Path) -> None:
    for index in (10, 2):
        make(tmp_path, index)
    for name in ("nbdx", "sda", "nbd"):
        (tmp_path / "block" / name).mkdir()
    assert [node.index for node in nodes(sysfs=str(tmp_path))] == [2, 10]


def test_find_matches_the_identifier_of_bound_devices_only(tmp_path: Path) -> None:
    make(tmp_path, 0, backend="backup", pid="1")
    make(tmp_path, 1, backend="backup")
    make(tmp_path, 2, backend="backup2", pid="1")
    assert [node.index for node in find("backup", sysfs=str(tmp_path))] == [0]


def test_module_loaded_whether_built_in_or_loaded(tmp_path: Path) -> None:
    assert not module_loaded(sysfs=str(tmp_path))
    (tmp_path / "module" / "nbd").mkdir(parents=True)
    assert module_loaded(sysfs=str(tmp_path))


def test_highest_index_follows_the_modules_max_part(tmp_path: Path) -> None:
    assert highest_index(sysfs=str(tmp_path)) == (1 << 20) - 1
    parameters = tmp_path / "module" / "nbd" / "parameters"
    parameters.mkdir(parents=True)
    (parameters / "max_part").write_text("16\n")
    assert highest_index(sysfs=str(tmp_path)) == 32767
