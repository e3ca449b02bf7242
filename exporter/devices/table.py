"""The devices people name, as data: compute capability, software, DLA, memory.

Sources, November 2026; what was found only once or is inferred says "about":

* TensorRT and DLA by compute capability: TensorRT's support matrices and "Migrating TensorRT from
  10.x to 11.x on Jetson/JetPack" of 11.4.1 (docs.nvidia.com/deeplearning/tensorrt): 10.7 is the
  last 10.x with DLA; 11.0 to 11.3 have none; 11.4.1 has it on Jetson AGX Orin with JetPack 7.2.2;
  Orin with JetPack 6 stays at 10.x; Thor has no DLA.
* TensorRT of a JetPack: what people print on their devices (5.1: 8.5.2; 6.0: 8.6.2; 6.2: 10.3;
  7.0: 10.13; 7.2: 10.16), and Torch-TensorRT's documentation (6.1: 10.3).
* Jetson Thor is sm101 for CUDA 12 and sm110 for CUDA 13.
* what TensorRT-RTX builds without a GPU: measured here.
* compute capabilities, memory and DLA cores of products are their published specifications, as
  commonly known; nothing else depends on the memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

RTX = "tensorrt-rtx"
FULL = "tensorrt"

Version = tuple[int, int]
"""Major and minor version of TensorRT."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Software:
    """One generation of software on a device: TensorRT ``tensorrt``, ``about`` if not certain.

    ``dla`` says whether this TensorRT drives the device's DLA.
    """

    name: str
    tensorrt: Version
    python: str = ""
    dla: bool = False
    about: bool = False

    def __str__(self) -> str:
        version = ".".join(map(str, self.tensorrt))
        return f"TensorRT {'about ' if self.about else ''}{version} ({self.name})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What all devices of one compute capability share.

    ``builder`` is the backend that fits: `RTX` builds here without a GPU, `FULL` only on the
    device. ``oldest`` and ``newest`` bound the full TensorRT versions that know it.
    """

    capability: str
    name: str
    builder: str = FULL
    oldest: Version = (8, 6)
    newest: Version | None = None

    @property
    def number(self) -> int:
        """87 for ``sm87``."""
        return int(self.capability.removeprefix("sm"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device by the name people use.

    ``products`` is what the name stands for. ``memory_gb`` and ``dla_cores`` hold every value that
    occurs among these products, ascending. ``software`` is newest first, empty for devices whose
    TensorRT the user installs freely. ``notes`` are sentences.
    """

    name: str
    capability: str
    products: str
    memory_gb: tuple[int, ...]
    shared_memory: bool = False
    dla_cores: tuple[int, ...] = (0,)
    software: tuple[Software, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def architecture(self) -> Architecture:
        """The facts of its compute capability."""
        return ARCHITECTURES[self.capability]

    @property
    def memory(self) -> str:
        """``8 or 16 GB``, and whether the CPU shares it."""
        return f"{_either(self.memory_gb)} GB{', shared with the CPU' * self.shared_memory}"

    @property
    def dla(self) -> str:
        """``no DLA``, ``2 DLA cores``, ``1 or 2 DLA cores (by module)``."""
        if max(self.dla_cores) == 0:
            return "no DLA"
        by_module = " (by module)" if len(self.dla_cores) > 1 else ""
        return f"{_either(self.dla_cores)} DLA cores{by_module}"


OLDEST_WITH: Mapping[str, int] = MappingProxyType({"bf16": 80, "fp8": 89})
"""The number of the first capability whose tensor cores know a precision; others know it all."""


def _either(numbers: tuple[int, ...]) -> str:
    """``4, 8 or 16``."""
    *first, last = map(str, numbers)
    return f"{', '.join(first)} or {last}" if first else last


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        item.capability: item
        for item in (
            # TensorRT 10.5 dropped Volta; Xavier's last JetPack stays at 8.5.
            Architecture(capability="sm70", name="Volta", newest=(10, 4)),
            Architecture(capability="sm72", name="Volta", oldest=(8, 5), newest=(8, 5)),
            Architecture(capability="sm75", name="Turing", builder=RTX),
            Architecture(capability="sm80", name="Ampere", builder=RTX),
            Architecture(capability="sm86", name="Ampere", builder=RTX),
            Architecture(capability="sm87", name="Ampere", oldest=(8, 5)),
            Architecture(capability="sm89", name="Ada Lovelace", builder=RTX),
            Architecture(capability="sm90", name="Hopper"),
            # The oldest TensorRT of sm103, sm110 and sm121 is "about": the release notes name
            # Blackwell as a whole from 10.8 on.
            Architecture(capability="sm100", name="Blackwell", oldest=(10, 8)),
            Architecture(capability="sm103", name="Blackwell Ultra", oldest=(10, 13)),
            Architecture(capability="sm110", name="Blackwell", oldest=(10, 13)),
            Architecture(capability="sm120", name="Blackwell", builder=RTX, oldest=(10, 8)),
            Architecture(capability="sm121", name="Blackwell", builder=RTX, oldest=(10, 13)),
        )
    }
)

_JETPACK_5 = Software(name="JetPack 5.1", tensorrt=(8, 5), python="3.8", dla=True)
_JETPACK_6 = (
    Software(name="JetPack 6.1 and 6.2", tensorrt=(10, 3), python="3.10", dla=True),
    Software(name="JetPack 6.0", tensorrt=(8, 6), python="3.10", dla=True),
)
_JETPACK_72 = Software(name="JetPack 7.2", tensorrt=(10, 16), python="3.12", about=True)
_ORIN = (_JETPACK_72, *_JETPACK_6, _JETPACK_5)
_AGX_ORIN = (
    Software(
        name="installed by hand on JetPack 7.2.2",
        tensorrt=(11, 4),
        python="3.12",
        dla=True,
    ),
    *_ORIN,
)
_THOR = (
    Software(
        name="installed by hand on JetPack 7.2.2", tensorrt=(11, 4), python="3.12", about=True
    ),
    _JETPACK_72,
    Software(name="JetPack 7.0", tensorrt=(10, 13), python="3.12"),
)
_BY_MODULE = "name the module (agx-orin, orin-nx, orin-nano) for its own DLA and memory"
_XAVIER = (
    "JetPack 5.1 is the last for Xavier: Python 3.8 and TensorRT 8.5 there are older than this "
    "project runs on, so build with trtexec"
)
_SERVER = "TensorRT-RTX names GeForce and RTX cards only; on this card it is untried"


def _jetson(
    name: str,
    capability: str,
    products: str,
    *notes: str,
    memory_gb: tuple[int, ...],
    dla_cores: tuple[int, ...],
    software: tuple[Software, ...],
) -> Device:
    return Device(
        name=name,
        capability=capability,
        products=products,
        memory_gb=memory_gb,
        shared_memory=True,
        dla_cores=dla_cores,
        software=software,
        notes=notes,
    )


def _cards(capability: str, brand: str, cards: Mapping[str, tuple[int, ...]]) -> list[Device]:
    """Cards called ``brand`` and their key; notes follow from brand and builder."""
    server = brand == "NVIDIA" and ARCHITECTURES[capability].builder == RTX
    return [
        Device(
            name=key.lower().replace(" ", "-"),
            capability=capability,
            products=f"{brand} {key}",
            memory_gb=memory,
            notes=(_SERVER,) if server else (),
        )
        for key, memory in cards.items()
    ]


def _table() -> Mapping[str, Device]:
    devices = [
        _jetson("orin", "sm87", "Jetson Orin, any module", _BY_MODULE,
            memory_gb=(4, 8, 16, 32, 64), dla_cores=(0, 1, 2), software=_ORIN),
        _jetson("agx-orin", "sm87", "Jetson AGX Orin",
            memory_gb=(32, 64), dla_cores=(2,), software=_AGX_ORIN),
        _jetson("orin-nx", "sm87", "Jetson Orin NX", "1 DLA core with 8 GB, 2 with 16 GB",
            memory_gb=(8, 16), dla_cores=(1, 2), software=_ORIN),
        _jetson("orin-nano", "sm87", "Jetson Orin Nano",
            memory_gb=(4, 8), dla_cores=(0,), software=_ORIN),
        _jetson("xavier", "sm72", "Jetson AGX Xavier", _XAVIER,
            memory_gb=(32, 64), dla_cores=(2,), software=(_JETPACK_5,)),
        _jetson("xavier-nx", "sm72", "Jetson Xavier NX", _XAVIER,
            memory_gb=(8, 16), dla_cores=(2,), software=(_JETPACK_5,)),
        _jetson("thor", "sm110", "Jetson AGX Thor", "CUDA before 13 calls it sm101",
            memory_gb=(64, 128), dla_cores=(0,), software=_THOR),
        Device(name="dgx-spark", capability="sm121", products="DGX Spark (GB10)", memory_gb=(128,),
            shared_memory=True),
        *_cards("sm70", "NVIDIA", {"V100": (16, 32)}),
        *_cards("sm75", "NVIDIA", {"T4": (16,)}),
        *_cards("sm80", "NVIDIA", {"A30": (24,), "A100": (40, 80)}),
        *_cards("sm86", "NVIDIA", {"A2": (16,), "A10": (24,), "A16": (16,), "A40": (48,)}),
        *_cards("sm89", "NVIDIA", {"L4": (24,), "L40": (48,), "L40S": (48,)}),
        *_cards("sm90", "NVIDIA", {"H100": (80, 94), "H200": (141,)}),
        *_cards("sm100", "NVIDIA", {"B200": (180, 192)}),
        *_cards("sm103", "NVIDIA", {"B300": (270, 288)}),
        *_cards("sm75", "GeForce", {"RTX2060": (6, 12), "RTX2070": (8,), "RTX2080": (8, 11)}),
        *_cards("sm86", "GeForce", {
            "RTX3050": (4, 6, 8), "RTX3060": (6, 8, 12), "RTX3070": (8,), "RTX3080": (10, 12),
            "RTX3090": (24,)}),
        *_cards("sm89", "GeForce", {
            "RTX4050": (6,), "RTX4060": (8, 16), "RTX4070": (12, 16), "RTX4080": (16,),
            "RTX4090": (24,)}),
        *_cards("sm120", "GeForce", {
            "RTX5050": (8,), "RTX5060": (8, 16), "RTX5070": (12, 16), "RTX5080": (16,),
            "RTX5090": (32,)}),
        *_cards("sm86", "Workstation", {
            "RTX A2000": (6, 12), "RTX A4000": (16,), "RTX A4500": (20,), "RTX A5000": (24,),
            "RTX A6000": (48,)}),
        *_cards("sm89", "Workstation", {
            "RTX2000 Ada": (16,), "RTX4000 Ada": (20,), "RTX5000 Ada": (32,),
            "RTX6000 Ada": (48,)}),
        *_cards("sm120", "Workstation", {
            "RTX Pro 4000": (24,), "RTX Pro 4500": (32,), "RTX Pro 5000": (48, 72),
            "RTX Pro 6000": (96,)}),
    ]  # fmt: skip
    return MappingProxyType({device.name: device for device in devices})


DEVICES: Mapping[str, Device] = _table()

ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "orin-agx": "agx-orin",
        "agx-xavier": "xavier",
        "agx-thor": "thor",
        "gb10": "dgx-spark",
        "spark": "dgx-spark",
    }
)

_TOO_OLD = (
    "JetPack 4.6 is its last, whose TensorRT 8.2 does not read this project's graphs (opset 17)"
)
UNSUPPORTED: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("nano", "tx1", "sm53"), f"Jetson Nano and TX1 (sm53): {_TOO_OLD}"),
        **dict.fromkeys(("tx2", "sm62"), f"Jetson TX2 (sm62): {_TOO_OLD}"),
    }
)
"""Names and capabilities that are known and refused, with the reason."""
