"""Masked autoencoders: what is masked, what the loss counts, published weights, and transformers' numbers."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqvision.backbones.vit import SIZES, ViTSize
from eqvision.counting import count
from eqvision.keys import image_keys
from eqvision.losses import masked_pixel_loss, normalised_pixels
from eqvision.ops import image_of_patches, patch_pixels
from eqvision.pretrained import LAYOUTS, WeightsError, to_layout
from eqvision.pretrained.assemble import Sizes, assemble
from eqvision.pretrained.files import read_config, read_tensors
from eqvision.pretrained.layouts.mae import published_names
from eqvision.pretrained.load import layout_options
from eqvision.pretraining import MAES, draw_noise, masked_autoencoder, masking_of
from eqvision.types import MaskedImages

SIDE, PATCH, WIDTH = 32, 8, 32


@pytest.fixture(autouse=True)
def size(monkeypatch):
    monkeypatch.setitem(SIZES, "toy_mae", ViTSize(WIDTH, 2, 2, 48))


toy = functools.partial(
    masked_autoencoder, "toy_mae", PATCH, decoder_width=16, decoder_depth=1, decoder_heads=2, image_size=SIDE
)


def images_of(seed=0, channels=3):
    return np.random.default_rng(seed).normal(size=(2, SIDE, SIDE, channels)).astype(np.float32)


def noise_of(seed=1, count=16):
    return np.random.default_rng(seed).uniform(size=(2, count)).astype(np.float32)


@eqx.filter_jit
def outputs_of(model, images, noise):
    return model(MaskedImages(images, noise), eqx.nn.State(model))[0]


# Masking


def test_the_patches_with_the_least_noise_are_seen():
    noise = jnp.asarray([[0.5, 0.1, 0.9, 0.3, 0.2, 0.8, 0.7, 0.6]])
    masking = masking_of(noise, 0.75)
    assert masking.keep.tolist() == [[1, 4]]
    assert np.flatnonzero(~masking.mask[0]).tolist() == [1, 4]
    # each patch finds itself again in the row of the seen and then the masked ones
    order = np.argsort(noise[0])
    np.testing.assert_array_equal(order[masking.restore[0]], np.arange(8))


@pytest.mark.parametrize(("ratio", "seen"), [(0.0, 16), (0.5, 8), (0.75, 4), (0.9, 1)])
def test_the_share_that_is_seen(ratio, seen):
    masking = masking_of(jnp.asarray(noise_of()), ratio)
    assert masking.keep.shape == (2, seen)
    assert (~masking.mask).sum(axis=1).tolist() == [seen, seen]


def test_noise_is_of_the_image_and_not_of_its_row():
    common = jax.random.key(3)
    one = draw_noise(image_keys(common, jnp.asarray([4, 9, 2])), 5)
    other = draw_noise(image_keys(common, jnp.asarray([2, 4])), 5)
    np.testing.assert_array_equal(one[jnp.asarray([2, 0])], other)
    assert not np.array_equal(one[0], one[1])


def test_a_share_that_leaves_nothing_is_refused(key):
    for ratio in (1.0, 0.99, -0.1):
        with pytest.raises(ValueError, match=rf"mask_ratio {ratio} of 16 patches leaves none to see"):
            toy(mask_ratio=ratio, key=key)


# Model


@pytest.mark.slow
def test_masked_pixels_change_nothing_and_seen_ones_do(key):
    """The encoder sees no masked pixel; and each token keeps the position of its patch."""
    model, images, noise = toy(key=key), images_of(), noise_of()
    plain = outputs_of(model, images, noise)
    patches = np.array(patch_pixels(jnp.asarray(images), PATCH))

    def with_junk(rows):
        changed = np.where(rows[..., None], 100.0, patches)
        return outputs_of(model, image_of_patches(jnp.asarray(changed), PATCH, (4, 4)), noise)

    mask = np.asarray(plain.mask)
    np.testing.assert_array_equal(with_junk(mask).pixels, plain.pixels)
    assert np.abs(with_junk(~mask).pixels - plain.pixels).max() > 1e-3


def test_the_encoder_sees_all_where_nothing_is_masked(key, assert_close):
    """The tokens of an order are those of the backbone in that order: attention asks for no order."""
    backbone, images = toy(key=key).backbone, images_of()
    keep = jnp.asarray(np.stack([np.random.default_rng(i).permutation(16) for i in range(2)]))
    state = eqx.nn.State(backbone)
    features, _ = jax.jit(lambda model, x: model(x, state))(backbone, images)
    visible = jax.jit(lambda model, x, keep: model.visible(x, keep))(backbone, images, keep)
    patches = np.asarray(features.patches).reshape(2, 16, WIDTH)
    assert_close(visible[:, 0], features.prefix[:, 0], 1e-5)
    assert_close(visible[:, 1:], np.take_along_axis(patches, np.asarray(keep)[..., None], axis=1), 1e-5)


def test_noise_for_another_grid_is_refused(key):
    with pytest.raises(ValueError, match=r"noise of 9 numbers for 4x4 patches of 8 pixels"):
        outputs_of(toy(key=key), images_of(), noise_of(count=9))


# He et al. 2022 give no counts; these are of facebookresearch/mae's modules: the encoder is timm's without a head, its
# fixed positions apart (mae_vit_base_patch16: 111,907,840 with 252,160 fixed ones).
@pytest.mark.parametrize(
    ("name", "params"), [("mae_vit_b16", 111_655_680), ("mae_vit_l16", 329_239_296), ("mae_vit_h14", 656_613_964)]
)
def test_published_sizes(name, params):
    model = eqx.filter_eval_shape(lambda: MAES[name](key=jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == params
    assert (model.mask_ratio, model.image_size) == (0.75, (224, 224))


def test_a_quarter_of_the_patches_costs_a_fraction():
    """The encoder's share for ViT-B/16 is that of 50 tokens and not of 197."""

    def macs(ratio):
        model = eqx.filter_eval_shape(lambda: MAES["mae_vit_b16"](mask_ratio=ratio, key=jax.random.key(0)))
        inputs = MaskedImages(jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32), jax.ShapeDtypeStruct((1, 196), float))
        return count(model, inputs, eqx.nn.State(model)).macs

    assert macs(0.75) / macs(0.0) < 0.45


# Loss


def test_patches_there_and_back():
    images = images_of(channels=1)
    patches = patch_pixels(jnp.asarray(images), PATCH)
    np.testing.assert_array_equal(patches[0, 5], images[0, 8:16, 8:16].ravel())
    np.testing.assert_array_equal(image_of_patches(patches, PATCH, (4, 4)), images)
    with pytest.raises(ValueError, match=r"images of 32x32 cannot be cut into patches of 5x5"):
        patch_pixels(jnp.asarray(images), 5)
    with pytest.raises(ValueError, match=r"are not 4x5 patches of 8x8 pixels"):
        image_of_patches(patches, PATCH, (4, 5))


def test_the_loss_is_the_mean_over_masked_patches(rng):
    predicted, targets = (rng.normal(size=(2, 16, 12)).astype(np.float32) for _ in range(2))
    mask = rng.uniform(size=(2, 16)) < 0.75
    mask[1] = False
    found = masked_pixel_loss(jnp.asarray(predicted), jnp.asarray(targets), jnp.asarray(mask), normalise=False)
    np.testing.assert_allclose(found, [np.square(predicted - targets)[0][mask[0]].mean(), 0.0], rtol=1e-5)
    perfect = masked_pixel_loss(
        normalised_pixels(jnp.asarray(targets)), jnp.asarray(targets), jnp.asarray(mask), normalise=True
    )
    assert perfect.tolist() == [0.0, 0.0]
    normal = np.asarray(normalised_pixels(jnp.asarray(targets)))
    np.testing.assert_allclose(normal.mean(axis=-1), 0, atol=1e-6)
    np.testing.assert_allclose(normal.std(axis=-1, ddof=1), 1, rtol=1e-5)


# Weights


def loaded(tensors, layout, config=None, **sizes):
    options = layout_options(LAYOUTS[layout], config, tensors)

    def build(*, image_size=SIDE, in_channels=3, key):
        given = {"image_size": image_size, "in_channels": in_channels, "decoder_heads": 2, **options}
        return masked_autoencoder("toy_mae", PATCH, **given, key=key)

    return assemble(build, tensors, LAYOUTS[layout], Sizes(**sizes), where="file.pth", key=jax.random.key(7))


def leaves(model):
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(model)}


@pytest.mark.parametrize("layout", ["mae_pretraining", "hf_mae"])
def test_there_and_back(layout, key):
    model = toy(key=key)
    tensors = to_layout(model, eqx.nn.State(model), LAYOUTS[layout])
    fitting = [each.name for each in LAYOUTS.values() if each.recognises(tensors) and each.describes(model)]
    assert fitting == [layout]
    again, _ = loaded(tensors, layout)
    assert again.image_size == (SIDE, SIDE)
    for name, value in leaves(model).items():
        np.testing.assert_array_equal(leaves(again)[name], value, err_msg=name)


@pytest.mark.slow
def test_an_encoder_alone_gets_a_fresh_decoder(key):
    """mae_pretrain_vit_base.pth; classifiers read the same file."""
    model = toy(key=key)
    tensors = to_layout(model, eqx.nn.State(model), LAYOUTS["mae_pretraining"])
    encoder = {name: x for name, x in tensors.items() if not name.startswith(("decoder", "mask_token"))}
    fitting = [each.name for each in LAYOUTS.values() if each.recognises(encoder) and each.describes(model)]
    assert fitting == ["mae_encoder"]
    assert LAYOUTS["timm_vit"].recognises(encoder)
    again, _ = loaded(encoder, "mae_encoder")
    np.testing.assert_array_equal(again.backbone.norm.bias, model.backbone.norm.bias)
    np.testing.assert_array_equal(again.backbone.class_token, model.backbone.class_token)
    assert np.abs(again.decoder.mask_token).max() > 0


def test_other_positions_than_the_fixed_ones_are_refused(key):
    model = toy(key=key)
    tensors = to_layout(model, eqx.nn.State(model), LAYOUTS["mae_pretraining"])
    other = {**tensors, "pos_embed": tensors["pos_embed"] + 0.01}
    with pytest.raises(WeightsError, match=r"pos_embed .*positions differ by 0\.01 from the fixed sin-cos table"):
        loaded(other, "mae_pretraining")
    short = {**tensors, "decoder_pos_embed": tensors["decoder_pos_embed"][:, :-1]}
    with pytest.raises(WeightsError, match=r"decoder_pos_embed \(1, 16, 16\)"):
        loaded(short, "mae_pretraining")


def reference(folder, *, normalise):
    """transformers' model with random numbers but for the fixed positions, saved."""
    import torch
    import transformers

    config = transformers.ViTMAEConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=SIDE,
        patch_size=PATCH,
        layer_norm_eps=1e-3,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=64,
        mask_ratio=0.6,
        norm_pix_loss=normalise,
    )
    model, generator = transformers.ViTMAEForPreTraining(config).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            value.copy_(around + 0.2 * torch.randn(value.shape, generator=generator))
        # which a new model of transformers 5.23 leaves at zero, and published files hold
        model.vit.embeddings.position_embeddings.copy_(fixed_positions(WIDTH))
        model.decoder.decoder_pos_embed.copy_(fixed_positions(16))
    model.save_pretrained(folder)
    return model


def fixed_positions(width):
    """transformers' table with its halves exchanged, as its comments say of published weights."""
    import torch
    from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

    rows = build_2d_sinusoidal_position_embedding(4, 4, width, cls_token=True)
    return torch.cat([rows[:, width // 2 :], rows[:, : width // 2]], dim=1)[None]


@pytest.mark.parity
def test_numbers_losses_and_gradients_are_those_of_transformers(tmp_path, assert_close):
    import torch

    theirs = reference(tmp_path, normalise=True)
    model, _ = loaded(read_tensors(tmp_path), "hf_mae", read_config(tmp_path), image_size=(SIDE, SIDE))
    images, noise = jnp.asarray(images_of()), jnp.asarray(noise_of())
    assert (model.mask_ratio, model.backbone.norm.eps, model.decoder.stack.depth) == (0.6, 1e-3, 2)

    def losses(model):
        outputs, _ = model(MaskedImages(images, noise), eqx.nn.State(model), train=True)
        targets = patch_pixels(images, PATCH)
        both = [masked_pixel_loss(outputs.pixels, targets, outputs.mask, normalise=x).mean() for x in (True, False)]
        return jnp.stack(both), outputs

    @jax.jit
    def ours(model):
        values, back, outputs = jax.vjp(losses, model, has_aux=True)
        return values, outputs, [back(jnp.eye(2)[i])[0] for i in range(2)]

    values, outputs, gradients = ours(model)
    for number, normalise in enumerate((True, False)):
        theirs.config.norm_pix_loss = normalise
        theirs.zero_grad()
        found = theirs(
            torch.from_numpy(np.asarray(images).transpose(0, 3, 1, 2).copy()), noise=torch.from_numpy(np.array(noise))
        )
        found.loss.backward()
        np.testing.assert_array_equal(outputs.mask, found.mask.numpy() > 0)
        assert_close(outputs.pixels, found.logits.detach().numpy(), 1e-5)
        assert float(values[number]) == pytest.approx(found.loss.item(), rel=1e-5)
        expected = saved_gradients(theirs, tmp_path / str(number))
        mine = to_layout(gradients[number], eqx.nn.State(model), LAYOUTS["hf_mae"])
        # the gradients of key biases are zero but for rounding: a softmax does not change with them
        used = [name for name in expected if not name.endswith("key.bias") and "pos" not in name]
        assert len(used) == len(expected) - 4 - 2
        assert_close({name: mine[name] for name in used}, {name: expected[name] for name in used}, 1e-5)


def saved_gradients(model, folder):
    """Gradients under the names of files: saved as if they were parameters."""
    import torch

    kept = {name: value.detach().clone() for name, value in model.named_parameters()}
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.zeros_like(value) if value.grad is None else value.grad)
    model.save_pretrained(folder)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(kept[name])
    return published_names(read_tensors(folder))
