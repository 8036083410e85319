"""Layouts of ConvNeXt V1 and V2 against timm, torchvision, transformers and the authors' names."""

import functools
import itertools
import json
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqvision.backbones import CONVNEXT_SIZES, ConvNeXtSize
from eqvision.classifiers import convnext_classifier
from eqvision.pretrained import LAYOUTS, WeightsError, load, to_layout
from eqvision.pretrained.leaf_names import named_arrays
from eqvision.zoo import MODELS, create

CLASSES = 5
# Run once: compiling it well takes twice as long and gains nothing.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
DEPTHS = (1, 2, 1, 1)
NARROW, WIDE = (8, 12, 16, 20), (96, 8, 12, 16)
TOYS = {
    "toy_v1": ("toy_narrow", 1),
    "toy_v2": ("toy_narrow", 2),
    "toy_wide_v1": ("toy_wide", 1),
    "toy_wide_v2": ("toy_wide", 2),
}


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    monkeypatch.setitem(CONVNEXT_SIZES, "toy_narrow", ConvNeXtSize(DEPTHS, NARROW))
    monkeypatch.setitem(CONVNEXT_SIZES, "toy_wide", ConvNeXtSize(DEPTHS, WIDE))
    for name, (size, version) in TOYS.items():
        monkeypatch.setitem(MODELS, name, functools.partial(convnext_classifier, size, version=version))


def widths_of(name):
    return CONVNEXT_SIZES[TOYS[name][0]].widths


def is_v2(name):
    return TOYS[name][1] == 2


# The references, built small


def timm_model(name):
    from timm.models.convnext import ConvNeXt

    widths = widths_of(name)
    v2 = {"use_grn": True, "ls_init_value": None} if is_v2(name) else {}
    # As timm has it: 1x1 convolutions in the sizes below tiny.
    return ConvNeXt(num_classes=CLASSES, depths=DEPTHS, dims=widths, conv_mlp=widths[0] < 96, **v2)


def torchvision_model(name):
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    widths = (*widths_of(name), None)
    settings = [CNBlockConfig(widths[i], widths[i + 1], depth) for i, depth in enumerate(DEPTHS)]
    return ConvNeXt(settings, num_classes=CLASSES)


def hf_model(name, **options):
    import transformers

    v2 = is_v2(name)
    config = transformers.ConvNextV2Config if v2 else transformers.ConvNextConfig
    model = transformers.ConvNextV2ForImageClassification if v2 else transformers.ConvNextForImageClassification
    return model(config(depths=list(DEPTHS), hidden_sizes=list(widths_of(name)), num_labels=CLASSES, **options))


def facebook_model(name):
    """The computation and the names of models/convnext.py and models/convnextv2.py of the authors' repositories."""
    import torch

    nn = torch.nn

    class Norm(nn.LayerNorm):
        """Over the channels of a map (n, c, h, w)."""

        def forward(self, x):
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    class GRN(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.gamma = nn.Parameter(torch.zeros(1, 1, 1, width))
            self.beta = nn.Parameter(torch.zeros(1, 1, 1, width))

        def forward(self, x):
            norms = x.square().sum((1, 2), keepdim=True).sqrt()
            return self.gamma * x * norms / (norms.mean(-1, keepdim=True) + 1e-6) + self.beta + x

    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
            self.norm = nn.LayerNorm(width, eps=1e-6)
            self.pwconv1 = nn.Linear(width, 4 * width)
            self.pwconv2 = nn.Linear(4 * width, width)
            if is_v2(name):
                self.grn = GRN(4 * width)
            else:
                self.gamma = nn.Parameter(torch.ones(width))

        def forward(self, x):
            y = nn.functional.gelu(self.pwconv1(self.norm(self.dwconv(x).permute(0, 2, 3, 1))))
            y = self.pwconv2(self.grn(y)) if is_v2(name) else self.gamma * self.pwconv2(y)
            return x + y.permute(0, 3, 1, 2)

    class Net(nn.Module):
        def __init__(self, widths):
            super().__init__()
            conv = nn.Conv2d
            self.downsample_layers = nn.ModuleList(
                [nn.Sequential(conv(3, widths[0], 4, 4), Norm(widths[0], eps=1e-6))]
                + [nn.Sequential(Norm(a, eps=1e-6), conv(a, b, 2, 2)) for a, b in itertools.pairwise(widths)]
            )
            self.stages = nn.ModuleList(
                nn.Sequential(*(Block(width) for _ in range(depth)))
                for depth, width in zip(DEPTHS, widths, strict=True)
            )
            self.norm = nn.LayerNorm(widths[-1], eps=1e-6)
            self.head = nn.Linear(widths[-1], CLASSES)

        def forward(self, x):
            for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
                x = stage(downsample(x))
            return self.head(self.norm(x.mean((2, 3))))

    return Net(widths_of(name))


def hf_stages(module):
    return list(getattr(module, module.base_model_prefix).encoder.stages)


def direct_stages(module):
    return list(module.stages)


def torchvision_stages(module):
    return [module.features[i] for i in (1, 3, 5, 7)]


REFERENCES = [
    ("toy_v1", "timm_convnext", timm_model, direct_stages),
    ("toy_v2", "timm_convnext", timm_model, direct_stages),
    ("toy_wide_v1", "timm_convnext", timm_model, direct_stages),
    ("toy_wide_v2", "timm_convnext", timm_model, direct_stages),
    ("toy_v1", "facebook_convnext", facebook_model, direct_stages),
    ("toy_v2", "facebook_convnext", facebook_model, direct_stages),
    ("toy_v1", "torchvision_convnext", torchvision_model, torchvision_stages),
    ("toy_v1", "hf_convnext", hf_model, hf_stages),
    ("toy_v2", "hf_convnextv2", hf_model, hf_stages),
]


def randomised(module, seed=0):
    """All parameters drawn anew, none zero or one; in evaluation mode."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            fan_in = math.prod(tensor.shape[1:]) if tensor.ndim > 1 and "grn" not in name else 4
            about = 1.0 if tensor.ndim == 1 and name.endswith("weight") else 0.0
            tensor.copy_(about + noise / math.sqrt(fan_in))
    return module.eval()


def saved(module, folder):
    """As its library publishes it: ``save_pretrained`` with a config, or the state dict."""
    from safetensors.torch import save_file

    if hasattr(module, "save_pretrained"):
        module.save_pretrained(folder)
        return folder
    path = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, path)
    return path


def run(module, stages, images):
    """Logits and the outputs of ``stages``, channels last, in double precision. ``module`` stays double."""
    import torch

    outputs = []
    handles = [stage.register_forward_hook(lambda _, __, output: outputs.append(output)) for stage in stages]
    logits = module.double()(torch.from_numpy(images.astype(np.float64).transpose(0, 3, 1, 2)))
    for handle in handles:
        handle.remove()
    maps = tuple(output.detach().numpy().transpose(0, 2, 3, 1) for output in outputs)
    return getattr(logits, "logits", logits), maps


def images_for(rng, height=70, width=45):
    """Sizes that no stride divides."""
    return rng.normal(size=(2, height, width, 3)).astype(np.float32)


def predicted(model, state, images):
    return compiled(lambda m, s, x: (m(x, s)[0], m.intermediates(x, s, (0, 1, 2, 3))))(model, state, images)


@pytest.mark.parity
@pytest.mark.parametrize(("name", "layout", "build", "stages"), REFERENCES)
def test_outputs_and_back(name, layout, build, stages, tmp_path, rng, assert_close):
    torch = pytest.importorskip("torch")
    module, images = randomised(build(name)), images_for(rng)
    model, state = load(name, saved(module, tmp_path))
    ours = predicted(model, state, images)
    logits, maps = run(module, stages(module), images)
    assert_close(ours, (logits.detach().numpy(), maps), 1e-5)

    other = randomised(build(name), seed=1)
    tensors = to_layout(model, state, LAYOUTS[layout])
    other.load_state_dict({key: torch.from_numpy(array) for key, array in tensors.items()}, strict=True)
    assert_close(ours[0], run(other, [], images)[0].detach().numpy(), 1e-5)


@pytest.mark.parity
@pytest.mark.parametrize(("name", "layout", "build", "stages"), [REFERENCES[0], REFERENCES[1]])
def test_gradients(name, layout, build, stages, tmp_path, rng, assert_close):
    torch = pytest.importorskip("torch")
    module, images = randomised(build(name)), images_for(rng, 64, 32)
    coefficients = rng.normal(size=(2, CLASSES))
    model, state = load(name, saved(module, tmp_path))
    (run(module, [], images)[0] * torch.from_numpy(coefficients)).sum().backward()
    theirs = {key: parameter.grad.numpy() for key, parameter in module.named_parameters()}

    def loss(model, images):
        return jnp.sum(model(images, state, train=True)[0] * coefficients.astype(np.float32))

    ours = compiled(jax.grad(loss))(model, images)
    assert_close(to_layout(ours, state, LAYOUTS[layout]), theirs, 1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["toy_v1", "toy_v2"])
def test_timm_reads_the_authors_names_as_we_do(name, rng, assert_close):
    """timm's own reader of the authors' files, on tensors that we write under their names."""
    torch = pytest.importorskip("torch")
    from timm.models.convnext import checkpoint_filter_fn

    model, state = noisy(name)
    tensors = to_layout(model, state, LAYOUTS["facebook_convnext"])
    module, images = timm_model(name).eval(), images_for(rng)
    given = {"model": {key: torch.from_numpy(array) for key, array in tensors.items()}}
    module.load_state_dict(checkpoint_filter_fn(given, module), strict=True)
    assert_close(predicted(model, state, images)[0], run(module, [], images)[0].detach().numpy(), 1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["toy_v1", "toy_v2"])
def test_config_gives_activation_and_epsilon(name, tmp_path, rng, assert_close):
    pytest.importorskip("torch")
    module = randomised(hf_model(name, layer_norm_eps=0.1, hidden_act="gelu_new"))
    model, state = load(name, saved(module, tmp_path))
    assert model.head.norm.eps == 0.1
    images = images_for(rng)
    assert_close(predicted(model, state, images)[0], run(module, [], images)[0].detach().numpy(), 1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["toy_v1", "toy_v2"])
def test_bare_models_of_transformers(name, tmp_path, rng, assert_close):
    """Files of ``ConvNextModel`` and ``ConvNextV2Model``: no classifier, and names without the model's prefix."""
    torch = pytest.importorskip("torch")
    module, images = randomised(hf_model(name)).base_model, images_for(rng)
    with pytest.raises(WeightsError, match=r"has no classification layer .* give num_classes"):
        load(name, saved(module, tmp_path))
    model, state = load(name, tmp_path, num_classes=3)
    theirs = module.double()(torch.from_numpy(images.astype(np.float64).transpose(0, 3, 1, 2)))
    ours = compiled(lambda m, s, x: (m.pooled(x, s), m.intermediates(x, s, (-1,))[0]))(model, state, images)
    last = theirs.last_hidden_state.detach().numpy().transpose(0, 2, 3, 1)
    assert_close(ours, (theirs.pooler_output.detach().numpy(), last), 1e-5)


# Without the references: files that we write


def noisy(name, **options):
    model, state = create(name, num_classes=CLASSES, key=jax.random.key(0), **options)
    leaves, tree = jax.tree.flatten(model)
    rng = np.random.default_rng(3)
    return jax.tree.unflatten(
        tree, [leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
    ), state


def written(name, layout, folder):
    from safetensors.numpy import save_file

    model, state = noisy(name)
    save_file(to_layout(model, state, LAYOUTS[layout]), folder / "model.safetensors")
    return folder / "model.safetensors", model, state


WRITTEN = [
    *(("toy_v1", layout) for layout in ("timm_convnext", "facebook_convnext", "torchvision_convnext", "hf_convnext")),
    *(("toy_v2", layout) for layout in ("timm_convnext", "facebook_convnext", "hf_convnextv2")),
    ("toy_v1", "hf_convnext_backbone"),
    ("toy_v2", "hf_convnext_backbone"),
]


@pytest.mark.parametrize(("name", "layout"), WRITTEN)
def test_written_and_read_again(name, layout, tmp_path):
    """Exactly one layout recognises the file, and every leaf comes back as it was."""
    path, model, state = written(name, layout, tmp_path)
    tensors = to_layout(model, state, LAYOUTS[layout])
    assert [each.name for each in LAYOUTS.values() if each.describes(model) and each.recognises(tensors)] == [layout]
    again = named_arrays(*load(name, path))
    assert list(again) == list(named_arrays(model, state))
    assert all(np.array_equal(again[key], leaf) for key, leaf in named_arrays(model, state).items())


def test_narrow_models_of_timm_have_convolutions_and_wide_ones_matrices():
    key = "stages.0.blocks.0.mlp.fc1.weight"
    shapes = [to_layout(*noisy(name), LAYOUTS["timm_convnext"])[key].shape for name in ("toy_v1", "toy_wide_v1")]
    assert shapes == [(32, 8, 1, 1), (384, 96)]


@pytest.mark.parametrize("name", ["toy_v1", "toy_v2"])
def test_the_last_norm_of_transformers_has_another_epsilon(name, tmp_path):
    layout = "hf_convnextv2" if is_v2(name) else "hf_convnext"
    path, _, _ = written(name, layout, tmp_path)
    assert load(name, path)[0].head.norm.eps == 1e-12
    (tmp_path / "config.json").write_text(json.dumps({"layer_norm_eps": 1e-5, "hidden_act": "relu"}))
    model, _ = load(name, path)
    assert (model.head.norm.eps, model.backbone.stages[0].blocks.activation) == (1e-5, "relu")


def test_config_of_another_convnext(tmp_path):
    path, _, _ = written("toy_v1", "hf_convnext", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"patch_size": 2}))
    with pytest.raises(WeightsError, match=r"patch_size = 2, expected 4"):
        load("toy_v1", path)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_act": "gelu_neu"}))
    with pytest.raises(ValueError, match=r"hidden_act of config.json 'gelu_neu' does not exist; nearest: gelu_new"):
        load("toy_v1", path)


@pytest.mark.parametrize(("name", "layout"), WRITTEN)
def test_other_classes_and_channels(name, layout, tmp_path, caplog):
    path, model, _ = written(name, layout, tmp_path)
    with caplog.at_level(logging.INFO, "eqvision.pretrained"):
        other, _ = load(name, path, num_classes=3, in_channels=1)
    assert "the layer for 5 classes is dropped" in caplog.text
    assert "backbone.stem.conv.weight adapted from 3 to 1 channels" in caplog.text
    assert other.head.linear.weight.shape == (20, 3)
    assert np.array_equal(other.head.norm.weight, model.head.norm.weight)
    expected = np.asarray(model.backbone.stem.conv.weight).sum(2, keepdims=True)
    np.testing.assert_allclose(other.backbone.stem.conv.weight, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("file", "layout", "name", "message"),
    [
        ("toy_v2", "timm_convnext", "toy_v1", r"5 tensors are missing:\s+stages.0.blocks.0.gamma"),
        (
            "toy_v2",
            "timm_convnext",
            "toy_v1",
            r"10 tensors belong to no part of this model:\s+stages.0.blocks.0.mlp.grn",
        ),
        ("toy_v1", "facebook_convnext", "toy_v2", r"10 tensors are missing:\s+stages.0.0.grn.gamma"),
        ("toy_v1", "hf_convnext", "toy_v2", r"is of layout hf_convnext \(.*\), which toy_v2 is not a model of"),
        (
            "toy_v1",
            "torchvision_convnext",
            "toy_wide_v1",
            r"4 tensors of layout torchvision_convnext have no legal shape",
        ),
        ("toy_v1", "timm_convnext", "convnext_tiny", r"117 tensors are missing:\s+stages.0.blocks.1.conv_dw.weight"),
    ],
)
def test_files_of_other_models_are_refused(file, layout, name, message, tmp_path):
    path, _, _ = written(file, layout, tmp_path)
    with pytest.raises(WeightsError, match=message):
        load(name, path)
