"""Hybrid ViT weights of google-research/vision_transformer and timm: loaded, compared, written out again."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from eqvision.backbones.hybrid import HYBRID_SIZES, HybridSize
from eqvision.backbones.vit import SIZES, ViTSize
from eqvision.classifiers import hybrid_classifier
from eqvision.layers import StandardizedConv
from eqvision.pretrained import LAYOUTS, WeightsError, load, to_layout
from eqvision.zoo import MODELS

CLASSES = 7
IMAGE = 32
VIT = ViTSize(width=32, depth=2, num_heads=2, mlp_dim=64)
STEMS = {"toy_hybrid": HybridSize((2, 1), "toy", 1), "toy_root": HybridSize((), "toy", 2)}


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    """A hybrid with two stages, the second of one block, and one with the root alone."""
    monkeypatch.setitem(SIZES, "toy", VIT)
    for name, size in STEMS.items():
        monkeypatch.setitem(HYBRID_SIZES, name, size)
        monkeypatch.setitem(MODELS, name, functools.partial(hybrid_classifier, name))
    monkeypatch.setitem(MODELS, "toy_in21k", functools.partial(hybrid_classifier, "toy_hybrid", pre_logits=20))


@pytest.fixture
def images(rng):
    return jnp.asarray(rng.normal(size=(2, IMAGE, IMAGE, 3)), jnp.float32)


def google_shapes(stem, pre_logits):
    """Names and shapes of the published files: group norms (1, 1, 1, c), attention with its heads apart."""
    shapes = conv_norm_shapes("", "_root", (7, 7, 3, 64))
    channels = 64
    for stage, depth in enumerate(stem.blocks):
        inner = 64 * 2**stage
        for unit in range(depth):
            start = f"block{stage + 1}/unit{unit + 1}/"
            shapes |= conv_norm_shapes(start, "1", (1, 1, channels, inner))
            shapes |= conv_norm_shapes(start, "2", (3, 3, inner, inner))
            shapes |= conv_norm_shapes(start, "3", (1, 1, inner, 4 * inner))
            if unit == 0:
                shapes |= conv_norm_shapes(start, "_proj", (1, 1, channels, 4 * inner))
            channels = 4 * inner
    grid = IMAGE // (4 * 2 ** max(0, len(stem.blocks) - 1) * stem.patch_size)
    shapes |= {"cls": (1, 1, 32), "Transformer/posembed_input/pos_embedding": (1, 1 + grid**2, 32)}
    shapes |= dense_shapes("embedding", stem.patch_size, stem.patch_size, channels, 32)
    for block in range(VIT.depth):
        shapes |= block_shapes(f"Transformer/encoderblock_{block}")
    shapes |= norm_shapes("Transformer/encoder_norm")
    if pre_logits is None:
        return shapes | dense_shapes("head", 32, CLASSES)
    return shapes | dense_shapes("pre_logits", 32, pre_logits) | dense_shapes("head", pre_logits, CLASSES)


def block_shapes(start):
    shapes, attention = {}, f"{start}/MultiHeadDotProductAttention_1"
    for part in ("query", "key", "value"):
        shapes |= {f"{attention}/{part}/kernel": (32, 2, 16), f"{attention}/{part}/bias": (2, 16)}
    shapes |= {f"{attention}/out/kernel": (2, 16, 32), f"{attention}/out/bias": (32,)}
    shapes |= norm_shapes(f"{start}/LayerNorm_0") | norm_shapes(f"{start}/LayerNorm_2")
    return (
        shapes
        | dense_shapes(f"{start}/MlpBlock_3/Dense_0", 32, 64)
        | dense_shapes(f"{start}/MlpBlock_3/Dense_1", 64, 32)
    )


def conv_norm_shapes(start, part, kernel):
    norm = (1, 1, 1, kernel[-1])
    return {f"{start}conv{part}/kernel": kernel, f"{start}gn{part}/scale": norm, f"{start}gn{part}/bias": norm}


def dense_shapes(name, *kernel):
    return {f"{name}/kernel": kernel, f"{name}/bias": kernel[-1:]}


def norm_shapes(name):
    return {f"{name}/scale": (32,), f"{name}/bias": (32,)}


def google_file(folder, rng, name="toy_hybrid", pre_logits=None):
    """Random parameters; kernels of so small a deviation that the constant added to it shows."""
    shapes = google_shapes(STEMS[name], pre_logits)
    tensors = {name: rng.normal(0, 0.02 if "conv" in name else 0.3, shape) for name, shape in shapes.items()}
    tensors = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    np.savez(folder / "hybrid.npz", **tensors)
    return folder / "hybrid.npz", tensors


@pytest.mark.parametrize(("name", "pre_logits"), [("toy_hybrid", None), ("toy_root", None), ("toy_in21k", 20)])
def test_every_tensor_of_a_google_file_has_its_place(name, pre_logits, tmp_path, rng):
    path, tensors = google_file(tmp_path, rng, "toy_root" if name == "toy_root" else "toy_hybrid", pre_logits)
    model, state = load(name, path)
    written = to_layout(model, state, LAYOUTS["google_hybrid"])
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(written[name], tensor)


def test_flat_group_norms_are_the_same(tmp_path, rng):
    path, tensors = google_file(tmp_path, rng)
    model, _ = load("toy_hybrid", path)
    np.savez(path, **{name: np.squeeze(tensor) if "gn" in name else tensor for name, tensor in tensors.items()})
    again, _ = load("toy_hybrid", path)
    jax.tree.map(np.testing.assert_array_equal, model, again)


def test_constants_of_google(tmp_path, rng):
    model, _ = load("toy_hybrid", google_file(tmp_path, rng)[0])
    for part in (model.backbone.stem.root, model.backbone.stem.stages[0].rest.conv2):
        assert (part.conv.eps, part.conv.eps_on, part.norm.eps) == (1e-5, "deviation", 1e-6)
    assert model.backbone.vit.encoder.blocks.mlp.activation == "gelu_tanh"


def test_eps_on_the_deviation(key, rng, assert_close):
    kernel = rng.normal(0, 0.01, (1, 1, 4, 2)).astype(np.float32)
    conv = StandardizedConv(4, 2, 1, eps=0.1, eps_on="deviation", key=key)
    conv = eqx.tree_at(lambda c: c.weight, conv, jnp.asarray(kernel))
    centred = kernel - kernel.mean((0, 1, 2))
    assert_close(conv(jnp.eye(4)[None, None]), (centred / (kernel.std((0, 1, 2)) + 0.1))[0][None], 1e-5)


@pytest.mark.usefixtures("unchecked")
def test_unknown_eps_on_is_refused(key):
    with pytest.raises(ValueError, match=r"eps_on 'mean' is unknown; choose from \('variance', 'deviation'\)"):
        StandardizedConv(4, 2, 1, eps_on="mean", key=key)  # pyright: ignore[reportArgumentType]


def test_a_group_norm_of_another_shape_is_refused(tmp_path, rng):
    path, tensors = google_file(tmp_path, rng)
    np.savez(path, **{**tensors, "gn_root/scale": np.ones((1, 64, 1, 1), np.float32)})
    with pytest.raises(WeightsError, match=r"(?s)stem.root.norm.weight from gn_root/scale.*expected \(1, 1, 1, 1\)"):
        load("toy_hybrid", path)


def test_another_stem_is_refused(tmp_path, rng):
    path, _ = google_file(tmp_path, rng, "toy_root")
    with pytest.raises(WeightsError, match=r"(?s)33 tensors are missing.*block1/unit1/conv1/kernel"):
        load("toy_hybrid", path)


def test_positions_are_resampled_as_google_does(tmp_path, rng, assert_close):
    from scipy.ndimage import zoom

    path, tensors = google_file(tmp_path, rng)
    model, _ = load("toy_hybrid", path, image_size=48)
    table = tensors["Transformer/posembed_input/pos_embedding"][0, 1:].reshape(4, 4, 32)
    assert_close(model.backbone.vit.position.weight, zoom(table, (1.5, 1.5, 1), order=1), 1e-6)


def test_one_layout_each(tmp_path, rng):
    _, google = google_file(tmp_path, rng)
    assert [name for name, layout in LAYOUTS.items() if layout.recognises(google)] == ["google_hybrid"]


@pytest.mark.parity
@pytest.mark.parametrize(("name", "pre_logits"), [("toy_hybrid", None), ("toy_root", None), ("toy_in21k", 20)])
def test_google_equals_flax(name, pre_logits, tmp_path, rng, images, assert_close):
    stem = "toy_root" if name == "toy_root" else "toy_hybrid"
    path, tensors = google_file(tmp_path, rng, stem, pre_logits)
    model, state = load(name, path)
    logits, features = jax.jit(flax_hybrid(STEMS[stem], pre_logits).apply)({"params": nested(tensors)}, images)
    assert_close(outputs(model, state, images), (logits, features), 1e-5)


@pytest.mark.slow
@pytest.mark.parity
def test_google_gradients_equal_flax(tmp_path, rng, images, assert_close):
    path, tensors = google_file(tmp_path, rng)
    model, state = load("toy_hybrid", path)
    weights = jnp.asarray(rng.normal(size=(2, CLASSES)), jnp.float32)
    oracle = flax_hybrid(STEMS["toy_hybrid"], None)
    ours = jax.jit(jax.grad(lambda m: jnp.sum(m(images, state)[0] * weights)))(model)
    theirs = jax.jit(jax.grad(lambda p: jnp.sum(oracle.apply({"params": p}, images)[0] * weights)))(nested(tensors))
    ours = nested(to_layout(ours, state, LAYOUTS["google_hybrid"]))
    for block in range(VIT.depth):
        parts = [g["Transformer"][f"encoderblock_{block}"]["MultiHeadDotProductAttention_1"] for g in (ours, theirs)]
        # A softmax does not depend on the bias of the keys: what is left of its gradient is rounding.
        for part in parts:
            assert np.abs(part["key"].pop("bias")).max() < 1e-5 * np.abs(part["out"]["bias"]).max()
        # Gradients of the scores nearly cancel with random weights, and are hundredths of the others: in float32 both
        # sides are 5e-6 of them from float64, where they agree to 1e-7.
        for name in ("query", "key"):
            assert_close(parts[0].pop(name), parts[1].pop(name), 1e-4)
    assert_close(ours, theirs, 1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("name", STEMS)
def test_timm_equals_timm(name, tmp_path, images, assert_close):
    import torch

    reference = timm_hybrid(name)
    model, state = load(name, timm_file(tmp_path, reference))
    with torch.no_grad():
        expected, stem = reference(nchw(images)), reference.patch_embed.backbone(nchw(images))
        options = {"output_fmt": "NLC", "return_prefix_tokens": True, "intermediates_only": True}
        blocks = reference.forward_intermediates(nchw(images), **options)
    theirs = [stem.permute(0, 2, 3, 1), *(torch.cat([prefix, block], dim=1) for block, prefix in blocks)]
    assert_close(outputs(model, state, images), (expected.numpy(), [each.numpy() for each in theirs]), 1e-5)


@pytest.mark.slow
@pytest.mark.parity
def test_timm_gradients(tmp_path, rng, images, assert_close):
    import torch

    reference = timm_hybrid("toy_hybrid")
    model, state = load("toy_hybrid", timm_file(tmp_path, reference))
    weights = rng.normal(size=(2, CLASSES)).astype(np.float32)
    ours = jax.jit(jax.grad(lambda m: jnp.sum(m(images, state)[0] * weights)))(model)
    (reference(nchw(images)) * torch.tensor(weights)).sum().backward()
    theirs = {name: parameter.grad.numpy() for name, parameter in reference.named_parameters()}
    assert_close(to_layout(ours, state, LAYOUTS["timm_hybrid"]), theirs, 1e-5)


@pytest.mark.parity
def test_timm_at_another_size(tmp_path, rng, assert_close):
    import torch
    from timm.models.vision_transformer_hybrid import checkpoint_filter_fn

    reference, larger = timm_hybrid("toy_hybrid"), timm_hybrid("toy_hybrid", image_size=48)
    model, state = load("toy_hybrid", timm_file(tmp_path, reference), image_size=48)
    larger.load_state_dict(checkpoint_filter_fn(reference.state_dict(), larger), strict=True)
    images = jnp.asarray(rng.normal(size=(2, 48, 48, 3)), jnp.float32)
    with torch.no_grad():
        assert_close(jax.jit(lambda: model(images, state)[0])(), larger(nchw(images)).numpy(), 1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("name", STEMS)
def test_written_out_timm_reads_it(name, tmp_path, images, assert_close):
    import torch

    model, state = load(name, timm_file(tmp_path, timm_hybrid(name)))
    written = to_layout(model, state, LAYOUTS["timm_hybrid"])
    assert [layout for layout in LAYOUTS if LAYOUTS[layout].recognises(written)] == ["timm_hybrid"]
    other = timm_hybrid(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
        other.load_state_dict({name: torch.tensor(tensor) for name, tensor in written.items()}, strict=True)
        assert_close(outputs(model, state, images)[0], other(nchw(images)).numpy(), 1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("name", STEMS)
def test_timm_reads_google_files_alike(name, tmp_path, rng):
    """timm's own reader of the .npz, and then our reader of timm's names, puts every number in the same place."""
    path, _ = google_file(tmp_path, rng, name)
    reference = timm_hybrid(name)
    reference.load_pretrained(str(path))
    theirs, _ = load(name, timm_file(tmp_path, reference))
    ours, _ = load(name, path)
    assert jax.tree.all(jax.tree.map(np.array_equal, jax.tree.leaves(ours), jax.tree.leaves(theirs)))


@jax.jit
def outputs(model, state, images):
    """Logits, the stem's map and the tokens behind every block."""
    blocks = model.backbone.intermediates(images, state, (0, 1), normalise=False)
    tokens = [jnp.concatenate([x.prefix, x.patches.reshape(2, -1, 32)], axis=1) for x in blocks]
    return model(images, state)[0], [model.backbone.stem(images), *tokens]


def nchw(images):
    import torch

    return torch.tensor(np.asarray(images)).permute(0, 3, 1, 2)


def timm_hybrid(name, image_size=IMAGE):
    """timm's model of the same sizes with all parameters random."""
    import torch
    from timm.layers.hybrid_embed import HybridEmbed
    from timm.models.vision_transformer import VisionTransformer
    from timm.models.vision_transformer_hybrid import _resnetv2

    torch.manual_seed(0)
    embed = functools.partial(HybridEmbed, backbone=_resnetv2(STEMS[name].blocks))
    sizes = {"embed_dim": 32, "depth": VIT.depth, "num_heads": VIT.num_heads, "mlp_ratio": 2.0, "num_classes": CLASSES}
    model = VisionTransformer(image_size, STEMS[name].patch_size, embed_layer=embed, **sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model.eval()


def timm_file(folder, model):
    save_file({name: tensor.numpy() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    return folder / "model.safetensors"


def nested(tensors):
    """Names with slashes -> nested dictionaries; group norms flat, as Flax has them since 0.3.6."""
    from flax.traverse_util import unflatten_dict

    flat = {name: tensor.reshape(-1) if "gn" in name else tensor for name, tensor in tensors.items()}
    return unflatten_dict({tuple(name.split("/")): jnp.asarray(tensor) for name, tensor in flat.items()})


def flax_hybrid(stem, pre_logits):
    """The model in Flax, from vit_jax/models_resnet.py and models_vit.py; gives logits, the map and the blocks."""
    from flax import linen as nn

    def conv_norm(x, part, features, size, stride=1):
        x = StdConv(features, size, stride, name=f"conv{part}")(x)
        return nn.GroupNorm(32, name=f"gn{part}")(x)

    class StdConv(nn.Module):
        features: int
        size: int
        stride: int

        @nn.compact
        def __call__(self, x):
            shape = (self.size, self.size, x.shape[-1], self.features)
            kernel = self.param("kernel", nn.initializers.normal(), shape)
            kernel = (kernel - kernel.mean((0, 1, 2))) / (kernel.std((0, 1, 2)) + 1e-5)
            layout = ("NHWC", "HWIO", "NHWC")
            return jax.lax.conv_general_dilated(x, kernel, (self.stride,) * 2, "SAME", dimension_numbers=layout)

    class Unit(nn.Module):
        inner: int
        stride: int

        @nn.compact
        def __call__(self, x):
            y = nn.relu(conv_norm(x, "1", self.inner, 1))
            y = nn.relu(conv_norm(y, "2", self.inner, 3, self.stride))
            y = conv_norm(y, "3", 4 * self.inner, 1)
            changes = self.stride > 1 or x.shape[-1] != 4 * self.inner
            return nn.relu(y + (conv_norm(x, "_proj", 4 * self.inner, 1, self.stride) if changes else x))

    class Stage(nn.Module):
        depth: int
        inner: int
        stride: int

        @nn.compact
        def __call__(self, x):
            for unit in range(self.depth):
                x = Unit(self.inner, self.stride if unit == 0 else 1, name=f"unit{unit + 1}")(x)
            return x

    class Mlp(nn.Module):
        @nn.compact
        def __call__(self, x):
            hidden = nn.gelu(nn.Dense(VIT.mlp_dim)(x))
            return nn.Dense(VIT.width)(hidden)

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            attention = nn.MultiHeadDotProductAttention(VIT.num_heads, name="MultiHeadDotProductAttention_1")
            y = nn.LayerNorm(name="LayerNorm_0")(x)
            x = x + attention(y, y)
            return x + Mlp(name="MlpBlock_3")(nn.LayerNorm(name="LayerNorm_2")(x))

    class Positions(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x + self.param("pos_embedding", nn.initializers.normal(), (1, *x.shape[1:]))

    class Transformer(nn.Module):
        @nn.compact
        def __call__(self, x):
            x, outputs = Positions(name="posembed_input")(x), []
            for block in range(VIT.depth):
                x = Block(name=f"encoderblock_{block}")(x)
                outputs.append(x)
            return nn.LayerNorm(name="encoder_norm")(x), outputs

    class Oracle(nn.Module):
        @nn.compact
        def __call__(self, images):
            x = nn.relu(conv_norm(images, "_root", 64, 7, 2))
            x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
            for stage, depth in enumerate(stem.blocks):
                x = Stage(depth, 64 * 2**stage, 2 if stage else 1, name=f"block{stage + 1}")(x)
            features, patch = x, (stem.patch_size, stem.patch_size)
            x = nn.Conv(VIT.width, patch, strides=patch, padding="VALID", name="embedding")(x)
            token = self.param("cls", nn.initializers.zeros, (1, 1, VIT.width))
            x = jnp.concatenate([jnp.tile(token, (len(x), 1, 1)), x.reshape(len(x), -1, VIT.width)], axis=1)
            x, blocks = Transformer(name="Transformer")(x)
            x = x[:, 0]
            if pre_logits is not None:
                x = nn.tanh(nn.Dense(pre_logits, name="pre_logits")(x))
            return nn.Dense(CLASSES, name="head")(x), [features, *blocks]

    return Oracle()
