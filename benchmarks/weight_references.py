"""Small reference models for ``weights.py``: one for each layout, with random parameters and statistics.

The builders are those of the parity tests, in ``tests/``. Where the original is in no package index, its place takes
a model in Flax or PyTorch written after it, or timm's own reader of its files.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

FLAX, TORCH = "flax", "torch"  # oracles of our own, in the library that is named
Made = tuple[Path, Any]  # the file, and what the reference gives: an array, or a detector's logits and boxes


# Layouts whose rules are compared by name alone, in tests/test_pretrained_*.py: Scenic's DETR, CenterNet, detectron2
# and mmdet are in no package that installs, and the others differ from measured ones in the backbone's names alone.
# The models of torchvision's detectors, of all segmenters and of text are compared in tests/test_*_parity.py.
NAMES_ONLY = (
    "centernet_dla", "centernet_hourglass", "centernet_resnet", "detectron2_rcnn", "detectron2_vitdet",
    "mmdet_rcnn", "torchvision_rcnn",
    "facebook_detr_panoptic", "hf_deformable_detr", "hf_detr_panoptic", "scenic_detr",
    "hf_upernet_convnext", "hf_upernet_resnet", "hf_upernet_swin", "milesial_unet",
    "torchvision_deeplabv3", "torchvision_fcn",
    "hf_bert", "hf_bert_classifier", "hf_bert_classifier_backbone", "hf_bert_encoder", "hf_bert_encoder_backbone",
    "hf_git", "hf_t5", "hf_t5_encoder",
    "hf_clip", "hf_siglip", "openai_clip_vit", "openai_clip_resnet",
    "open_clip_vit", "open_clip_resnet",
    "hf_mae", "mae_encoder", "mae_pretraining",
    "hf_owlvit", "hf_owlv2", "scenic_owlvit", "scenic_owlv2",
)  # fmt: skip


class Case(NamedTuple):
    """A layout, the library of its reference, our small model, and how both are made."""

    layout: str
    library: str
    row: Callable[..., Any]
    """Builder of our model."""
    make: Callable[[Path, np.ndarray], Made]
    """Writes the reference's file into a folder and runs the reference on images."""
    size: tuple[int, int] = (16, 16)
    headless: bool = False
    """The file has no last layer: pooled features are compared, and not logits."""
    given: bool = False
    """The names are shared with another layout, so that ``layout=...`` chooses it."""
    sized: bool = False
    """Our model takes images of one size, which has to be said."""
    scale: float = 1.0
    """Standard deviation of the images."""
    detector: bool = False
    """Logits and boxes of the last layer are compared."""
    prompted: bool = False
    """Three masks of ``clicks``, and the IoU that is expected of them, are compared."""


def torch_outputs(module: Any, images: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        outputs = module(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    return np.asarray(getattr(outputs, "logits", outputs))


def save_state(module: Any, folder: Path) -> Path:
    return save_arrays({name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}, folder)


def save_arrays(arrays: dict[str, np.ndarray], folder: Path) -> Path:
    from safetensors.numpy import save_file

    file = folder / "model.safetensors"
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, file)
    return file


def published(build: Callable[[], Any], folder: Path, images: np.ndarray) -> Made:
    """A module that its own library saves: its state, or with a config where it has ``save_pretrained``."""
    module = build().eval()
    if hasattr(module, "save_pretrained"):
        module.save_pretrained(folder)
        return folder, torch_outputs(module, images)
    return save_state(module, folder), torch_outputs(module, images)


def cases() -> list[Case]:
    """Every layout but eqvision's own and ``NAMES_ONLY``, once or more."""
    from benchmarks.detector_references import detector_cases
    from benchmarks.prompted_references import sam_cases

    return [*_resnet(), *_bit(), *_timm_vit(), *_facebook_vit(), *_hf_vit(), *_flax_vit(), *_mixer_and_hybrid(),
            *_convnext(), *_swin(), *detector_cases(), *sam_cases()]  # fmt: skip


def _resnet() -> list[Case]:
    import test_pretrained_resnet as source
    from resnet_references import randomised

    from eqvision.backbones.resnet import DEPTHS
    from eqvision.classifiers import resnet_cifar_classifier, resnet_classifier

    DEPTHS.update({12: (source.BLOCKS, False), 17: (source.BLOCKS, True)})

    def case(layout: str, library: str, build: Callable[[str], Any], name: str) -> Case:
        cifar = functools.partial(resnet_cifar_classifier, 14)
        row = cifar if name == "toy_cifar" else functools.partial(resnet_classifier, source.TOYS[name])
        return Case(layout, library, row, functools.partial(published, lambda: randomised(build(name))), (32, 32))

    return [
        case("torchvision_resnet", "torchvision", source.torchvision_resnet, "toy_bottleneck"),
        case("torchvision_resnet", "timm", source.timm_resnet, "toy_bottleneck"),
        case("torchvision_resnet", "torchvision", source.torchvision_resnet, "toy_basic"),
        case("hf_resnet", "transformers", source.hf_resnet, "toy_bottleneck"),
        case("akamaster_resnet_cifar", TORCH, source.akamaster_resnet, "toy_cifar"),
    ]


def _bit() -> list[Case]:
    import test_pretrained_bit as source
    from resnet_references import randomised

    from eqvision.backbones.bit import BIT_DEPTHS
    from eqvision.classifiers import bit_classifier

    BIT_DEPTHS[17] = source.BLOCKS
    row, small = functools.partial(bit_classifier, 17, 1), source.SMALL

    def google(folder: Path, images: np.ndarray) -> Made:
        file = folder / "BiT.npz"
        np.savez(file, **source.google_names(randomised(source.timm_bit(), kernel_scale=small)))
        module = randomised(source.timm_bit(eps=1e-10), seed=1)
        module.load_pretrained(str(file))
        return file, torch_outputs(module, images)

    def made(build: Callable[[], Any]) -> Callable[[Path, np.ndarray], Made]:
        return functools.partial(published, lambda: randomised(build(), kernel_scale=small))

    return [
        Case("timm_bit", "timm", row, made(source.timm_bit), (32, 32), scale=source.DARK),
        Case("hf_bit", "transformers", row, made(source.hf_bit), (32, 32), scale=source.DARK),
        Case("google_bit", "timm", row, google, (32, 32), scale=source.DARK),
    ]


def _timm_vit() -> list[Case]:
    import vit_references as source

    def made(name: str) -> Callable[[Path, np.ndarray], Made]:
        return functools.partial(published, functools.partial(source.timm_model, name))

    return [
        Case(source.DIALECTS[name].layout, "timm", _vit_row(source.DIALECTS[name].ours), made(name))
        for name in ("token", "gap_fc_norm", "distilled", "reg_gap", "dinov2_reg", "dinov2_giant")
    ]


def _vit_row(options: dict[str, Any]) -> Callable[..., Any]:
    from eqvision.backbones.vit import SIZES, ViTSize
    from eqvision.classifiers import vit_classifier

    SIZES["toy"] = ViTSize(width=32, depth=3, num_heads=4, mlp_dim=48)
    SIZES["toy_gated"] = ViTSize(width=32, depth=3, num_heads=4, mlp_dim=24)
    return functools.partial(vit_classifier, "toy_gated" if "mlp" in options else "toy", 4, **options)


def _facebook_vit() -> list[Case]:
    import test_pretrained_vit_facebook as source
    import vit_references as timm

    def deit3(folder: Path, images: np.ndarray) -> Made:
        module = timm.timm_model("deit3")
        names = {"ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"}
        tensors = timm.numpy_state(module)
        for theirs, ours in names.items():
            tensors = {name.replace(theirs, ours): array for name, array in tensors.items()}
        return save_arrays(tensors, folder), torch_outputs(module, images)

    def mae(folder: Path, images: np.ndarray) -> Made:
        module = timm.timm_model("token")
        tensors = timm.without(timm.numpy_state(module), "head.weight", "head.bias")
        return save_arrays({**tensors, **source.DECODER}, folder), source.pooled_by_timm(module, images)[:, :32]

    def dinov2(name: str, linear: bool, folder: Path, images: np.ndarray) -> Made:
        row = source.DINOV2[name]
        tensors = source.in_dinov2_names(timm.numpy_state(timm.timm_model(row.timm)), gated=name == "giant")
        pooled = source.pooled_by_timm(source.read_by_timm(dict(tensors), timm.timm_model(row.timm, seed=3)), images)
        if not linear:
            return save_arrays(tensors, folder), pooled
        weight = np.random.default_rng(2).normal(size=(5, 64)).astype(np.float32)
        head = {"linear_head.weight": weight, "linear_head.bias": weight[:, 0].copy()}
        hub = {f"backbone.{name}": array for name, array in tensors.items()}
        return save_arrays({**hub, **head}, folder), pooled @ weight.T + weight[:, 0]

    def dinov2_case(layout: str, name: str, linear: bool = False) -> Case:
        row = _vit_row({"pool": "token_mean", "layer_scale": 1e-5, **source.DINOV2[name].ours})
        return Case(layout, "timm", row, functools.partial(dinov2, name, linear), headless=not linear)

    tuned = functools.partial(published, functools.partial(timm.timm_model, "mae_finetuned"))
    return [
        Case("facebook_vit", "timm", _vit_row(timm.DIALECTS["mae_finetuned"].ours), tuned, given=True),
        Case("facebook_deit3", "timm", _vit_row(timm.DIALECTS["deit3"].ours), deit3),
        Case("mae_vit", "timm", _vit_row({}), mae, headless=True),
        dinov2_case("dinov2_vit", "plain"),
        dinov2_case("dinov2_vit", "giant"),
        dinov2_case("dinov2_vit_reg", "reg"),
        dinov2_case("dinov2_linear", "plain", linear=True),
        dinov2_case("dinov2_linear_reg", "reg", linear=True),
    ]


def _hf_vit() -> list[Case]:
    import test_pretrained_vit_hf as source

    from eqvision.backbones.vit import SIZES, ViTSize

    SIZES["toy_hf"] = ViTSize(source.WIDTH, 3, 2, 64)
    side = (source.SIDE, source.SIDE)

    def bare(config: str, options: dict[str, Any], name: str, folder: Path, images: np.ndarray) -> Made:
        import torch

        module = source.theirs(config, options, name)
        module.save_pretrained(folder)
        with torch.no_grad():
            tokens = module(source.to_torch(images)).last_hidden_state.numpy()
        start = 1 + options.get("num_register_tokens", 0)
        mean = tokens[:, start:].mean(axis=1)
        return folder, np.concatenate([tokens[:, 0], mean], axis=1) if "Dinov2" in name else tokens[:, 0]

    found = []
    for layout, config, options, name, row in source.CLASSIFIERS.values():
        made = functools.partial(published, functools.partial(source.theirs, config, options, name))
        found.append(Case(layout, "transformers", row, made, side))
    for key in ("vit", "dinov2", "dinov2_registers"):
        layout, config, options, name, row = source.BACKBONES[key]
        made = functools.partial(bare, config, options, name)
        found.append(Case(layout, "transformers", row, made, side, headless=True))
    return found


def _flax_vit() -> list[Case]:
    import flax_vit
    import test_pretrained_vit_google as source

    from eqvision.backbones.vit import SIZES, ViTSize

    SIZES["toy_google"] = ViTSize(source.WIDTH, 3, 2, 64)
    side = (source.SIDE, source.SIDE)

    def made(options: dict[str, Any], folder: Path, images: np.ndarray) -> Made:
        reference, parameters = source.oracle(options, images)
        np.savez(folder / "model.npz", **parameters)
        return folder / "model.npz", np.asarray(flax_vit.run(reference, parameters, images)[0])

    def siglip(stacked: bool, folder: Path, images: np.ndarray) -> Made:
        """The head that gives the pooled features themselves is not written."""
        options = {"positions": "outside", "pool": "map", "stacked": stacked, "classes": source.WIDTH}
        reference, parameters = source.oracle(options, images)
        parameters["head/kernel"] = np.eye(source.WIDTH, dtype=np.float32)
        parameters["head/bias"] = np.zeros(source.WIDTH, np.float32)
        written = {f"params/img/{name}": array for name, array in parameters.items() if not name.startswith("head/")}
        text = {"params/txt/head/kernel": np.zeros((4, 4)), "params/t": np.zeros(1), "params/b": np.zeros(1)}
        np.savez(folder / "model.npz", **written, **text)
        return folder / "model.npz", np.asarray(flax_vit.run(reference, parameters, images)[0])

    found = [
        Case(layout, FLAX, row, functools.partial(made, options), side)
        for layout, options, row in source.CASES.values()
    ]
    for layout, stacked in (("big_vision_siglip", False), ("big_vision_siglip_stacked", True)):
        found.append(Case(layout, FLAX, source.attentive, functools.partial(siglip, stacked), side, headless=True))
    return found


def _mixer_and_hybrid() -> list[Case]:
    import test_pretrained_hybrid as hybrid
    import test_pretrained_mixer as mixer

    from eqvision.backbones.hybrid import HYBRID_SIZES
    from eqvision.backbones.mixer import MIXER_SIZES
    from eqvision.backbones.vit import SIZES
    from eqvision.classifiers import hybrid_classifier, mixer_classifier

    MIXER_SIZES["toy"] = mixer.SIZE

    def google_mixer(folder: Path, images: np.ndarray) -> Made:
        path, tensors = mixer.google_file(folder, np.random.default_rng(0))
        return path, np.asarray(mixer.flax_mixer().apply({"params": mixer.nested(tensors)}, images)[0])

    def google_hybrid(folder: Path, images: np.ndarray) -> Made:
        path, tensors = hybrid.google_file(folder, np.random.default_rng(0))
        oracle = hybrid.flax_hybrid(hybrid.STEMS["toy_hybrid"], None)
        return path, np.asarray(oracle.apply({"params": hybrid.nested(tensors)}, images)[0])

    # The tables of sizes have a "toy" already.
    SIZES["toy_in_hybrid"] = hybrid.VIT
    HYBRID_SIZES["toy_hybrid"] = hybrid.STEMS["toy_hybrid"]._replace(vit="toy_in_hybrid")
    row = functools.partial(hybrid_classifier, "toy_hybrid")
    mixer_row = functools.partial(mixer_classifier, "toy", mixer.PATCH)
    side = (hybrid.IMAGE, hybrid.IMAGE)
    timm_hybrid = functools.partial(published, functools.partial(hybrid.timm_hybrid, "toy_hybrid"))
    return [
        Case("google_mixer", FLAX, mixer_row, google_mixer, sized=True),
        Case("timm_mixer", "timm", mixer_row, functools.partial(published, mixer.timm_mixer), sized=True),
        Case("google_hybrid", FLAX, row, google_hybrid, side),
        Case("timm_hybrid", "timm", row, timm_hybrid, side),
    ]


def _convnext() -> list[Case]:
    import test_pretrained_convnext as source

    from eqvision.backbones.convnext import CONVNEXT_SIZES, ConvNeXtSize
    from eqvision.classifiers import convnext_classifier

    CONVNEXT_SIZES["toy_narrow"] = ConvNeXtSize(source.DEPTHS, source.NARROW)
    CONVNEXT_SIZES["toy_wide"] = ConvNeXtSize(source.DEPTHS, source.WIDE)

    def case(layout: str, library: str, build: Callable[[str], Any], name: str) -> Case:
        size, version = source.TOYS[name]
        row = functools.partial(convnext_classifier, size, version=version)
        made = functools.partial(published, lambda: source.randomised(build(name)))
        return Case(layout, library, row, made, (38, 45))

    def bare(folder: Path, images: np.ndarray) -> Made:
        import torch

        module = source.randomised(source.hf_model("toy_v1")).convnext
        module.save_pretrained(folder)
        with torch.no_grad():
            return folder, module(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).pooler_output.numpy()

    row = functools.partial(convnext_classifier, "toy_narrow")
    return [
        case("timm_convnext", "timm", source.timm_model, "toy_v1"),
        case("timm_convnext", "timm", source.timm_model, "toy_wide_v2"),
        case("facebook_convnext", TORCH, source.facebook_model, "toy_v1"),
        case("facebook_convnext", TORCH, source.facebook_model, "toy_v2"),
        case("torchvision_convnext", "torchvision", source.torchvision_model, "toy_v1"),
        case("hf_convnext", "transformers", source.hf_model, "toy_v1"),
        case("hf_convnextv2", "transformers", source.hf_model, "toy_v2"),
        Case("hf_convnext_backbone", "transformers", row, bare, (38, 45), headless=True),
    ]


def _swin() -> list[Case]:
    import test_pretrained_swin as source

    from eqvision.backbones.swin import SWIN_SIZES, SwinSize
    from eqvision.classifiers import swin_classifier

    SWIN_SIZES["toy"] = SwinSize(source.WIDTH, source.DEPTHS, source.HEADS)
    row, size = functools.partial(swin_classifier, "toy", source.WINDOW), (36, 44)
    divided = (48, 48)  # microsoft's code takes no other maps than those that windows divide

    def microsoft(folder: Path, images: np.ndarray) -> Made:
        module = source.timm_swin(divided)
        tensors = {source.microsoft_name(name): value.numpy() for name, value in module.state_dict().items()}
        return save_arrays(tensors, folder), torch_outputs(module, images)

    def bare(folder: Path, images: np.ndarray) -> Made:
        import torch

        module = source.hf_swin(size, "SwinModel")
        module.save_pretrained(folder)
        with torch.no_grad():
            return folder, module(source.to_torch(images)).pooler_output.numpy()

    libraries = (("timm_swin", "timm"), ("torchvision_swin", "torchvision"), ("hf_swin", "transformers"))
    builds = (source.timm_swin, source.torchvision_swin, source.hf_swin)
    return [
        *(
            Case(layout, library, row, functools.partial(published, functools.partial(build, size)), size)
            for (layout, library), build in zip(libraries, builds, strict=True)
        ),
        Case("microsoft_swin", "timm", row, microsoft, divided),
        Case("hf_swin_backbone", "transformers", row, bare, size, headless=True),
    ]
