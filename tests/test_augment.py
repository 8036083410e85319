"""Host augmentation: every operation against Pillow itself, the policies against their published numbers."""

import dataclasses
import functools
import pickle

import numpy as np
import pytest
from images import noise
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from eqvision.data import (
    OPERATIONS,
    apply_operation,
    autoaugment,
    check_augment,
    color_jitter,
    mean_fill,
    randaugment,
    random_flip,
    random_resized_crop,
    three_augment,
    train_transform,
    trivialaugment,
)
from eqvision.data.augment.policies import value_of
from eqvision.data.augment.tables import AUTOAUGMENT_TABLES, RANDAUGMENT, TRIVIALAUGMENT
from eqvision.names import UnknownNameError
from eqvision.recipes import AugmentConfig

AFFINE, BICUBIC = Image.Transform.AFFINE, Image.Resampling.BICUBIC


def affine(image, *matrix):
    return image.transform(image.size, AFFINE, matrix, BICUBIC, fillcolor=(9, 8, 7) if image.mode == "RGB" else 8)


def enhanced(kind):
    return lambda image, value: kind(image).enhance(value)


def with_pixels(change):
    return lambda image, value: Image.fromarray(change(np.asarray(image).astype(int), value).astype(np.uint8))


ORACLES = {
    "auto_contrast": (lambda image, _: ImageOps.autocontrast(image), [0]),
    "equalize": (lambda image, _: ImageOps.equalize(image), [0]),
    "invert": (lambda image, _: ImageOps.invert(image), [0]),
    "posterize": (ImageOps.posterize, [1, 4, 8]),
    "solarize": (ImageOps.solarize, [0, 77, 128, 256]),
    "solarize_add": (with_pixels(lambda x, v: np.where(x < 128, np.minimum(x + v, 255), x)), [0, 60, 110, 200]),
    "color": (enhanced(ImageEnhance.Color), [0.1, 1.9]),
    "contrast": (enhanced(ImageEnhance.Contrast), [0.1, 1.9]),
    "brightness": (enhanced(ImageEnhance.Brightness), [0.1, 1.9]),
    "sharpness": (enhanced(ImageEnhance.Sharpness), [0.1, 1.9]),
    "rotate": (lambda i, v: i.rotate(v, BICUBIC, fillcolor=(9, 8, 7) if i.mode == "RGB" else 8), [-30, 12.5]),
    "shear_x": (lambda image, v: affine(image, 1, v, 0, 0, 1, 0), [-0.3, 0.2]),
    "shear_y": (lambda image, v: affine(image, 1, 0, 0, v, 1, 0), [-0.3, 0.2]),
    "translate_x": (lambda image, v: affine(image, 1, 0, v, 0, 1, 0), [-7, 2.5]),
    "translate_y": (lambda image, v: affine(image, 1, 0, 0, 0, 1, v), [-7, 2.5]),
    "translate_x_rel": (lambda image, v: affine(image, 1, 0, v * 32, 0, 1, 0), [-0.45, 0.25]),
    "translate_y_rel": (lambda image, v: affine(image, 1, 0, 0, 0, 1, v * 20), [-0.45, 0.25]),
    "grayscale": (lambda image, _: image.convert("L").convert(image.mode), [0]),
    "gaussian_blur": (lambda image, v: image.filter(ImageFilter.GaussianBlur(v)), [0.1, 2.0]),
}


def picture(channels=3, seed=0):
    """20 x 32 pixels with smooth parts, so that filters and histograms have something to work on."""
    coarse = Image.fromarray(noise((5, 8, 3), seed)).resize((32, 20), BICUBIC)
    return np.asarray(coarse)[..., :channels]


def test_every_operation_has_an_oracle():
    assert set(ORACLES) == set(OPERATIONS)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_pillows(name, channels):
    image = picture(channels)
    before = image.copy()
    oracle, values = ORACLES[name]
    for value in values:
        expected = np.asarray(oracle(Image.fromarray(image.squeeze()), value)).reshape(image.shape)
        actual = apply_operation(image, name, float(value), fill=(9, 8, 7))
        assert actual.dtype == np.uint8
        np.testing.assert_array_equal(actual, expected, err_msg=f"{name} {value}")
    np.testing.assert_array_equal(image, before)


def test_values_that_change_nothing():
    image = picture()
    neutral = {"posterize": 8, "solarize": 256, "color": 1, "contrast": 1, "brightness": 1, "sharpness": 1}
    for name in OPERATIONS:
        if name not in ("auto_contrast", "equalize", "invert", "grayscale"):
            same = apply_operation(image, name, float(neutral.get(name, 0)))
            np.testing.assert_array_equal(same, image, err_msg=name)
    assert not apply_operation(image, "posterize", 0.0).any()  # ImageOps refuses 0 bits; the published tables use them
    np.testing.assert_array_equal(apply_operation(picture(1), "color", 0.1), picture(1))


def test_geometry_directions_and_fill():
    image = picture()
    moved = apply_operation(image, "translate_x", 5.0, fill=(1, 2, 3))
    np.testing.assert_array_equal(moved[:, :-5], image[:, 5:])
    assert (moved[:, -5:] == (1, 2, 3)).all()
    moved = apply_operation(image, "translate_y", -4.0, "nearest", fill=200)
    np.testing.assert_array_equal(moved[4:], image[:-4])
    assert (moved[:4] == 200).all()
    np.testing.assert_array_equal(apply_operation(image, "rotate", 180.0, "nearest"), image[::-1, ::-1])
    assert (apply_operation(picture(1), "translate_x", 5.0, fill=(10, 20, 30))[:, -5:] == 20).all()
    assert mean_fill((0.485, 0.456, 0.406)) == (124, 116, 104)
    assert mean_fill((0.5,)) == (128,)


def test_operation_errors():
    with pytest.raises(UnknownNameError, match="operation 'equalise' does not exist; nearest: equalize"):
        apply_operation(picture(), "equalise")
    with pytest.raises(UnknownNameError, match="interpolation of affine maps 'bicubc' does not exist; nearest: bic"):
        apply_operation(picture(), "rotate", 3.0, "bicubc")
    with pytest.raises(ValueError, match=r"fill=300; expected a level in 0..255, or three of them"):
        apply_operation(picture(), "rotate", 3.0, fill=300)
    with pytest.raises(ValueError, match=r"the image has 4 channels; .* know 1 .* and 3 .*Set augment.policy none"):
        randaugment(noise((8, 8, 4)), np.random.default_rng(0))


# The numbers of the policies


def signs(negative):
    """A generator whose first draw turns the sign, or does not."""
    return next(
        np.random.default_rng(seed) for seed in range(99) if (np.random.default_rng(seed).random() < 0.5) == negative
    )


def values(ranges, strength):
    return {name: tuple(value_of(span, strength, signs(n)) for n in (False, True)) for name, span in ranges.items()}


@pytest.mark.parametrize(
    ("magnitude", "expected"),
    [
        (0, {"rotate": 0, "posterize": 4, "solarize": 256, "solarize_add": 0, "color": (1, 1), "shear_x": 0}),
        (5, {"rotate": 15, "posterize": 2, "solarize": 128, "solarize_add": 55, "color": (1.45, 0.55)}),
        (9, {"rotate": 27, "posterize": 1, "solarize": 26, "solarize_add": 99, "sharpness": (1.81, 0.19)}),
        (10, {"posterize": 0, "solarize": 0, "solarize_add": 110, "contrast": (1.9, 0.1), "translate_y_rel": 0.45}),
    ],
)
def test_randaugment_values_increase_with_the_magnitude(magnitude, expected):
    """timm's ``inc1`` figures, worked out by hand."""
    actual = values(RANDAUGMENT, magnitude / 10)
    signed = ("rotate", "shear_x", "shear_y", "translate_x_rel", "translate_y_rel")
    for name, value in expected.items():
        pair = value if isinstance(value, tuple) else (value, -value if name in signed else value)
        np.testing.assert_allclose(actual[name], pair, atol=1e-12, err_msg=name)


def test_trivialaugment_values():
    weak, strong = values(TRIVIALAUGMENT, 0.0), values(TRIVIALAUGMENT, 1.0)
    assert len(TRIVIALAUGMENT) == 14
    assert (weak["posterize"], strong["posterize"]) == ((8, 8), (2, 2))
    assert (weak["solarize"], strong["solarize"]) == ((256, 256), (0, 0))
    assert (weak["color"], strong["color"]) == ((0.01, 0.01), (2.0, 2.0))
    assert (strong["rotate"], strong["translate_x"], strong["shear_y"]) == ((135, -135), (32, -32), (0.99, -0.99))
    assert value_of(TRIVIALAUGMENT["rotate"], 1 / 30, signs(False)) == 4  # 4.5 degrees are cut to 4


def test_autoaugment_tables_and_values():
    for pairs, ranges in AUTOAUGMENT_TABLES.values():
        assert len(pairs) == 25
        operations = [operation for pair in pairs for operation in pair]
        assert {name for name, _, _ in operations} <= set(ranges)
        assert all(0 <= probability <= 1 and 0 <= strength <= 10 for _, probability, strength in operations)
        assert set(ranges) <= set(OPERATIONS)
    imagenet = AUTOAUGMENT_TABLES["imagenet"][1]
    assert value_of(imagenet["posterize"], 0.6, signs(False)) == 2  # weaker with the strength, as in EfficientNet
    assert value_of(imagenet["solarize"], 0.8, signs(False)) == 204
    np.testing.assert_allclose(value_of(imagenet["color"], 0.9, signs(False)), 1.72)
    assert set(TRIVIALAUGMENT) - {"identity"} <= set(OPERATIONS)
    assert set(RANDAUGMENT) <= set(OPERATIONS)
    assert len(RANDAUGMENT) == 15


# The policies

POLICIES = {
    "randaugment": functools.partial(randaugment, magnitude_std=0.5),
    "trivialaugment": trivialaugment,
    "autoaugment": autoaugment,
    "autoaugment_cifar": functools.partial(autoaugment, table="cifar"),
    "three_augment": three_augment,
    "color_jitter": functools.partial(color_jitter, strength=0.4),
}


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("channels", [1, 3])
def test_policies_are_functions_of_the_generator(name, channels):
    policy, image = POLICIES[name], picture(channels)
    before = image.copy()
    state = np.random.get_state()[1].copy()
    runs = [[policy(image, np.random.default_rng(seed)) for seed in range(40)] for _ in range(2)]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert {(out.shape, out.dtype.name) for out in runs[0]} == {((20, 32, channels), "uint8")}
    assert len({out.tobytes() for out in runs[0]}) > 10
    np.testing.assert_array_equal(image, before)
    np.testing.assert_array_equal(np.random.get_state()[1], state)


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 9, 1), (8, 2, 3)])
def test_policies_take_any_size(shape):
    for policy in POLICIES.values():
        for seed in range(40):
            assert policy(noise(shape), np.random.default_rng(seed)).shape == shape


def counted(monkeypatch, policy, draws):
    """How often each operation is called, with its values."""
    calls = {}
    for name in OPERATIONS:
        monkeypatch.setitem(OPERATIONS, name, lambda i, value, c, n=name: calls.setdefault(n, []).append(value) or i)
    rng, image = np.random.default_rng(0), noise((2, 2, 3))
    for _ in range(draws):
        policy(image, rng)
    return calls


def test_randaugment_draws_evenly_and_applies_half(monkeypatch):
    calls = counted(monkeypatch, functools.partial(randaugment, num_ops=3, magnitude=5.0, magnitude_std=0.5), 3000)
    assert set(calls) == set(RANDAUGMENT)
    counts = np.array([len(calls[name]) for name in RANDAUGMENT])
    assert abs(counts.sum() / 9000 - 0.5) < 0.02
    assert (abs(counts / 300 - 1) < 0.25).all()
    degrees = np.abs(calls["rotate"]) / 3  # the magnitude itself
    assert abs(degrees.mean() - 5) < 0.15
    assert 0.4 < degrees.std() < 0.6
    assert 0.35 < (np.array(calls["rotate"]) < 0).mean() < 0.65


def test_randaugment_clips_the_magnitude(monkeypatch):
    calls = counted(monkeypatch, functools.partial(randaugment, magnitude=10.0, magnitude_std=4.0), 1500)
    magnitudes = np.abs(calls["rotate"]) / 3
    assert magnitudes.min() >= 0
    assert magnitudes.max() == 10
    assert 0.3 < (magnitudes == 10).mean() < 0.7


def test_trivialaugment_draws_evenly(monkeypatch):
    calls = counted(monkeypatch, trivialaugment, 4200)
    assert set(calls) == set(TRIVIALAUGMENT) - {"identity"}
    assert sum(map(len, calls.values())) / 4200 == pytest.approx(13 / 14, abs=0.02)
    assert all(220 < len(found) < 380 for found in calls.values())
    assert len(set(np.round(calls["color"], 6))) == 31


def test_autoaugment_applies_by_probability(monkeypatch):
    calls = counted(monkeypatch, autoaugment, 5000)
    pairs, _ = AUTOAUGMENT_TABLES["imagenet"]
    for name in calls:
        expected = sum(p for pair in pairs for n, p, _ in pair if n == name) / 25
        assert len(calls[name]) / 5000 == pytest.approx(expected, abs=0.03), name
    with pytest.raises(UnknownNameError, match="AutoAugment table 'cifar10' does not exist; nearest: cifar"):
        autoaugment(noise((2, 2, 3)), np.random.default_rng(0), table="cifar10")


def test_three_augment_takes_one_of_three_then_jitters(monkeypatch):
    calls = counted(monkeypatch, three_augment, 3000)
    for name in ("grayscale", "solarize", "gaussian_blur"):
        assert len(calls[name]) == pytest.approx(1000, abs=100)
    assert set(calls["solarize"]) == {128.0}
    assert 0.1 <= min(calls["gaussian_blur"]) < 0.12 < 1.98 < max(calls["gaussian_blur"]) <= 2.0
    for name in ("brightness", "contrast", "color"):
        assert len(calls[name]) == 3000
        assert 0.7 <= min(calls[name]) < 0.72 < 1.28 < max(calls[name]) <= 1.3


def test_color_jitter_orders_and_strength_zero(monkeypatch):
    image = picture()
    np.testing.assert_array_equal(color_jitter(image, np.random.default_rng(0), 0.0), image)
    bright = [color_jitter(image, np.random.default_rng(seed), 0.9).mean() for seed in range(50)]
    assert min(bright) < 0.5 * image.mean()
    assert max(bright) > 1.2 * image.mean()
    order = []
    for name in ("brightness", "contrast", "color"):
        monkeypatch.setitem(OPERATIONS, name, lambda i, v, c, n=name: order.append(n) or i)
    for seed in range(60):
        color_jitter(image, np.random.default_rng(seed), 0.4)
    assert len({tuple(order[i : i + 3]) for i in range(0, 180, 3)}) == 6


# Composition


def test_nothing_asked_nothing_changed():
    image = noise((20, 20, 3))
    plain, empty = train_transform("cifar", 16), train_transform("cifar", 16, augment=AugmentConfig(mixup=0.8))
    for seed in range(10):
        same = (plain(image, np.random.default_rng(seed)), empty(image, np.random.default_rng(seed)))
        np.testing.assert_array_equal(*same)


def test_crop_and_flip_then_jitter_then_policy():
    image = noise((40, 50, 3))
    config = AugmentConfig(policy="randaugment", num_ops=3, magnitude=7.0, magnitude_std=0.5, color_jitter=0.4)
    transform = pickle.loads(pickle.dumps(train_transform("imagenet", 16, "lanczos", config, fill=(1, 2, 3))))
    for seed in range(20):
        rng = np.random.default_rng(seed)
        expected = random_flip(random_resized_crop(image, rng, 16, interpolation="lanczos"), rng)
        expected = color_jitter(expected, rng, 0.4)
        expected = randaugment(expected, rng, 3, 7.0, 0.5, "bicubic", (1, 2, 3))
        np.testing.assert_array_equal(transform(image, np.random.default_rng(seed)), expected)


@pytest.mark.parametrize(
    ("kind", "config", "policy"),
    [
        ("none", {"policy": "trivialaugment"}, functools.partial(trivialaugment, interpolation="bilinear", fill=5)),
        ("none", {"policy": "autoaugment"}, functools.partial(autoaugment, interpolation="bilinear", fill=5)),
        ("none", {"policy": "three_augment"}, functools.partial(three_augment, color_jitter=0.3)),
        ("none", {"policy": "three_augment", "color_jitter": 0.1}, functools.partial(three_augment, color_jitter=0.1)),
        ("none", {"color_jitter": 0.2}, functools.partial(color_jitter, strength=0.2)),
    ],
)
def test_each_policy_by_its_name(kind, config, policy):
    image = noise((16, 16, 3))
    transform = train_transform(kind, 16, "bilinear", AugmentConfig(**config), fill=5)
    for seed in range(20):
        expected = policy(image, np.random.default_rng(seed))
        np.testing.assert_array_equal(transform(image, np.random.default_rng(seed)), expected)


def test_autoaugment_takes_cifars_table_with_cifars_transform():
    image = noise((16, 16, 3))
    transform = train_transform("cifar", 16, augment=AugmentConfig(policy="autoaugment"))
    plain = train_transform("cifar", 16)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        expected = autoaugment(plain(image, rng), rng, "cifar")
        np.testing.assert_array_equal(transform(image, np.random.default_rng(seed)), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": "randaug"}, "augment.policy 'randaug' does not exist; nearest: randaugment"),
        ({"num_ops": 0}, "augment.num_ops is 0; expected a whole number from 1 up"),
        ({"magnitude": 11.0}, r"augment.magnitude is 11.0; expected 0 to 10 \(9 is common\)"),
        ({"magnitude": float("nan")}, "augment.magnitude is nan; expected 0 to 10"),
        ({"magnitude_std": -0.5}, "augment.magnitude_std is -0.5; expected 0 or more"),
        ({"color_jitter": 1.5}, "augment.color_jitter is 1.5; expected 0 to 1"),
        ({"random_erasing": -0.1}, "augment.random_erasing is -0.1; expected 0 to 1 .a probability"),
        ({"mixup": -1.0}, "augment.mixup is -1.0; expected 0 or more .alpha of a Beta"),
        ({"cutmix": float("inf")}, "augment.cutmix is inf; expected 0 or more"),
        ({"cutmix_share": 2.0}, "augment.cutmix_share is 2.0; expected 0 to 1"),
        ({"repeats": 0}, "augment.repeats is 0; expected a whole number from 1 up"),
    ],
)
def test_check_augment_names_the_option(change, message, unchecked):
    config = dataclasses.replace(AugmentConfig(), **change)
    with pytest.raises(ValueError, match=message):
        check_augment(config)
    with pytest.raises(ValueError, match=message):
        train_transform("cifar", 16, augment=config)


def test_check_augment_accepts_the_edges():
    check_augment(AugmentConfig())
    check_augment(AugmentConfig(magnitude=10.0, color_jitter=1.0, random_erasing=1.0, cutmix_share=0.0, repeats=3))
