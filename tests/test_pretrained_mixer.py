"""MLP-Mixer weights of google-research/vision_transformer and timm: loaded, compared, written out again."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from eqvision.backbones.mixer import MIXER_SIZES, MixerSize
from eqvision.classifiers import mixer_classifier
from eqvision.pretrained import LAYOUTS, WeightsError, load, to_layout
from eqvision.zoo import MODELS

CLASSES = 7
IMAGE = 16
PATCH = 4
SIZE = MixerSize(width=24, depth=3, token_dim=12, channel_dim=48)


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    """A small mixer under the name toy_mixer."""
    monkeypatch.setitem(MIXER_SIZES, "toy", SIZE)
    monkeypatch.setitem(MODELS, "toy_mixer", functools.partial(mixer_classifier, "toy", PATCH))


@pytest.fixture
def images(rng):
    return jnp.asarray(rng.normal(size=(2, IMAGE, IMAGE, 3)), jnp.float32)


def google_tensors(rng):
    """Random parameters under the names and in the shapes of the published files."""
    shapes = {"stem/kernel": (PATCH, PATCH, 3, 24), "stem/bias": (24,)}
    positions = (IMAGE // PATCH) ** 2
    for block in range(SIZE.depth):
        start = f"MixerBlock_{block}"
        for part, width, inner in (("token_mixing", positions, 12), ("channel_mixing", 24, 48)):
            shapes |= {f"{start}/{part}/Dense_0/kernel": (width, inner), f"{start}/{part}/Dense_0/bias": (inner,)}
            shapes |= {f"{start}/{part}/Dense_1/kernel": (inner, width), f"{start}/{part}/Dense_1/bias": (width,)}
        for norm in (f"{start}/LayerNorm_0", f"{start}/LayerNorm_1"):
            shapes |= {f"{norm}/scale": (24,), f"{norm}/bias": (24,)}
    shapes |= {"pre_head_layer_norm/scale": (24,), "pre_head_layer_norm/bias": (24,)}
    shapes |= {"head/kernel": (24, CLASSES), "head/bias": (CLASSES,)}
    return {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def google_file(folder, rng):
    tensors = google_tensors(rng)
    np.savez(folder / "mixer.npz", **tensors)
    return folder / "mixer.npz", tensors


def randomise(module):
    """All parameters and buffers of a torch module from a normal distribution."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.normal_(0, 0.3)
    return module.eval()


def timm_mixer():
    from timm.models.mlp_mixer import MlpMixer

    sizes = {"num_blocks": SIZE.depth, "embed_dim": SIZE.width, "mlp_ratio": (0.5, 2.0)}
    return randomise(MlpMixer(CLASSES, IMAGE, patch_size=PATCH, **sizes))


def nchw(images):
    import torch

    return torch.tensor(np.asarray(images)).permute(0, 3, 1, 2)


def timm_file(folder, model):
    save_file({name: tensor.numpy() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    return folder / "model.safetensors"


def test_every_tensor_of_a_google_file_has_its_place(tmp_path, rng):
    path, tensors = google_file(tmp_path, rng)
    model, state = load("toy_mixer", path, image_size=IMAGE)
    assert model.backbone.blocks.token_mlp.activation == "gelu_tanh"
    written = to_layout(model, state, LAYOUTS["google_mixer"])
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(written[name], tensor)


def test_another_image_size_is_refused(tmp_path, rng):
    path, _ = google_file(tmp_path, rng)
    with pytest.raises(WeightsError, match=r"(?s)token_mlp.fc1.weight: \(3, 16, 12\) in the file, \(3, 64, 12\)"):
        load("toy_mixer", path, image_size=2 * IMAGE)


def test_another_depth_is_refused(tmp_path, rng, monkeypatch):
    path, _ = google_file(tmp_path, rng)
    monkeypatch.setitem(MIXER_SIZES, "toy", SIZE._replace(depth=2))
    with pytest.raises(WeightsError, match=r"(?s)12 tensors belong to no part.*MixerBlock_2/"):
        load("toy_mixer", path, image_size=IMAGE)


def test_one_layout_each(rng):
    google = google_tensors(rng)
    assert [name for name, layout in LAYOUTS.items() if layout.recognises(google)] == ["google_mixer"]


@pytest.mark.parity
def test_google_equals_flax(tmp_path, rng, images, assert_close):
    """An MLP-Mixer in Flax, of which vit_jax/models_mixer.py gives names, order and defaults."""
    path, tensors = google_file(tmp_path, rng)
    model, state = load("toy_mixer", path, image_size=IMAGE)
    oracle = flax_mixer()
    variables = {"params": nested(tensors)}
    logits, blocks = oracle.apply(variables, images)
    assert_close(model(images, state)[0], logits, 1e-5)
    ours = model.backbone.intermediates(images, state, (0, 1, 2), normalise=False)
    assert_close([x.patches.reshape(2, -1, 24) for x in ours], blocks, 1e-5)


@pytest.mark.parity
def test_google_gradients_equal_flax(tmp_path, rng, images, assert_close):
    path, tensors = google_file(tmp_path, rng)
    model, state = load("toy_mixer", path, image_size=IMAGE)
    from flax.traverse_util import flatten_dict

    weights = jnp.asarray(rng.normal(size=(2, CLASSES)), jnp.float32)
    ours = jax.jit(jax.grad(lambda m: jnp.sum(m(images, state)[0] * weights)))(model)
    oracle = flax_mixer()
    theirs = jax.jit(jax.grad(lambda p: jnp.sum(oracle.apply({"params": p}, images)[0] * weights)))(nested(tensors))
    theirs = {"/".join(path): gradient for path, gradient in flatten_dict(theirs).items()}
    assert_gradients_close(
        to_layout(ours, state, LAYOUTS["google_mixer"]), theirs, "token_mixing/Dense_1/bias", assert_close
    )


@pytest.mark.parity
def test_timm_equals_timm(tmp_path, images, assert_close):
    import torch

    reference = timm_mixer()
    model, state = load("toy_mixer", timm_file(tmp_path, reference), image_size=IMAGE)
    with torch.no_grad():
        expected = reference(nchw(images))
        blocks = reference.forward_intermediates(nchw(images), intermediates_only=True)
    assert_close(model(images, state)[0], expected.numpy(), 1e-5)
    ours = model.backbone.intermediates(images, state, (0, 1, 2), normalise=False)
    assert_close([x.patches for x in ours], [block.permute(0, 2, 3, 1).numpy() for block in blocks], 1e-5)


@pytest.mark.parity
def test_timm_gradients(tmp_path, rng, images, assert_close):
    import torch

    reference = timm_mixer()
    model, state = load("toy_mixer", timm_file(tmp_path, reference), image_size=IMAGE)
    weights = rng.normal(size=(2, CLASSES)).astype(np.float32)
    ours = jax.jit(jax.grad(lambda m: jnp.sum(m(images, state)[0] * weights)))(model)
    (reference(nchw(images)) * torch.tensor(weights)).sum().backward()
    theirs = {name: parameter.grad.numpy() for name, parameter in reference.named_parameters()}
    assert_gradients_close(to_layout(ours, state, LAYOUTS["timm_mixer"]), theirs, "mlp_tokens.fc2.bias", assert_close)


@pytest.mark.parity
def test_written_out_timm_reads_it(tmp_path, images, assert_close):
    import torch

    model, state = load("toy_mixer", timm_file(tmp_path, timm_mixer()), image_size=IMAGE)
    written = to_layout(model, state, LAYOUTS["timm_mixer"])
    assert [name for name, layout in LAYOUTS.items() if layout.recognises(written)] == ["timm_mixer"]
    other = timm_mixer()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
        other.load_state_dict({name: torch.tensor(tensor) for name, tensor in written.items()}, strict=True)
        expected = other(nchw(images)).numpy()
    assert_close(model(images, state)[0], expected, 1e-5)


def assert_gradients_close(ours, theirs, without, assert_close):
    """The last bias across positions is equal for all channels and goes in the next norm: its gradient is rounding."""
    scale = max(np.abs(gradient).max() for gradient in theirs.values())
    for gradients in (ours, theirs):
        assert (
            max(np.abs(gradients.pop(name)).max() for name in list(gradients) if name.endswith(without)) < 1e-6 * scale
        )
    assert_close(ours, theirs, 1e-5)


def nested(tensors):
    """Names with slashes -> nested dictionaries."""
    from flax.traverse_util import unflatten_dict

    return unflatten_dict({tuple(name.split("/")): jnp.asarray(tensor) for name, tensor in tensors.items()})


def flax_mixer():
    """Returns logits and the output of every block."""
    from flax import linen as nn

    class Mlp(nn.Module):
        inner: int

        @nn.compact
        def __call__(self, x):
            hidden = nn.gelu(nn.Dense(self.inner)(x))
            return nn.Dense(x.shape[-1])(hidden)

    class MixerBlock(nn.Module):
        @nn.compact
        def __call__(self, x):
            across = Mlp(SIZE.token_dim, name="token_mixing")
            x = x + across(nn.LayerNorm()(x).swapaxes(1, 2)).swapaxes(1, 2)
            return x + Mlp(SIZE.channel_dim, name="channel_mixing")(nn.LayerNorm()(x))

    class Oracle(nn.Module):
        @nn.compact
        def __call__(self, images):
            x = nn.Conv(SIZE.width, (PATCH, PATCH), strides=(PATCH, PATCH), name="stem")(images)
            x, outputs = x.reshape(len(images), -1, SIZE.width), []
            for _ in range(SIZE.depth):
                x = MixerBlock()(x)
                outputs.append(x)
            x = nn.LayerNorm(name="pre_head_layer_norm")(x)
            return nn.Dense(CLASSES, name="head")(x.mean(axis=1)), outputs

    return Oracle()
