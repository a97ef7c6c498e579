"""Which GPU, cores and network card a worker gets, on hosts that are folders."""

from pathlib import Path

import pytest

from deploy.launch.host import Gpu, Problem, active_nics, interface_of, nvidia_gpus, parse_cpus, place, write_cpus
from tests.launch.sysfs import GPUS, Host

ALL = parse_cpus("0-31")
FOUND = [Gpu(index, f"GPU-{index}abc", Path(way).name) for index, way in enumerate(GPUS)]


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path / "sys")


@pytest.mark.parametrize(
    ("rank", "cores", "card", "node"),
    [
        (0, "0-3,16-19", "mlx5_0:1", 0),
        (1, "4-7,20-23", "mlx5_1:1", 0),
        (2, "8-11,24-27", "mlx5_2:1", 1),
        (3, "12-15,28-31", "mlx5_2:1", 1),
    ],
)
def test_a_worker_has_its_gpu_whole_cores_beside_it_and_the_card_below_the_same_switch(
    host: Host, rank: int, cores: str, card: str, node: int
) -> None:
    where = place(rank, {}, FOUND, ALL, host.root)
    assert (where.gpu, write_cpus(where.cores), str(where.nic), where.numa_node) == (str(rank), cores, card, node)


def test_a_card_that_is_down_is_not_used_and_the_next_one_is_of_the_same_socket(host: Host) -> None:
    host.unplug("mlx5_0")
    assert str(place(0, {}, FOUND, ALL, host.root).nic) == "mlx5_1:1"
    host.unplug("mlx5_1")
    assert str(place(0, {}, FOUND, ALL, host.root).nic) == "mlx5_2:1"
    host.unplug("mlx5_2")
    assert place(0, {}, FOUND, ALL, host.root).nic is None
    assert not active_nics(host.root)


def test_cards_that_are_as_near_take_turns(host: Host) -> None:
    cards = {str(place(rank, {}, [], ALL, host.root).nic) for rank in (0, 2)}
    assert cards == {"mlx5_0:1", "mlx5_1:1"}, "both on the node of ranks 0 and 2, which have no GPU"


def test_without_gpus_neighbours_go_to_different_sockets(host: Host) -> None:
    places = [place(rank, {}, [], ALL, host.root) for rank in range(3)]
    assert [write_cpus(each.cores) for each in places] == ["0-7,16-23", "8-15,24-31", "0-7,16-23"]
    assert [each.gpu for each in places] == [None] * 3


def test_gpus_that_somebody_chose_are_the_only_ones(host: Host) -> None:
    chosen = {"CUDA_VISIBLE_DEVICES": "3,GPU-1abc"}
    places = [place(rank, chosen, FOUND, ALL, host.root) for rank in range(2)]
    assert [(each.gpu, each.numa_node) for each in places] == [("3", 1), ("GPU-1abc", 0)]
    with pytest.raises(Problem, match=r"GPU number 2, and there are 2"):
        place(2, chosen, FOUND, ALL, host.root)
    assert place(5, {"CUDA_VISIBLE_DEVICES": ""}, FOUND, ALL, host.root).gpu == "", "hidden: computes on processors"


def test_a_task_of_slurm_that_sees_one_gpu_has_it_whatever_its_rank(host: Host) -> None:
    step = {"SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7", "CUDA_VISIBLE_DEVICES": "2"}
    assert place(3, step, FOUND, ALL, host.root).gpu == "2"


def test_cores_that_somebody_gave_are_kept_and_not_divided(host: Host) -> None:
    given = parse_cpus("2-5,12")
    assert write_cpus(place(0, {}, FOUND, given, host.root).cores) == "2-5", "those beside the GPU"
    assert not place(0, {}, FOUND, parse_cpus("8-11"), host.root).cores, "none is beside it: as they are"
    assert not place(0, {"SLURM_JOB_ID": "7"}, FOUND, ALL, host.root).cores, "Slurm bound nothing, others may be here"


def test_a_host_that_says_nothing_binds_nothing(tmp_path: Path) -> None:
    assert place(0, {}, [], ALL, tmp_path) == (None, frozenset(), None, None)
    assert place(0, {}, [Gpu(0, "GPU-x", "0000:01:00.0")], ALL, tmp_path) == ("0", frozenset(), None, None)


def test_gpus_are_read_from_nvidia_smi(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{host.nvidia_smi(tmp_path / 'bin')}:/usr/bin:/bin")
    assert nvidia_gpus() == FOUND
    (tmp_path / "bin/nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    with pytest.raises(Problem, match="nvidia-smi does not tell"):
        nvidia_gpus()


def test_cpu_lists_are_read_and_written_as_the_kernel_does() -> None:
    assert parse_cpus("0-2,7\n") == {0, 1, 2, 7}
    assert write_cpus(frozenset({7, 0, 2, 1})) == "0-2,7"
    assert parse_cpus("") == frozenset()


def test_loopback_is_no_interface_to_send_over() -> None:
    assert interface_of("127.0.0.1") is None
