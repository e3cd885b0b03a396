"""Limits of containers and of job schedulers, of both versions of control groups, nested or not."""

import pytest

from longspan.cgroups import MemoryLimit, cpu_quota, memory_limits
from longspan.config import EngineConfig
from longspan.cpu_binding import num_cores

V2_MOUNT = "31 24 0:26 {mounted} /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNTS = (
    "33 24 0:28 {mounted} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "34 24 0:29 {mounted} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
)


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def v2(group, files, mounted="/"):
    where = {"proc/self/cgroup": f"0::{group}\n", "proc/self/mountinfo": V2_MOUNT.format(mounted=mounted)}
    return where | {f"sys/fs/cgroup/{name}": text for name, text in files.items()}


def v1(group, files, mounted="/"):
    own = f"5:memory:{group}\n4:cpu,cpuacct:{group}\n1:name=systemd:/x\n0::/x\n"
    where = {"proc/self/cgroup": own, "proc/self/mountinfo": V1_MOUNTS.format(mounted=mounted)}
    return where | {f"sys/fs/cgroup/{name}": text for name, text in files.items()}


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        (v2("/", {"cpu.max": "max 100000\n"}), None),
        (v2("/", {"cpu.max": "200000 100000\n"}), 2.0),
        (v2("/a/b", {"cpu.max": "max 100000", "a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000"}), 1.5),
        (v2("/a/b", {"a/cpu.max": "150000 100000", "a/b/cpu.max": "50000 100000"}), 0.5),
        (v2("/docker/1", {"cpu.max": "30000 100000"}, mounted="/docker/1"), 0.3),
        (v2("/../../other", {"cpu.max": "30000 100000"}, mounted="/docker/1"), 0.3),
        (v1("/", {"cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000"}), None),
        (v1("/d", {"cpu,cpuacct/d/cpu.cfs_quota_us": "30000", "cpu,cpuacct/d/cpu.cfs_period_us": "100000"}), 0.3),
        (
            v1("/d/1", {"cpu,cpuacct/cpu.cfs_quota_us": "200000", "cpu,cpuacct/cpu.cfs_period_us": "50000"}, "/d/1"),
            4.0,
        ),
    ],
)
def test_the_least_quota_on_the_way_up_counts(tmp_path, files, quota):
    write(tmp_path, files)
    assert cpu_quota(tmp_path) == (None if quota is None else pytest.approx(quota))


def test_memory_limits_of_all_groups_are_found(tmp_path):
    inner = {"a/b/memory.max": "max", "a/b/memory.current": "5", "a/memory.max": "600000", "a/memory.current": "500000"}
    write(tmp_path, v2("/a/b", {**inner, "a/memory.stat": "anon 1\ninactive_file 70000\n"}))
    assert memory_limits(tmp_path) == [MemoryLimit(600_000, 170_000)]


def test_memory_limits_of_version_1_are_found(tmp_path):
    names = {"limit_in_bytes": "1000", "usage_in_bytes": "900", "stat": "inactive_file 1\ntotal_inactive_file 50\n"}
    outer = {"memory/memory.limit_in_bytes": "9223372036854771712", "memory/memory.usage_in_bytes": "4"}
    write(tmp_path, v1("/d", outer | {f"memory/d/memory.{name}": text for name, text in names.items()}))
    assert memory_limits(tmp_path) == [MemoryLimit(1000, 150)]


@pytest.mark.parametrize(("quota", "threads"), [(0.3, 1), (1.9, 1), (2.0, 2), (100.0, 64), (None, 64)])
def test_threads_follow_the_quota(monkeypatch, quota, threads):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr("longspan.cpu_binding.cpu_quota", lambda: quota)
    assert num_cores() == EngineConfig(model="recall").num_threads == threads
