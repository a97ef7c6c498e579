"""A tree like /sys of a host with two sockets, and an nvidia-smi that tells its GPUs."""

from pathlib import Path

GPUS = [
    "pci0000:10/0000:10:01.0/0000:11:00.0/0000:12:00.0",  # GPUs 0 and 1, each below a switch with a card
    "pci0000:10/0000:10:02.0/0000:21:00.0/0000:22:00.0",
    "pci0000:80/0000:80:01.0/0000:81:00.0",  # GPUs 2 and 3 of the other socket share one card
    "pci0000:80/0000:80:02.0/0000:91:00.0",
]
NICS = {
    "mlx5_0": "pci0000:10/0000:10:01.0/0000:11:00.0/0000:13:00.0",
    "mlx5_1": "pci0000:10/0000:10:02.0/0000:21:00.0/0000:23:00.0",
    "mlx5_2": "pci0000:80/0000:80:03.0/0000:a1:00.0",
}
CPUS = {0: "0-7,16-23", 1: "8-15,24-31"}
"""Of each NUMA node: 8 cores of two threads, n and n + 16."""


class Host:
    def __init__(self, root: Path) -> None:
        self.root = root
        for node, cpus in CPUS.items():
            self._write(f"devices/system/node/node{node}/cpulist", cpus)
        self._write("devices/system/cpu/online", "0-31")
        for cpu in range(32):
            self._write(f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", f"{cpu % 16},{cpu % 16 + 16}")
        for way in GPUS:
            self._device(way)
        for name, way in NICS.items():
            device = self._device(way)
            self._write(f"class/infiniband/{name}/ports/1/state", "4: ACTIVE")
            (root / f"class/infiniband/{name}/device").symlink_to(device)

    def unplug(self, name: str) -> None:
        self._write(f"class/infiniband/{name}/ports/1/state", "1: DOWN")

    def nvidia_smi(self, folder: Path, num_gpus: int = len(GPUS)) -> Path:
        """A folder for PATH."""
        lines = [f"{index}, GPU-{index}abc, 0000{Path(way).name.upper()}" for index, way in enumerate(GPUS[:num_gpus])]
        folder.mkdir()
        program = folder / "nvidia-smi"
        program.write_text("#!/bin/sh\ncat <<END\n" + "\n".join(lines) + "\nEND\n")
        program.chmod(0o755)
        return folder

    def _device(self, way: str) -> Path:
        device = self.root / "devices" / way
        self._write(f"devices/{way}/numa_node", "0" if "0000:10" in way else "1")
        link = self.root / "bus/pci/devices" / device.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(device)
        return device

    def _write(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text + "\n")
