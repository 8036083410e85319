"""Proposals, losses, their gradients, detections and masks beside torchvision's own code, with all boxes drawn."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rcnn_references import CLASSES, SIZE, copied, dialect, greedy, head_model, random_maps, torch_heads, torch_maps

from eqvision.losses import rcnn_counts, rcnn_loss
from eqvision.types import DetectionTargets, PaddedImages

pytestmark = pytest.mark.parity
NAMES = {
    "objectness": "loss_objectness",
    "proposal": "loss_rpn_box_reg",
    "class": "loss_classifier",
    "box": "loss_box_reg",
    "mask": "loss_mask",
}


@pytest.fixture
def torchvision_on_cpu(monkeypatch):
    """Without its kernels: NMS as a loop, and RoIAlign in Python, which it would compile for minutes."""
    import torch
    from torchvision.ops import boxes

    monkeypatch.setattr(boxes, "nms", greedy)
    with torch.compiler.set_stance("force_eager"):
        yield


def inputs_of(count=2):
    return PaddedImages(jnp.zeros((count, *SIZE, 3)), jnp.full((count, 2), jnp.asarray(SIZE)))


def scene(rng, count=2, objects=5):
    """The second image has one object less, in whose place stands junk."""
    corner = rng.uniform(0, 60, (count, objects, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(6, 35, (count, objects, 2))], axis=-1).astype(np.float32)
    labels = rng.integers(0, CLASSES, (count, objects)).astype(np.int32)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    low, high = boxes[..., :2, None, None], boxes[..., 2:, None, None]
    inside = (x > low[:, :, 0]) & (x < high[:, :, 0]) & (y > low[:, :, 1]) & (y < high[:, :, 1])
    masks = (inside & (rng.random(inside.shape) < 0.8)).astype(np.uint8)
    valid = np.ones((count, objects), bool)
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


def test_losses_and_gradients_are_torchvisions(rng, assert_close, torchvision_on_cpu):
    proposer, heads = torch_heads()
    model, state = copied(*head_model(dialect(boxes=240)), proposer, heads)
    maps, targets = random_maps(rng), scene(rng)
    theirs = torch_maps(maps)
    proposals, losses = proposer(image_list(), theirs, torch_targets(targets))
    losses |= heads(theirs, proposals, [SIZE] * 2, torch_targets(targets))[1]
    sum(losses.values()).backward()

    @eqx.filter_jit
    def ours(maps):
        def loss(maps):
            samples, _ = model.samples(maps, inputs_of(), targets, state, keys=jax.random.split(jax.random.key(0), 2))
            counts = rcnn_counts(samples, jnp.ones(2))
            value, terms = rcnn_loss(samples, jnp.ones(2), counts)
            return value, (terms, counts)

        return jax.value_and_grad(loss, has_aux=True)(maps)

    (_, (terms, counts)), gradients = ours(maps)
    assert counts.masks > 9  # some proposals besides the nine objects themselves
    assert counts.boxes[0] == sum(len(p) for p in proposals) + 9
    assert_close(terms, {ours: losses[name].item() for ours, name in NAMES.items()}, 2e-5)
    expected = [level.grad.numpy().transpose(0, 2, 3, 1) for level in theirs.values()]
    assert_close(list(gradients), expected, 1e-4)


@pytest.mark.parametrize("v2", [False, True])
def test_detections_and_masks_are_torchvisions(rng, assert_close, torchvision_on_cpu, v2):
    proposer, heads = torch_heads(v2=v2)
    proposer.eval(), heads.eval()
    model, state = copied(*head_model(dialect(), v2=v2), proposer, heads)
    maps = random_maps(rng)
    proposals, _ = proposer(image_list(), torch_maps(maps))
    found, _ = heads(torch_maps(maps), proposals, [SIZE] * 2)
    ours = eqx.filter_jit(lambda maps: model.detect(maps, inputs_of(), state))(maps)
    for i, rows in enumerate(found):
        assert int(ours.valid[i].sum()) == len(rows["boxes"]) > 20
        mine = jax.tree.map(lambda x, i=i: x[i][ours.valid[i]], ours)
        assert mine.labels.tolist() == (rows["labels"] - 1).tolist()
        expected = [rows[name].detach().numpy() for name in ("boxes", "scores")]
        assert_close([mine.boxes, mine.scores], expected, 1e-5)
        assert_close(mine.masks, rows["masks"].detach().numpy()[:, 0], 1e-5)
