"""How much memory is left to this process: the system's own figure, or less where a control group leaves less."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.implementations import skip_unless_served

from peftkernels.backends import cpu

GIB = 1 << 30
MEMINFO = "MemTotal:       32000000 kB\nMemFree:         1000000 kB\nMemAvailable:   16777216 kB\n"


@pytest.fixture
def available(tmp_path: Path) -> Callable[[dict[str, str]], int | None]:
    """What is found when these are the files of /proc and /sys."""
    skip_unless_served("cpu")

    def look(files: dict[str, str]) -> int | None:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        found = cpu._extension().available_memory(str(tmp_path))
        assert found is None or isinstance(found, int)
        return found

    return look


VERSION_2 = {
    "proc/self/cgroup": "0::/user/job\n",
    "sys/fs/cgroup/user/job/memory.max": "max\n",
    "sys/fs/cgroup/user/job/memory.current": f"{GIB}\n",
}
VERSION_1 = {
    "proc/self/cgroup": "9:cpuset:/\n4:cpu,memory:/docker/abc\n1:name=systemd:/x:y\n0::/\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{6 * GIB}\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{2 * GIB}\n",
}
CASES: dict[str, tuple[dict[str, str], int]] = {
    "no control groups": ({}, 16 * GIB),
    "no limit": (VERSION_2, 16 * GIB),
    "limit": ({**VERSION_2, "sys/fs/cgroup/user/job/memory.max": f"{4 * GIB}\n"}, 3 * GIB),
    "limit above the machine's": ({**VERSION_2, "sys/fs/cgroup/user/job/memory.max": f"{99 * GIB}\n"}, 16 * GIB),
    "file cache can be given up": (
        {
            **VERSION_2,
            "sys/fs/cgroup/user/job/memory.max": f"{4 * GIB}\n",
            "sys/fs/cgroup/user/job/memory.stat": f"anon 5\nfile 7\ninactive_file {GIB // 2}\nslab 3\n",
        },
        3 * GIB + GIB // 2,
    ),
    "limit of a group above": (
        {
            **VERSION_2,
            "sys/fs/cgroup/user/memory.max": f"{5 * GIB}\n",
            "sys/fs/cgroup/user/memory.current": f"{3 * GIB}\n",
        },
        2 * GIB,
    ),
    "used up": ({**VERSION_2, "sys/fs/cgroup/user/job/memory.max": f"{GIB // 2}\n"}, 0),
    "version 1, only the mount point is there": (VERSION_1, 4 * GIB),
    "version 1, file cache": (
        {**VERSION_1, "sys/fs/cgroup/memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB}\n"},
        5 * GIB,
    ),
    "unreadable numbers": ({**VERSION_2, "sys/fs/cgroup/user/job/memory.max": "?\n"}, 16 * GIB),
}


@pytest.mark.parametrize(("files", "expected"), CASES.values(), ids=CASES)
def test_least_of_system_and_control_groups(
    files: dict[str, str], expected: int, available: Callable[[dict[str, str]], int | None]
) -> None:
    assert available({"proc/meminfo": MEMINFO, **files}) == expected


def test_all_memory_where_the_system_does_not_tell(available: Callable[[dict[str, str]], int | None]) -> None:
    found, on_this_machine = available({}), cpu.available_memory()
    assert found is not None and on_this_machine is not None
    assert found >= on_this_machine > 0
