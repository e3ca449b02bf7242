"""Every source's key names give the source's network; what stands around them is taken off.

The layouts are written down here once more, block by block, from how the sources name their
weights; nothing of the translation under test is used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from models.checkpoint import CheckpointError, LoadedCheckpoint, identify, load_checkpoint
from models.checkpoint_file import PREFIXES, WRAPPERS, read_checkpoint_file
from models.dialects import Dialect, from_ours, to_ours
from models.fitting import expected_shapes
from models.fusion import reparameterize
from models.repvgg import POST_NORM, QAREPVGG, REPVGG, BlockStyle, RepVGG, mobileone
from models.variants import VARIANTS, Squeeze, Variant

TINY = Variant(
    name="tiny", num_blocks=(2, 1, 4, 1), width_multiplier=(0.125, 0.125, 0.0625, 0.03125)
)
TINY_SE = replace(TINY, name="tiny-se", squeeze=Squeeze.BEFORE_RELU, squeeze_reduction=4)
TINY_PSE = replace(TINY, name="tiny-pse", squeeze=Squeeze.AFTER_RELU, squeeze_reduction=2)
CLASSES = 5
State = dict[str, Tensor]


pytestmark = pytest.mark.usefixtures("one_thread")


def network(variant: Variant, style: BlockStyle = REPVGG) -> RepVGG:
    """A network in eval mode whose statistics are not the initial ones."""
    torch.manual_seed(0)
    module = RepVGG(variant, num_classes=CLASSES, style=style)
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            nn.init.normal_(child.weight, mean=1.0, std=0.3)
            nn.init.normal_(child.bias)
            nn.init.normal_(child.running_mean)
            nn.init.uniform_(child.running_var, 0.5, 2.0)
    return module.eval()


def blocks(module: nn.Module) -> Iterator[tuple[int, int, nn.Module]]:
    """Stage, number within it, block."""
    yield 0, 0, module.stage0
    for stage in range(1, 5):
        for index, block in enumerate(getattr(module, f"stage{stage}")):
            yield stage, index, block


def laid_out(
    module: nn.Module, place: Callable[[int, int], str], names: dict[str, str], head: str
) -> State:
    """A state whose blocks are at ``place`` and whose branches are called ``names``."""
    state: State = {}
    for stage, index, block in blocks(module):
        for ours, theirs in names.items():
            part = getattr(block, ours, None)
            if part is not None:
                where = f"{place(stage, index)}.{theirs}"
                state |= {f"{where}.{key}": tensor for key, tensor in part.state_dict().items()}
    return state | {f"{head}.{key}": t for key, t in module.linear.state_dict().items()}


def official(module: nn.Module) -> State:
    branches = ("rbr_dense", "rbr_1x1", "rbr_identity", "rbr_reparam", "se", "bn")
    return laid_out(
        module,
        lambda stage, index: f"stage{stage}.{index}" if stage else "stage0",
        {name: name for name in branches},
        "linear",
    )


def timm(module: nn.Module) -> State:
    names = {
        "rbr_dense": "conv_kxk",
        "rbr_1x1": "conv_1x1",
        "rbr_identity": "identity",
        "rbr_reparam": "reparam_conv",
        "se": "attn",
    }
    state = laid_out(
        module,
        lambda stage, index: f"stages.{stage - 1}.{index}" if stage else "stem",
        names,
        "head.fc",
    )
    squeeze = {".attn.down.": ".attn.fc1.", ".attn.up.": ".attn.fc2."}
    for ours, theirs in squeeze.items():
        state = {name.replace(ours, theirs): tensor for name, tensor in state.items()}
    return state


def plus(module: nn.Module) -> State:
    """Stage 3 (4 blocks here) is cut in two; in train form there are auxiliary heads."""

    def place(stage: int, index: int) -> str:
        if stage == 3:
            return f"stage3_{'first' if index < 2 else 'second'}.blocks.{index % 2}"
        return f"stage{stage}.blocks.{index}" if stage else "stage0"

    names = {n: n for n in ("rbr_dense", "rbr_1x1", "rbr_identity", "rbr_reparam")}
    state = laid_out(module, place, {**names, "se": "post_se"}, "linear")
    if "stage0.rbr_reparam.weight" not in state:
        for stage in ("stage1", "stage2", "stage3_first"):
            state[f"{stage}_aux.0.conv.weight"] = torch.ones(8, 8, 3, 3)
            state[f"{stage}_aux.0.bn.running_var"] = torch.ones(8)
            state[f"{stage}_aux.3.weight"] = torch.ones(CLASSES, 8)
    return state


def mobileone_layout(module: nn.Module) -> State:
    """`rbr_conv.K` is a list also where it has one entry."""
    names = {
        "rbr_dense": "rbr_conv",
        "rbr_1x1": "rbr_scale",
        "rbr_identity": "rbr_skip",
        "rbr_reparam": "reparam_conv",
    }
    state = laid_out(
        module,
        lambda stage, index: f"stage{stage}.{index}" if stage else "stage0",
        names,
        "linear",
    )
    single = not any(".rbr_conv.0." in name for name in state)
    return {n.replace(".rbr_conv.", ".rbr_conv.0.") if single else n: t for n, t in state.items()}


LAYOUTS: dict[str, tuple[Callable[[nn.Module], State], Variant, BlockStyle, str, str]] = {
    # name: layout, variant, style, format in train form, format in deploy form
    "official": (official, TINY, REPVGG, "official", "official"),
    "official SE": (official, TINY_SE, REPVGG, "official", "official"),
    "timm": (timm, TINY, REPVGG, "timm", "timm"),
    "timm SE": (timm, TINY_SE, REPVGG, "timm", "timm"),
    "plus": (plus, TINY_PSE, REPVGG, "plus", "plus"),
    "plus without SE": (plus, TINY, REPVGG, "plus", "plus"),
    "qarepvgg": (official, TINY, QAREPVGG, "qarepvgg", "official"),
    "mobileone 1": (mobileone_layout, TINY, mobileone(1), "mobileone", "mobileone"),
    "mobileone 4": (mobileone_layout, TINY, mobileone(4), "mobileone", "mobileone"),
    "mobileone skip": (mobileone_layout, TINY, mobileone(2, skip=True), "mobileone", "mobileone"),
    "ours, 3 branches": (official, TINY, mobileone(3, skip=True), "exporter", "official"),
    "ours, SE after ReLU": (official, TINY_PSE, REPVGG, "exporter", "exporter"),
    "ours, post-addition BN": (official, TINY, POST_NORM, "exporter", "official"),
}


@torch.no_grad()
def assert_computes(source: nn.Module, loaded: LoadedCheckpoint) -> None:
    x = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(loaded.module(x), source(x), rtol=1e-5, atol=1e-5)


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def refusal(path: Path, expected: Variant | None = TINY) -> str:
    """The message of the refusal, which names the file and fits on one line."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, expected)
    message = str(caught.value)
    assert message.startswith(f"checkpoint {path} ")
    assert "\n" not in message
    return message.removeprefix(f"checkpoint {path} ")


# --- whose names -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["train", "deploy"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_source_network(tmp_path, name, form):
    """Format, form, classes and block style are named, and the outputs are the source's."""
    layout, variant, style, in_train, in_deploy = LAYOUTS[name]
    source = network(variant, style)
    state = layout(source if form == "train" else reparameterize(source))
    loaded = load_checkpoint(saved(tmp_path / "w.pth", state), variant)
    found = (loaded.format, loaded.form, loaded.variant, loaded.num_classes)
    assert (in_train if form == "train" else in_deploy, form, variant, CLASSES) == found
    assert (style if form == "train" else REPVGG) == loaded.style
    assert_computes(source, loaded)


@pytest.mark.parametrize(("layout", "variant"), [(plus, TINY_SE), (timm, TINY_PSE)])
def test_names_that_say_where_the_gate_is_are_believed(tmp_path, layout, variant):
    """`post_se` is never before the ReLU and `attn` never after it, though the shapes fit."""
    path = saved(tmp_path / "w.pth", layout(network(variant)))
    first = "stage0.post_se.down" if layout is plus else "stem.attn.fc1"
    assert (
        f"is not RepVGG-{variant.name} and fits no other variant; tensors that differ from "
        f"{variant.name} in train form: 36, the first: {first}.weight is not expected"
    ) == refusal(path, variant)


@pytest.mark.parametrize(
    ("layout", "variant", "form"),
    [
        ("official SE", "D2se", "train"),
        ("timm SE", "D2se", "deploy"),
        ("qarepvgg", "A0", "train"),
        ("mobileone 4", "B1g4", "train"),
    ],
)
def test_published_variants_are_recognized_in_foreign_names(tmp_path, layout, variant, form):
    """Names and shapes of the real sizes suffice; there is no data in these files."""
    lay_out, _, style, in_train, in_deploy = LAYOUTS[layout]
    with torch.device("meta"):
        module = RepVGG(
            VARIANTS[variant], num_classes=CLASSES, deploy=form == "deploy", style=style
        )
    found = identify(read_checkpoint_file(saved(tmp_path / "w.pth", lay_out(module))))
    expected = in_train if form == "train" else in_deploy
    assert (expected, form, VARIANTS[variant], CLASSES) == (
        found.dialect.value,
        found.form,
        found.variant,
        found.num_classes,
    )


def test_repvggplus_l2pse_is_recognized_by_its_own_names(tmp_path):
    """24 blocks of stage 3 in two halves of 12; the auxiliary heads are counted out by name."""
    shapes = expected_shapes(VARIANTS["L2pse"], "train")
    state = {}
    for name, shape in shapes.items():
        theirs = name.replace(".se.", ".post_se.")
        theirs = re.sub(r"^stage([124])\.", r"stage\1.blocks.", theirs)
        match = re.match(r"stage3\.(\d+)\.(.*)", theirs)
        if match:
            half, index = divmod(int(match[1]), 12)
            theirs = f"stage3_{('first', 'second')[half]}.blocks.{index}.{match[2]}"
        state[theirs] = torch.empty(shape, device="meta")
    state["linear.weight"] = torch.empty(7, 2560, device="meta")
    state["linear.bias"] = torch.empty(7, device="meta")
    state["stage1_aux.3.weight"] = torch.empty(7, 160, device="meta")
    found = identify(read_checkpoint_file(saved(tmp_path / "w.pth", {"model": state})))
    assert ("plus", "L2pse", 7) == (found.dialect.value, found.variant.name, found.num_classes)
    assert ("stage1_aux",) == found.removed.heads
    assert ("model",) == found.removed.wrappers


def bn(x: Tensor, state: State, name: str) -> Tensor:
    return F.batch_norm(
        x,
        state[f"{name}.running_mean"],
        state[f"{name}.running_var"],
        state[f"{name}.weight"],
        state[f"{name}.bias"],
    )


def qarepvgg_block(x: Tensor, state: State, at: str, stride: int) -> Tensor:
    """Chu et al.: ReLU(BN(BN(conv3x3(x)) + conv1x1(x) [+ x]))."""
    dense = F.conv2d(x, state[f"{at}.rbr_dense.conv.weight"], stride=stride, padding=1)
    total = bn(dense, state, f"{at}.rbr_dense.bn")
    total = total + F.conv2d(x, state[f"{at}.rbr_1x1.weight"], stride=stride)
    if total.shape == x.shape:
        total = total + x
    return F.relu(bn(total, state, f"{at}.bn"))


def mobileone_block(x: Tensor, state: State, at: str, stride: int) -> Tensor:
    """Vasu et al.: ReLU(sum of BN(conv3x3_k(x)) + BN(conv1x1(x)) [+ BN(x)])."""
    total = bn(
        F.conv2d(x, state[f"{at}.rbr_scale.conv.weight"], stride=stride),
        state,
        f"{at}.rbr_scale.bn",
    )
    branch = 0
    while f"{at}.rbr_conv.{branch}.conv.weight" in state:
        weight = state[f"{at}.rbr_conv.{branch}.conv.weight"]
        out = F.conv2d(x, weight, stride=stride, padding=1)
        total = total + bn(out, state, f"{at}.rbr_conv.{branch}.bn")
        branch += 1
    if f"{at}.rbr_skip.weight" in state:
        total = total + bn(x, state, f"{at}.rbr_skip")
    return F.relu(total)


@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("block", "name"),
    [
        (qarepvgg_block, "qarepvgg"),
        (mobileone_block, "mobileone 1"),
        (mobileone_block, "mobileone 4"),
        (mobileone_block, "mobileone skip"),
    ],
)
def test_foreign_blocks_compute_what_their_papers_say(tmp_path, block, name, fused):
    """The loaded network, fused or not, equals the formula applied to the file's own tensors."""
    layout, variant, style, *_ = LAYOUTS[name]
    state = layout(network(variant, style))
    loaded = load_checkpoint(saved(tmp_path / "w.pth", state), variant)
    x = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(2))
    module = reparameterize(loaded.module) if fused else loaded.module
    out = module(x)
    for layer in variant.layers:
        x = block(x, state, layer.name, layer.stride)
    wanted = F.linear(x.mean((2, 3)), state["linear.weight"], state["linear.bias"])
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["train", "deploy"])
@pytest.mark.parametrize("dialect", [Dialect.OFFICIAL, Dialect.TIMM, Dialect.PLUS])
@pytest.mark.parametrize("variant", ["A0", "B1g4", "D2se", "L2pse"])
def test_names_translate_there_and_back(variant, dialect, form):
    """Ours -> theirs -> ours is the identity and no two names become one."""
    names = [*expected_shapes(VARIANTS[variant], form), "linear.weight", "linear.bias"]
    theirs = from_ours(dialect, names)
    assert len(names) == len(set(theirs.values()))
    back = to_ours(dialect, theirs.values())
    assert names == [back[theirs[name]] for name in names]


@pytest.mark.parametrize("branches", [1, 2, 5])
def test_mobileone_names_translate_there_and_back(branches):
    """A list of one 3x3 branch is no special case to its user."""
    names = list(expected_shapes(VARIANTS["A0"], "train", mobileone(branches, skip=True)))
    theirs = from_ours(Dialect.MOBILEONE, names)
    assert f"stage2.1.rbr_conv.{branches - 1}.bn.weight" in theirs.values()
    back = to_ours(Dialect.MOBILEONE, theirs.values())
    assert names == [back[theirs[name]] for name in names]


# --- what stands around the network ------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    wrappers=st.lists(st.sampled_from(WRAPPERS), max_size=4),
    prefixes=st.lists(st.sampled_from(PREFIXES), max_size=4),
)
def test_wrappers_and_prefixes_go_in_any_nesting_order(tmp_path_factory, wrappers, prefixes):
    """What was put around a state comes off, is listed, and leaves the state as it was."""
    state = official(reparameterize(network(TINY)))
    content: object = {f"{''.join(prefixes)}{name}": tensor for name, tensor in state.items()}
    for wrapper in reversed(wrappers):
        content = {"epoch": 3, wrapper: content}
    file = read_checkpoint_file(saved(tmp_path_factory.mktemp("w") / "w.pth", content))
    assert (tuple(wrappers), tuple(prefixes)) == (file.wrappers, file.prefixes)
    assert list(state) == list(file.tensors)
    assert all(torch.equal(tensor, file.tensors[name]) for name, tensor in state.items())


def test_a_prefix_is_taken_off_in_front_only(tmp_path):
    """`module.` within a name, or in front of some names only, stays."""
    state = {"a.module.b": torch.ones(1), "module.c": torch.ones(1), "modules.d": torch.ones(1)}
    file = read_checkpoint_file(saved(tmp_path / "w.pth", state))
    assert (list(state), ()) == (list(file.tensors), file.prefixes)


def test_an_averaged_model_is_read(tmp_path):
    """torch's AveragedModel adds `module.` and a counter `n_averaged` beside it."""
    averaged = torch.optim.swa_utils.AveragedModel(network(TINY))
    loaded = load_checkpoint(saved(tmp_path / "w.pth", averaged.state_dict()), TINY)
    assert ("module.",) == loaded.removed.prefixes
    assert_computes(network(TINY), loaded)


def test_the_wrapper_that_was_read_and_the_others_are_told(tmp_path):
    """With `model` and `ema` in one file the first is read and the second is named."""
    state = official(network(TINY))
    loaded = load_checkpoint(saved(tmp_path / "w.pth", {"ema": state, "model": state}), TINY)
    assert (("model",), ("ema",)) == (loaded.removed.wrappers, loaded.removed.others)


def test_a_wrapper_without_tensors_does_not_hide_the_one_that_has_them(tmp_path):
    """`model` holding a configuration is passed over for `ema`."""
    content = {"model": {"depth": 4}, "ema": official(network(TINY))}
    assert ("ema",) == load_checkpoint(saved(tmp_path / "w.pth", content), TINY).removed.wrappers


def test_tensors_under_an_unknown_name_are_pointed_at(tmp_path):
    """The message names the entry that holds tensors."""
    message = refusal(saved(tmp_path / "w.pth", {"generator": official(network(TINY))}))
    assert "holds no tensors under a name known for them; 'generator' does: save that" == message


def test_data_types_are_told_as_they_were_stored(tmp_path):
    """Half weights and float statistics are counted apart, counters left out."""
    state = official(network(TINY))
    stored = {n: t.half() if n.endswith("conv.weight") else t for n, t in state.items()}
    loaded = load_checkpoint(saved(tmp_path / "w.pth", stored), TINY)
    counters = sum(name.endswith("num_batches_tracked") for name in state)
    halves = 2 * len(TINY.layers)
    assert {"float16": halves, "float32": len(state) - counters - halves} == dict(loaded.dtypes)


def test_counters_that_are_not_in_the_file_are_zero(tmp_path):
    """No memory that nobody wrote is left in the network."""
    state = {n: t for n, t in official(network(TINY)).items() if "num_batches" not in n}
    path = saved(tmp_path / "w.pth", state)
    torch.use_deterministic_algorithms(True)  # fills fresh memory with the largest number
    try:
        buffers = dict(load_checkpoint(path, TINY).module.named_buffers())
    finally:
        torch.use_deterministic_algorithms(False)
    assert {0} == {int(t) for n, t in buffers.items() if n.endswith("num_batches_tracked")}


def test_loading_draws_no_random_numbers(tmp_path):
    """The caller's generator is where it was."""
    path = saved(tmp_path / "w.pth", official(network(TINY)))
    before = torch.random.get_rng_state()
    load_checkpoint(path, TINY)
    assert torch.equal(before, torch.random.get_rng_state())


# --- parts, mixtures, near misses --------------------------------------------------------------


def test_a_backbone_with_the_classifier_beside_it_is_a_whole_network(tmp_path):
    """`backbone.` goes where only `linear` or `head.fc` lacks it."""
    for layout, head in ((official, "linear."), (timm, "head.fc.")):
        state = layout(network(TINY))
        content = {n if n.startswith(head) else f"backbone.{n}": t for n, t in state.items()}
        loaded = load_checkpoint(saved(tmp_path / "w.pth", content), TINY)
        assert ("backbone.",) == loaded.removed.prefixes
        assert_computes(network(TINY), loaded)


def test_a_backbone_without_a_classifier_is_refused_in_its_own_names(tmp_path):
    """The file's own name of what is missing is used."""
    state = {n: t for n, t in timm(network(TINY)).items() if not n.startswith("head")}
    assert (
        "is a RepVGG-tiny without a classifier (head.fc.weight and head.fc.bias); save the whole "
        "network"
    ) == refusal(saved(tmp_path / "w.pth", state))


def test_a_network_around_a_backbone_is_told_and_refused(tmp_path):
    """A detector's checkpoint says where the RepVGG is and what stands beside it."""
    state = {f"backbone.{n}": t for n, t in official(network(VARIANTS["A0"])).items()}
    state |= {"neck.conv.weight": torch.ones(1), "bbox_head.bias": torch.ones(1)}
    assert (
        "holds a RepVGG-A0 under 'backbone.' beside neck, bbox_head; export the whole network "
        "from Python, or save this part alone"
    ) == refusal(saved(tmp_path / "w.pth", state), None)


def test_a_mixture_of_train_and_deploy_form_is_refused_by_name(tmp_path):
    """Blocks of either form are named, a few of each."""
    module = network(TINY)
    fused = reparameterize(module)
    state = official(module)
    for name in [name for name in state if name.startswith("stage2.0.")]:
        del state[name]
    state |= {n: t for n, t in official(fused).items() if n.startswith("stage2.0.")}
    path = saved(tmp_path / "w.pth", state)
    mixture = (
        "mixes deploy form (a fused kernel in stage2.0) and train form (branches in stage0, "
        "stage1.0, stage1.1 and 5 more); save the network in one form"
    )
    assert mixture == refusal(path, None)
    assert f"is not RepVGG-tiny and fits no other variant; {mixture}" == refusal(path)


def test_a_near_miss_names_the_variant_and_every_key(tmp_path):
    """Three keys off B1g2: what is missing, what is misshapen, what is too many."""
    with torch.device("meta"):
        state = RepVGG(VARIANTS["B1g2"], num_classes=2).state_dict()
        del state["stage1.2.rbr_identity.bias"]
        state["stage1.1.rbr_dense.conv.weight"] = torch.empty(128, 128, 3, 3)
        state["stage2.3.rbr_5x5.weight"] = torch.empty(256)
    path = saved(tmp_path / "w.pth", state)
    near = (
        "fits B1g2 but for 3 keys: stage1.2.rbr_identity.bias is missing; stage2.3.rbr_5x5.weight "
        "is not expected; stage1.1.rbr_dense.conv.weight is [128, 128, 3, 3], not [128, 64, 3, 3]"
    )
    assert near == refusal(path, None)
    assert f"is not RepVGG-A0; it {near}" == refusal(path, VARIANTS["A0"])


def test_a_near_miss_speaks_in_the_names_of_the_file(tmp_path):
    """A timm file hears of stages and conv_kxk."""
    with torch.device("meta"):
        state = timm(RepVGG(VARIANTS["A1"], num_classes=2))
    del state["stages.2.3.conv_kxk.bn.weight"]
    message = refusal(saved(tmp_path / "w.pth", state), None)
    assert "fits A1 but for 1 key: stages.2.3.conv_kxk.bn.weight is missing" == message


def test_many_differences_are_counted_and_three_are_shown(tmp_path):
    """The message stays one line."""
    with torch.device("meta"):
        state = RepVGG(VARIANTS["A0"], num_classes=2).state_dict()
    lost = [name for name in state if name.endswith("rbr_1x1.bn.bias")][:5]
    for name in lost:
        del state[name]
    shown = "; ".join(f"{name} is missing" for name in lost[:3])
    message = refusal(saved(tmp_path / "w.pth", state), None)
    assert f"fits A0 but for 5 keys: {shown}; and 2 more" == message


@pytest.mark.parametrize(("lost", "near"), [(1, True), (2, False)])
def test_a_tenth_of_the_tensors_is_the_limit_of_a_near_miss(tmp_path, lost, near):
    """Of A0's 288 tensors without a classifier, 22 missing ones are near and 44 are not."""
    with torch.device("meta"):
        state = RepVGG(VARIANTS["A0"], num_classes=2).state_dict()
    ends = ("rbr_1x1.bn.bias", "rbr_1x1.bn.weight")[:lost]
    state = {name: tensor for name, tensor in state.items() if not name.endswith(ends)}
    message = refusal(saved(tmp_path / "w.pth", state), None)
    assert message.startswith("fits A0 but for 22 keys: " if near else "fits no RepVGG variant; ")


def test_one_tensor_under_two_names_is_refused(tmp_path):
    """timm's and our name for the same tensor cannot both be right."""
    state = timm(network(TINY))
    state["stage0.rbr_dense.conv.weight"] = state["stem.conv_kxk.conv.weight"] + 1
    assert (
        "has two names for one tensor: stem.conv_kxk.conv.weight and stage0.rbr_dense.conv.weight"
    ) == refusal(saved(tmp_path / "w.pth", state))


def test_blocks_without_identity_branches_are_a_miss_and_not_another_style(tmp_path):
    """An identity without BatchNorm has no tensors, so its absence is not taken for one."""
    state = {n: t for n, t in official(network(TINY)).items() if "rbr_identity" not in n}
    message = refusal(saved(tmp_path / "w.pth", state))
    assert message.endswith("the first: stage1.1.rbr_identity.weight is missing")
