"""Names that people use for devices, and what is known about each."""

from __future__ import annotations

import pytest

from exporter.devices import Target, check_dla, find_device, resolve_targets, target_text
from exporter.devices.precisions import precision_advice
from exporter.devices.table import ALIASES, ARCHITECTURES, DEVICES, FULL, RTX, UNSUPPORTED, Software
from exporter.errors import InputError

KNOWN = (
    f"compute capabilities such as sm86, and {len(DEVICES)} devices such as orin, orin-nano, t4, "
    "l4, rtx3060, rtx5090, thor"
)
WITH_DLA = "orin, agx-orin, orin-nx, xavier, xavier-nx"


def refusal(call, *arguments):
    with pytest.raises(InputError) as caught:
        call(*arguments)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        ("orin", "sm87"), ("orin-nx", "sm87"), ("orin-nano", "sm87"), ("agx-orin", "sm87"),
        ("xavier", "sm72"), ("xavier-nx", "sm72"), ("thor", "sm110"), ("dgx-spark", "sm121"),
        ("v100", "sm70"), ("t4", "sm75"), ("a2", "sm86"), ("a10", "sm86"), ("a40", "sm86"),
        ("a30", "sm80"), ("a100", "sm80"), ("l4", "sm89"), ("l40s", "sm89"), ("h100", "sm90"),
        ("h200", "sm90"), ("b200", "sm100"), ("b300", "sm103"), ("rtx2080", "sm75"),
        ("rtx3060", "sm86"), ("rtx4090", "sm89"), ("rtx5090", "sm120"), ("rtx-a2000", "sm86"),
        ("rtx6000-ada", "sm89"), ("rtx-pro-6000", "sm120"),
    ],
)  # fmt: skip
def test_each_name_stands_for_one_compute_capability(name, capability):
    """The name is found and has the capability that NVIDIA lists."""
    assert (name, capability) == (find_device(name).name, find_device(name).capability)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("Jetson AGX Orin", "agx-orin"),
        ("NVIDIA GeForce RTX 3060", "rtx3060"),
        ("ORIN_NANO", "orin-nano"),
        ("Tesla T4", "t4"),
        ("RTX A2000", "rtx-a2000"),
        ("orin-agx", "agx-orin"),
        ("GB10", "dgx-spark"),
    ],
)
def test_brands_case_and_separators_do_not_matter(written, name):
    """What a shop or nvidia-smi writes finds the same device."""
    assert name == find_device(written).name


def test_an_unknown_name_is_refused_with_the_nearest():
    """The sentence has the nearest names and says what else may be written."""
    assert f"unknown target 'orim' (nearest: orin, orin-nx; known: {KNOWN})" == refusal(
        find_device, "orim"
    )
    assert f"unknown target 'quantum' (known: {KNOWN})" == refusal(find_device, "quantum")


@pytest.mark.parametrize("written", ["nano", "Jetson Nano", "tx2", "sm53", "6.2"])
def test_devices_that_ended_with_jetpack_4_are_refused_with_the_reason(written):
    """Their TensorRT 8.2 cannot read the graphs; name and capability get the same answer."""
    message = refusal(resolve_targets, written)
    assert message.startswith(f"target {written} is not supported: Jetson ")
    assert message.endswith(
        "JetPack 4.6 is its last, whose TensorRT 8.2 does not read this project's graphs (opset 17)"
    )


def test_capabilities_and_names_may_be_mixed():
    """Entries keep their order, each is there once, and capabilities are not judged here."""
    targets = resolve_targets("orin, 8.6,rtx3060 , sm86, sm99,8.6")
    assert ["sm87", "sm86", "sm86", "sm86", "sm99"] == [target.capability for target in targets]
    assert ["orin", None, "rtx3060", None, None] == [t.device and t.device.name for t in targets]
    assert "sm87,sm86,sm99" == target_text(targets)
    assert "orin (sm87)" == targets[0].label
    assert "sm86" == targets[1].label


def test_nothing_asked_is_no_target_and_an_empty_list_is_refused():
    """None means what the backend can; a list of nothing is a slip."""
    assert () == resolve_targets(None)
    assert target_text(()) is None
    assert "no target in ' , '; name a device such as orin, or sm86" == refusal(
        resolve_targets, " , "
    )


def test_every_device_has_a_known_capability_and_plausible_numbers():
    """No row of the table is half filled, no alias points nowhere, no refused name is in it."""
    for name, device in DEVICES.items():
        assert name == device.name
        assert device.capability in ARCHITECTURES
        assert list(device.memory_gb) == sorted(set(device.memory_gb))
        assert list(device.dla_cores) == sorted(set(device.dla_cores))
        versions = [release.tensorrt for release in device.software]
        assert versions == sorted(versions, reverse=True), name
    assert set(ALIASES.values()) <= set(DEVICES)
    assert not set(UNSUPPORTED) & (set(DEVICES) | set(ARCHITECTURES))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("orin", "0, 1 or 2 DLA cores (by module)"),
        ("agx-orin", "2 DLA cores"),
        ("orin-nx", "1 or 2 DLA cores (by module)"),
        ("orin-nano", "no DLA"),
        ("xavier-nx", "2 DLA cores"),
        ("thor", "no DLA"),
        ("t4", "no DLA"),
    ],
)
def test_dla_cores_of_the_modules(name, words):
    """Orin Nano and Thor have none; Orin NX has one per 8 GB."""
    assert words == find_device(name).dla


def test_memory_says_whether_the_cpu_shares_it():
    """Jetsons and DGX Spark have one memory, cards their own."""
    assert "8 or 16 GB, shared with the CPU" == find_device("orin-nx").memory
    assert "16 GB" == find_device("t4").memory


def test_software_of_a_jetson_is_that_of_its_jetpacks():
    """Newest first; what is not certain says about."""
    assert [
        "TensorRT about 10.16 (JetPack 7.2)",
        "TensorRT 10.3 (JetPack 6.1 and 6.2)",
        "TensorRT 8.6 (JetPack 6.0)",
        "TensorRT 8.5 (JetPack 5.1)",
    ] == [str(release) for release in find_device("orin-nano").software]
    assert (Software(name="JetPack 5.1", tensorrt=(8, 5), python="3.8", dla=True),) == find_device(
        "xavier"
    ).software


@pytest.mark.parametrize(
    ("text", "versions"),
    [
        ("t4", [(11, 4), (10, 13), (8, 6)]),
        ("v100", [(10, 4), (8, 6)]),
        ("rtx5090", [(11, 4), (10, 13)]),
        ("sm72", [(8, 5)]),
        ("sm87", [(10, 16), (10, 3), (8, 6), (8, 5)]),
        ("sm99", []),
    ],
)
def test_other_targets_get_one_tensorrt_of_each_generation_that_knows_them(text, versions):
    """A card has no JetPack; a capability that only Jetsons have gets theirs."""
    (target,) = resolve_targets(text)
    assert versions == [release.tensorrt for release in target.software]


@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize("backend", [RTX, FULL])
def test_every_precision_has_one_line_of_advice(capability, backend):
    """All five precisions, each with a reason; fp16 is always worth using, fp32 never."""
    advice = {item.precision: item for item in precision_advice(capability, backend)}
    assert ["fp32", "fp16", "bf16", "int8", "fp8"] == list(advice)
    assert all(item.reason and "\n" not in item.reason for item in advice.values())
    assert (True, False) == (advice["fp16"].worth, advice["fp32"].worth)
    number = int(capability.removeprefix("sm"))
    assert (number >= 80, number >= 89) == (advice["bf16"].worth, advice["fp8"].worth)


@pytest.mark.parametrize(
    ("capability", "backend", "worth"),
    [
        ("sm75", RTX, False), ("sm75", FULL, True), ("sm70", FULL, False), ("sm72", FULL, True),
        ("sm87", FULL, True), ("sm86", RTX, True), ("sm103", FULL, False),
    ],
)  # fmt: skip
def test_whether_int8_is_worth_it_depends_on_hardware_and_builder(capability, backend, worth):
    """Turing's INT8 tensor cores are used by full TensorRT only."""
    advice = {item.precision: item.worth for item in precision_advice(capability, backend)}
    assert worth == advice["int8"]


@pytest.mark.parametrize("text", ["agx-orin", "orin", "sm87", "xavier,agx-orin"])
def test_a_dla_core_that_exists_is_accepted(text):
    """The second core of a device that may have two, at fp16 and int8."""
    check_dla(resolve_targets(text), 1, "int8")
    check_dla(resolve_targets(text), 0, "fp16")


def test_a_dla_that_does_not_exist_is_refused():
    """No target, no DLA, no such core, no such precision: each has its sentence."""
    orin = resolve_targets("agx-orin")
    assert f"DLA needs a target that has one: {WITH_DLA}" == refusal(check_dla, (), 0, "int8")
    assert f"target orin-nano (sm87) has no DLA (with DLA: {WITH_DLA})" == refusal(
        check_dla, resolve_targets("orin-nano"), 0, "int8"
    )
    assert f"target sm86 has no DLA (with DLA: {WITH_DLA})" == refusal(
        check_dla, (Target(asked="sm86", capability="sm86"),), 0, "int8"
    )
    assert "target agx-orin (sm87) has DLA cores 0 to 1, no core 2" == refusal(
        check_dla, orin, 2, "int8"
    )
    assert "DLA computes in fp16 and int8 only, not in fp32" == refusal(check_dla, orin, 0, "fp32")
