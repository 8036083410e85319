"""Proposals, losses, their gradients, detections and masks beside torchvision's own code."""

import copy

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rcnn_references import (
    CLASSES,
    SIZE,
    copied,
    dialect,
    head_model,
    head_names,
    random_maps,
    torch_heads,
    torch_maps,
    torch_mask_rcnn,
    whole_model,
)

from eqvision.detectors.rcnn_proposals import select_proposals
from eqvision.losses import rcnn_counts, rcnn_loss
from eqvision.ops import paste_masks
from eqvision.types import DetectionTargets, PaddedImages

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("torchvision")]
LOSSES = {
    "objectness": "loss_objectness",
    "proposal": "loss_rpn_box_reg",
    "class": "loss_classifier",
    "box": "loss_box_reg",
    "mask": "loss_mask",
}


@pytest.fixture
def torchvision():
    """Not at import: ``conftest`` makes it usable beside a CPU build of PyTorch when the test begins."""
    return pytest.importorskip("torchvision", reason="extra [parity]")


@pytest.fixture
def first_are_drawn(monkeypatch):
    """Both samplers take the first rows in place of random ones."""
    import torch

    monkeypatch.setattr(torch, "randperm", lambda count, **_: torch.arange(count))
    monkeypatch.setattr(jax.random, "bits", lambda key, shape: jnp.zeros(shape, jnp.uint32))


def inputs_of(images):
    return PaddedImages(jnp.asarray(images), jnp.full((len(images), 2), jnp.asarray(SIZE)))


def no_images(count=2):
    return inputs_of(np.zeros((count, *SIZE, 3), np.float32))


def scene(rng, near, objects=5):
    """Objects near the boxes ``near`` (b, n, 4); the second image has one less, in whose place stands junk.

    All lie on the image: ``train_outputs`` cuts off what does not, which torchvision leaves to its data.
    """
    boxes = np.array(near)[:, : 3 * objects : 3] + rng.normal(0, 1, (len(near), objects, 4))
    limit = np.array(SIZE[::-1])
    low = boxes[..., :2].clip(0, limit - 6)
    boxes = np.concatenate([low, np.maximum(boxes[..., 2:], low + 6).clip(0, limit)], axis=-1).astype(np.float32)
    labels = rng.integers(0, CLASSES, boxes.shape[:2]).astype(np.int32)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    low, high = boxes[..., :2, None, None], boxes[..., 2:, None, None]
    inside = (x > low[:, :, 0]) & (x < high[:, :, 0]) & (y > low[:, :, 1]) & (y < high[:, :, 1])
    masks = (inside & (rng.random(inside.shape) < 0.8)).astype(np.uint8)
    valid = np.ones(boxes.shape[:2], bool)
    valid[1, -1] = False
    boxes[1, -1] = np.nan
    return DetectionTargets(*(jnp.asarray(x) for x in (boxes, labels, valid, masks)))


def torch_targets(targets):
    import torch

    rows = []
    for i, valid in enumerate(np.asarray(targets.valid)):
        boxes, labels, masks = (torch.from_numpy(np.asarray(x)[i][valid]) for x in (targets[0], targets[1], targets[3]))
        rows.append({"boxes": boxes, "labels": labels.long() + 1, "masks": masks})  # torchvision's 0 is no object
    return rows


def image_list(count=2):
    import torch
    from torchvision.models.detection.image_list import ImageList

    return ImageList(torch.zeros(count, 3, *SIZE), [SIZE] * count)


def losses_of(samples):
    """The loss of both images, and its terms and counts."""
    counts = rcnn_counts(samples, jnp.ones(2))
    value, terms = rcnn_loss(samples, jnp.ones(2), counts)
    return value, (terms, counts)


class TestHeads:
    """On given maps, with all anchors and boxes drawn."""

    def test_losses_and_gradients_are_torchvisions(self, rng, assert_close):
        proposer, heads = torch_heads()
        model, state = copied(*head_model(dialect(boxes=240)), head_names(proposer, heads))
        maps = random_maps(rng)
        targets = scene(rng, np.stack(proposer.eval()(image_list(), torch_maps(maps))[0]))
        theirs = torch_maps(maps)
        proposals, losses = proposer.train()(image_list(), theirs, torch_targets(targets))
        losses |= heads(theirs, proposals, [SIZE] * 2, torch_targets(targets))[1]
        sum(losses.values()).backward()

        def ours(maps):
            def loss(maps):
                keys = jax.random.split(jax.random.key(0), 2)
                return losses_of(model.samples(maps, no_images(), targets, state, keys=keys)[0])

            return jax.value_and_grad(loss, has_aux=True)(maps)

        (_, (terms, counts)), gradients = run(ours, maps)
        assert counts.masks > 12  # proposals besides the nine objects themselves
        assert counts.boxes[0] == sum(len(p) for p in proposals) + 9
        assert_close(terms, {ours: losses[name].item() for ours, name in LOSSES.items()}, 2e-5)
        expected = [level.grad.numpy().transpose(0, 2, 3, 1) for level in theirs.values()]
        assert_close(list(gradients), expected, 1e-4)


def run(function, *arguments):
    """Compiled with little effort, in half the time. Weights are arguments, as constants would be folded, for long."""
    program = jax.jit(function).lower(*arguments).compile(compiler_options={"xla_backend_optimization_level": 0})
    return program(*arguments)


def check_detections(ours, found, assert_close, tolerance):
    """In the order of scores; ``found`` holds masks in boxes."""
    for i, rows in enumerate(found):
        assert int(ours.valid[i].sum()) == len(rows["boxes"]) > 20
        mine = jax.tree.map(lambda x, i=i: x[i][ours.valid[i]], ours)
        assert mine.labels.tolist() == (rows["labels"] - 1).tolist()
        expected = [rows[name].detach().numpy() for name in ("boxes", "scores", "masks")]
        assert_close([mine.boxes, mine.scores, mine.masks[:, None]], expected, tolerance)


@pytest.mark.parametrize("v2", [False, True])
class TestWholeModel:
    """``maskrcnn_resnet50_fpn`` and its ``_v2`` from pixels on, thin and with one block in each stage.

    1e-4 of each array's scale: some thirty layers lie between the pixels and the boxes.
    """

    def test_every_step_of_detection(self, rng, assert_close, monkeypatch, v2):
        import torch

        module = torch_mask_rcnn(v2=v2).eval()
        model, state = copied(*whole_model(dialect(), monkeypatch, v2=v2), module.state_dict())
        images = rng.normal(size=(2, *SIZE, 3)).astype(np.float32)
        steps = {part: [] for part in ("backbone", "rpn.head", "rpn", "roi_heads")}
        for part, kept in steps.items():  # copies, as the last step puts masks into images in place
            module.get_submodule(part).register_forward_hook(lambda _, __, x, kept=kept: kept.append(copy.deepcopy(x)))
        with torch.no_grad():
            pasted = module(list(torch.from_numpy(images).permute(0, 3, 1, 2)))

        arrays, rest = eqx.partition(model, eqx.is_array)

        def ours(arrays, state, inputs):
            model = eqx.combine(arrays, rest)
            maps, _ = model.features(inputs, state)
            outputs, _ = model.rpn(maps, state)
            rule, anchors = model.dialect.test_proposals, model.anchors(maps, inputs)
            proposals = select_proposals(outputs, *anchors, inputs.size, rule=rule)
            found = model.detect(maps, inputs, state)
            images = paste_masks(found.masks, found.boxes, SIZE, rule="torchvision", threshold=None)
            return maps, outputs, proposals, found, images

        maps, outputs, proposals, found, masks = run(ours, arrays, state, inputs_of(images))
        assert_close(list(maps), [x.permute(0, 2, 3, 1).numpy() for x in steps["backbone"][0].values()], 1e-4)
        logits, deltas = steps["rpn.head"][0]
        assert_close(list(outputs.logits), [x.permute(0, 2, 3, 1).flatten(1).numpy() for x in logits], 1e-4)
        by_place = [x.unflatten(1, (3, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3).numpy() for x in deltas]
        assert_close(list(outputs.deltas), by_place, 1e-4)
        assert proposals.valid.all()
        assert_close(proposals.boxes, np.stack(steps["rpn"][0][0]), 1e-4)
        check_detections(found, steps["roi_heads"][0][0], assert_close, 1e-4)
        for i, rows in enumerate(pasted):
            assert_close(masks[i][found.valid[i]], rows["masks"][:, 0].numpy(), 1e-4)

    def test_losses_gradients_and_statistics(self, rng, assert_close, monkeypatch, first_are_drawn, v2):
        import torch

        counts = {"anchors": 64, "boxes": 16}  # no more boxes than there are, which batch norms in heads would see
        module = torch_mask_rcnn(v2=v2, **counts)
        model, state = copied(*whole_model(dialect(**counts), monkeypatch, v2=v2), module.state_dict())
        images = rng.normal(size=(2, *SIZE, 3)).astype(np.float32)
        theirs = torch.from_numpy(images).permute(0, 3, 1, 2)
        targets = scene(rng, proposals_in_training(module, theirs))
        losses = module.train()(list(theirs), torch_targets(targets))
        sum(losses.values()).backward()

        arrays, rest = eqx.partition(model, eqx.is_inexact_array)

        def ours(arrays, state, inputs, targets):
            def loss(arrays):
                keys = jax.random.split(jax.random.key(0), 2)
                samples, after = eqx.combine(arrays, rest).train_outputs(inputs, targets, state, keys=keys)
                value, (terms, counts) = losses_of(samples)
                return value, (terms, counts, after)

            return jax.value_and_grad(loss, has_aux=True)(arrays)

        (_, (terms, drawn, after)), gradients = run(ours, arrays, state, inputs_of(images), targets)
        assert (drawn.anchors, drawn.boxes[0], drawn.masks) == (128, 32, 8)
        assert_close(terms, {ours: losses[name].item() for ours, name in LOSSES.items()}, 1e-4)
        _, expected_state = copied(model, state, module.state_dict())
        assert_close(jax.tree.leaves(after), jax.tree.leaves(expected_state), 1e-4)
        slopes = {name: torch.zeros_like(value) for name, value in module.state_dict().items()}
        slopes |= {name: value.grad for name, value in module.named_parameters()}
        assert_close(gradients, eqx.filter(copied(model, state, slopes)[0], eqx.is_inexact_array), 1e-4)


def proposals_in_training(module, images):
    """Of torchvision's model, which stays as it is."""
    import torch
    from torchvision.models.detection.image_list import ImageList

    module = copy.deepcopy(module).train()
    module.rpn.eval()  # or it would want targets
    with torch.no_grad():
        return np.stack(module.rpn(ImageList(images, [SIZE] * 2), module.backbone(images))[0])
