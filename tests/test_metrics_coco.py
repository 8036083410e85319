"""COCO figures equal pycocotools on every edge case; LVIS rules by hand; streaming, merging, messages."""

import builtins
import contextlib
import io
import math

import numpy as np
import pytest
from pycocotools import mask as mask_tools
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from eqvision.metrics import CocoMetric, compute, frequency_groups
from eqvision.metrics.coco_figures import encode_mask
from eqvision.names import UnknownNameError

SIDE = 160
CLASSES = ("usual", "sizes", "crowd only", "never", "found only", "many")
FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


# The fixture, as a COCO file has it: xywh and category ids; each object is (image, class, xywh, area, crowd)


def edge_objects():
    return [
        (42, 0, (8, 8, 24, 48), 700.0, 0),  # small by the area of its mask, medium by that of its box
        (42, 0, (8, 8, 24, 48), 1152.0, 0),  # the same box again: detections tie between the two
        (42, 0, (60, 60, 80, 80), 6400.0, 1),  # a crowd, and in it an object
        (42, 0, (64, 64, 32, 32), 1024.0, 0),  # exactly on the edge of small and medium
        (7, 1, (0, 0, 96, 96), 9216.0, 0),  # exactly on the edge of medium and large
        (7, 1, (100, 100, 8, 8), 64.0, 0),
        (7, 1, (60, 130, 20, 20), 400.0, 0),
        (7, 2, (10, 100, 40, 40), 1600.0, 1),  # the class has crowds only
        (7, 0, (112, 8, 32, 16), 512.0, 0),
        (900, 5, (4, 4, 20, 20), 400.0, 0),
        (900, 5, (100, 100, 20, 20), 400.0, 0),
        (13, 0, (40, 40, 60, 60), 3600.0, 0),  # nothing is found in this image
    ]


def edge_detections():
    """(image, class, xywh, score); 3 is an image without objects, 5 one without either."""
    rows = [
        (42, 0, (8, 8, 24, 48), 0.5),  # ties in the image and across images
        (42, 0, (8, 8, 24, 48), 0.5),
        (42, 0, (8, 8, 24, 48), 0.5),
        (42, 0, (62, 100, 20, 20), 0.9),  # three on the crowd: neither right nor wrong
        (42, 0, (90, 70, 30, 30), 0.8),
        (42, 0, (64, 64, 32, 32), 0.5),
        (42, 0, (60, 62, 32, 32), 0.25),
        (42, 4, (10, 10, 30, 30), 0.95),
        (7, 1, (0, 0, 96, 48), 0.5),  # an overlap of exactly 0.5
        (7, 1, (0, 0, 96, 72), 0.5),  # and of exactly 0.75
        (7, 1, (100, 100, 8, 8), 0.5),
        (7, 1, (102, 100, 8, 8), 0.7),
        (7, 1, (60, 130, 20, 20), 0.03125),  # low scores count
        (7, 2, (12, 100, 40, 40), 0.6),
        (7, 2, (100, 10, 40, 40), 0.6),
        (7, 0, (112, 8, 32, 16), 0.5),
        (7, 0, (20, 120, 32, 32), 0.5),  # wrong, and exactly 1024 in size
        (3, 0, (20, 20, 40, 40), 0.5),
        (3, 4, (20, 20, 4, 4), 0.125),
    ]
    many = [(900, 5, (i % 12 * 12, i // 12 * 12, 20, 20), 1 - i / 256) for i in range(120)]
    return rows + [*many, (900, 5, (100, 100, 20, 20), 0.01)]  # the last is right and number 121


EDGE_IMAGES = (900, 42, 7, 13, 3, 5)


def random_case(seed):
    """Boxes in eighths of pixels, which float arithmetic does not round; scores from a few values, so that they tie."""
    rng = np.random.default_rng(seed)
    images = tuple(int(i) for i in rng.permutation(400)[:12] + 1)

    def box():
        corner, side = rng.integers(0, 400, 2) / 8, rng.integers(16, 1200, 2) / 8
        return (*corner.tolist(), *side.tolist())

    objects, found = [], []
    for image in images[:-1]:
        for _ in range(rng.integers(0, 9)):
            x, y, w, h = box()
            label = int(rng.integers(0, 4))
            objects.append((image, label, (x, y, w, h), w * h * float(rng.choice([0.5, 1.0])), int(rng.random() < 0.2)))
            for _ in range(rng.integers(0, 4)):
                moved = np.array((x, y, w, h)) + rng.integers(-24, 25, 4) / 8
                found.append((image, label, tuple(np.maximum(moved, 1).tolist()), float(rng.integers(1, 9) / 8)))
    found += [
        (int(rng.choice(images)), int(rng.integers(0, 5)), box(), float(rng.integers(1, 9) / 8)) for _ in range(60)
    ]
    return images, objects, found


def rectangle(xywh):
    """A mask that is not quite its box: one corner is missing."""
    x, y, w, h = (round(v) for v in xywh)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[y : y + h, x : x + w] = 1
    mask[y : y + h // 3, x : x + w // 3] = 0
    return mask


def run_lengths(xywh):
    return mask_tools.encode(np.asfortranarray(rectangle(xywh)))


# The oracle


def reference(images, objects, found, kind, names=CLASSES, max_detections=(1, 10, 100)):
    """The run of pycocotools; its category ids have gaps."""
    truth = COCO()
    truth.dataset = {
        "images": [{"id": i, "height": SIDE, "width": SIDE} for i in images],
        "categories": [{"id": 3 * k + 1, "name": name} for k, name in enumerate(names)],
        "annotations": [
            {
                "id": n + 1, "image_id": image, "category_id": 3 * label + 1, "bbox": list(box), "area": area,
                "iscrowd": crowd, "segmentation": run_lengths(box),
            }
            for n, (image, label, box, area, crowd) in enumerate(objects)
        ],
    }  # fmt: skip
    results = [
        {"image_id": image, "category_id": 3 * label + 1, "score": score}
        | ({"bbox": list(box)} if kind == "bbox" else {"segmentation": run_lengths(box)})
        for image, label, box, score in found
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        run = COCOeval(truth, truth.loadRes(results), kind)
        run.params.maxDets = list(max_detections)
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run


def xyxy(boxes):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def fill(metric, images, objects, found, *, masks=False):
    for image in images:
        rows = [row for row in objects if row[0] == image]
        metric.add_truth(
            image,
            xyxy([row[2] for row in rows]),
            np.array([row[1] for row in rows], np.int32),
            area=np.array([row[3] for row in rows], np.float64),
            crowd=np.array([row[4] for row in rows], np.int32),
            masks=[rectangle(row[2]) for row in rows] if masks else None,
        )
        rows = [row for row in found if row[0] == image]
        if rows:
            metric.add_detections(
                image,
                xyxy([row[2] for row in rows]),
                np.array([row[3] for row in rows]),
                np.array([row[1] for row in rows], np.int32),
                masks=(rectangle(row[2]) for row in rows) if masks else None,
            )
    return metric


# pycocotools adds 2.2e-16 to the denominator of a precision, faster-coco-eval does not. It shows where one detection is
# counted: 1 - 2.2e-16 against 1. So figures may differ by that much, and by the rounding of their means.
ROUNDING = 1e-15


def assert_equal_to_pycocotools(figures, run, prefix=""):
    for name, expected in zip(FIGURES, run.stats, strict=True):
        value = figures[prefix + name]
        same = abs(value - expected) <= (0 if name.startswith("AR") else ROUNDING)
        assert same or (math.isnan(value) and expected == -1), f"{prefix}{name}: {value!r} and {expected!r}"


def test_the_twelve_figures_equal_pycocotools_on_every_edge_case():
    case = EDGE_IMAGES, edge_objects(), edge_detections()
    metric = fill(CocoMetric(CLASSES, masks=True), *case, masks=True)
    figures = metric.compute()
    assert list(figures) == [*FIGURES, *(f"mask_{name}" for name in FIGURES)]
    boxes, masks = reference(*case, "bbox"), reference(*case, "segm")
    assert_equal_to_pycocotools(figures, boxes)
    assert_equal_to_pycocotools(figures, masks, "mask_")
    # the fixture is worth something only if no figure is trivial
    assert all(0 < value < 1 for value in [*boxes.stats, *masks.stats])
    assert boxes.stats[8] < 1  # the right detection beyond the hundredth does not count


@pytest.mark.parametrize("seed", range(4))
def test_figures_equal_pycocotools_on_random_images(seed):
    case = random_case(seed)
    metric = fill(CocoMetric(CLASSES, masks=True), *case, masks=True)
    figures = metric.compute()
    for kind, prefix in (("bbox", ""), ("segm", "mask_")):
        assert_equal_to_pycocotools(figures, reference(*case, kind), prefix)


def test_class_figures_and_curves_equal_pycocotools():
    case = EDGE_IMAGES, edge_objects(), edge_detections()
    result = fill(CocoMetric(CLASSES), *case).evaluate()
    expected = reference(*case, "bbox").eval["precision"][:, :, :, 0, -1]
    ours = np.nan_to_num(result.precision, nan=-1.0)
    one_counted = (ours == 1) & (expected == 1 - np.spacing(1.0))  # see ROUNDING
    assert ((ours == expected) | one_counted).all()
    np.testing.assert_allclose(result.class_ap()[[0, 1, 5]], expected.mean(axis=(0, 1))[[0, 1, 5]], rtol=1e-12)
    assert np.isnan(result.class_ap()[[2, 3, 4]]).all()
    assert result.objects.tolist() == [5, 3, 0, 0, 0, 2]
    np.testing.assert_array_equal(result.curves(0.75)[:, 0], ours[5, :, 0])
    with pytest.raises(ValueError, match=r"threshold is 0\.52; expected one of \[0\.5, 0\.55"):
        result.class_ap(0.52)
    lines = result.table().splitlines()
    assert lines[0].split() == ["class", "objects", "AP", "AP50", "AP75"]
    assert [line.rsplit(None, 4)[0] for line in lines[-3:]] == ["crowd only", "never", "found only"]
    assert lines[-1].split()[2:] == ["0", "-", "-", "-"]


def test_other_numbers_of_detections():
    case = EDGE_IMAGES, edge_objects(), edge_detections()
    figures = fill(CocoMetric(CLASSES, max_detections=(2, 5, 130)), *case).compute()
    assert list(figures)[6:9] == ["AR2", "AR5", "AR130"]
    run = reference(*case, "bbox", max_detections=(2, 5, 130))
    assert [figures["AR2"], figures["AR5"], figures["AR130"]] == run.stats[6:9].tolist()
    assert figures["AP50"] == pytest.approx(run.stats[1], abs=ROUNDING)
    assert figures["AR130"] > fill(CocoMetric(CLASSES), *case).compute()["AR100"]


# Figures by hand


def box(*corners):
    return np.array([corners], np.float32)


def one(label=0):
    return np.array([label], np.int32)


def test_figures_by_hand():
    metric = CocoMetric(("a", "b"))
    metric.add_truth(1, np.array([[0, 0, 10, 10], [20, 20, 30, 30]], np.float32), np.array([0, 0], np.int32))
    metric.add_detections(1, box(0, 0, 10, 10), np.array([0.9], np.float32), one())
    figures = metric.compute()
    # one of two objects found exactly: precision 1 at the 51 recalls up to 0.5 of 101, and 0 beyond
    assert figures["AP"] == figures["AP50"] == figures["APs"] == pytest.approx(51 / 101)
    assert figures["AR1"] == figures["AR100"] == 0.5
    assert math.isnan(figures["APm"])
    assert math.isnan(figures["ARl"])


def test_nothing_found_and_nothing_there():
    metric = CocoMetric(("a",))
    metric.add_truth(1, np.zeros((0, 4), np.float32), np.zeros(0, np.int32))
    assert math.isnan(metric.compute()["AP"])
    metric.add_truth(2, box(0, 0, 10, 10), one())
    assert metric.compute()["AP"] == 0
    assert metric.compute()["AR100"] == 0
    metric.add_detections(2, np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))
    assert compute({"coco": metric})["coco/AP"] == 0


def test_an_image_without_objects_counts():
    def ap(with_empty):
        metric = CocoMetric(("a",))
        metric.add_truth(1, box(0, 0, 10, 10), one())
        metric.add_detections(1, box(0, 0, 10, 10), np.array([0.5]), one())
        if with_empty:
            metric.add_truth(2, np.zeros((0, 4), np.float32), np.zeros(0, np.int32))
            metric.add_detections(2, box(0, 0, 10, 10), np.array([0.9]), one())
        return metric.compute()["AP"]

    assert ap(False) == 1
    assert ap(True) == pytest.approx(0.5)


def test_area_is_that_of_the_mask_or_else_of_the_box():
    mask = np.zeros((60, 60), bool)
    mask[:30, :40] = True  # 1200 pixels, medium
    mask[0, :] = False

    def sizes(masks):
        metric = CocoMetric(("a",), masks=masks)
        given = {"masks": [mask]} if masks else {}
        metric.add_truth(1, box(0, 0, 25, 40), one(), **given)
        metric.add_detections(1, box(0, 0, 25, 40), np.array([0.5]), one(), **given)
        return metric.compute()

    assert math.isnan(sizes(False)["APm"])
    assert sizes(False)["APs"] == 1  # 25 x 40 = 1000
    assert sizes(True)["APm"] == 1
    assert math.isnan(sizes(True)["APs"])


# LVIS


def federated(**lists):
    """Image 1 holds class 0; class 1 was found there, and class 2 has an object that is elsewhere."""
    metric = CocoMetric(("a", "b", "c"), frequencies=("r", "c", "f"))
    metric.add_truth(1, box(0, 0, 10, 10), one(0), **lists)
    metric.add_truth(2, np.array([[0, 0, 10, 10], [0, 0, 50, 50]], np.float32), np.array([1, 2], np.int32))
    boxes = np.array([[0, 0, 10, 10], [40, 40, 50, 50], [0, 0, 10, 10]], np.float32)
    metric.add_detections(1, boxes, np.array([0.5, 0.9, 0.9]), np.array([0, 0, 1], np.int32))
    metric.add_detections(2, box(0, 0, 10, 10), np.array([0.5]), one(1))
    return metric.compute()


def test_lvis_counts_a_class_only_where_it_was_looked_for():
    plain = federated()
    assert plain["APr"] == pytest.approx(0.5)  # the wrong one of class 0 is in an image that holds the class
    assert plain["APc"] == 1  # nobody looked for class 1 in image 1
    assert plain["APf"] == 0
    assert plain["AP"] == pytest.approx(0.5)
    assert list(plain) == [
        "AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf", "AR300", "ARs", "ARm", "ARl",
    ]  # fmt: skip
    assert federated(negative=np.array([1], np.int32))["APc"] == pytest.approx(0.5)  # somebody did, and it is not there


def test_lvis_forgives_detections_of_classes_that_are_not_exhaustive():
    assert federated(not_exhaustive=(0,))["APr"] == 1
    assert federated(not_exhaustive=(1,))["APc"] == 1  # still not looked for
    assert federated(negative=(1,), not_exhaustive=(1,))["APc"] == 1


def test_lvis_keeps_the_best_detections_of_an_image_over_all_classes():
    metric = CocoMetric(("a", "b"), frequencies=("r", "f"), max_detections=(2,))
    metric.add_truth(1, np.array([[0, 0, 10, 10], [20, 20, 40, 40]], np.float32), np.array([0, 1], np.int32))
    boxes = np.array([[0, 0, 10, 10], [50, 50, 60, 60], [50, 50, 60, 60]], np.float32)
    metric.add_detections(1, boxes, np.array([0.1, 0.9, 0.8]), np.array([0, 1, 1], np.int32))
    assert metric.compute()["APr"] == 0
    assert metric.compute()["AR2"] == 0


def test_without_federation_lvis_equals_pycocotools():
    images, objects, found = random_case(7)
    objects = [(*row[:4], 0) for row in objects]
    metric = CocoMetric(CLASSES, frequencies=("r", "c", "f") * 2)
    for image in images:
        rows = [row for row in objects if row[0] == image]
        metric.add_truth(
            image,
            xyxy([row[2] for row in rows]),
            np.array([row[1] for row in rows], np.int32),
            area=np.array([row[3] for row in rows], np.float64),
            negative=range(len(CLASSES)),
        )
        rows = [row for row in found if row[0] == image]
        scores, labels = np.array([row[3] for row in rows]), np.array([row[1] for row in rows], np.int32)
        metric.add_detections(image, xyxy([row[2] for row in rows]), scores, labels)
    figures, run = metric.compute(), reference(images, objects, found, "bbox", max_detections=(1, 10, 300))
    for name, index in zip(("AP50", "AP75", "APs", "APm", "APl", "AR300"), (1, 2, 3, 4, 5, 8), strict=True):
        assert figures[name] == pytest.approx(run.stats[index], abs=ROUNDING)
    assert figures["AP"] == pytest.approx(run.eval["precision"][:, :, :4, 0, -1].mean(), abs=ROUNDING)
    assert figures["APc"] == pytest.approx(run.eval["precision"][:, :, 1, 0, -1].mean(), abs=ROUNDING)


def test_frequency_groups():
    assert frequency_groups(np.array([0, 10, 11, 100, 101])) == ("r", "r", "c", "c", "f")


# Batches, masks, hosts


def test_a_batch_equals_its_images_one_by_one():
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 50, (4, 6, 2)).astype(np.float32)
    boxes = np.concatenate([corners, corners + 16], axis=-1)
    scores, labels = rng.uniform(size=(4, 6)).astype(np.float32), rng.integers(0, 3, (4, 6)).astype(np.int32)
    valid, weights = rng.uniform(size=(4, 6)) < 0.7, np.array([1, 1, 0, 1], np.float32)
    boxes[2], scores[2], labels[2] = np.nan, np.nan, 99  # padding may hold anything
    labels[~valid], boxes[~valid] = -1, np.nan
    masks = [[np.ones((80, 80), bool)] * int(row.sum()) for row in valid]
    whole, single = CocoMetric("abc", masks=True), CocoMetric("abc", masks=True)
    ids = np.array([5, 3, -1, 4])
    whole.update(ids, boxes, scores, labels, valid=valid, weights=weights, masks=iter(masks))
    for i in (0, 1, 3):
        rows = valid[i]
        single.add_detections(int(ids[i]), boxes[i][rows], scores[i][rows], labels[i][rows], masks=masks[i])
    for metric in (whole, single):
        for image in (3, 4, 5):
            metric.add_truth(image, box(0, 0, 40, 40), one(), masks=[np.ones((80, 80), bool)])
    np.testing.assert_equal(whole.compute(), single.compute())
    assert whole.compute()["mask_AP"] > 0
    assert len(whole) == 3
    with pytest.raises(ValueError, match="masks end after 2 of 4 images"):
        CocoMetric("abc", masks=True).update(ids, boxes, scores, labels, valid=valid, weights=weights, masks=masks[:2])


def test_masks_are_encoded_one_by_one_and_not_kept():
    alive = []

    def masks():
        for number in range(5):
            mask = np.zeros((40, 40), bool)
            mask[number : number + 9, 3:9] = True
            alive.append(mask)
            yield mask

    metric = CocoMetric("a", masks=True)
    metric.add_detections(1, np.ones((5, 4), np.float32), np.ones(5), np.zeros(5, np.int32), masks=masks())
    kept = metric._found[1].masks
    assert [len(rle["counts"]) < 40 for rle in kept] == [True] * 5
    for rle, mask in zip(kept, alive, strict=True):
        assert rle == mask_tools.encode(np.asfortranarray(mask.view(np.uint8)))


def test_run_lengths_of_every_form_are_one():
    mask = rectangle((10, 20, 30, 40))
    compressed = mask_tools.encode(np.asfortranarray(mask))
    text = {**compressed, "counts": compressed["counts"].decode()}
    flat = np.concatenate([[0], mask.ravel(order="F"), [0]])
    edges = np.flatnonzero(np.diff(flat))
    counts = np.diff(np.concatenate([[0], edges, [mask.size]]))
    plain = {"size": list(mask.shape), "counts": counts}
    for form in (mask, mask.astype(bool), compressed, text, plain):
        assert encode_mask(form) == {"size": [SIDE, SIDE], "counts": compressed["counts"]}
    with pytest.raises(ValueError, match=r"float64 of shape \(2, 2\); expected an \[h w\] array of 0 and 1"):
        encode_mask(np.full((2, 2), 0.5))


def parts(case, share):
    """The metric over the images of one host, and those that are left."""
    images, objects, found = case
    return fill(CocoMetric(CLASSES, masks=True), [images[i] for i in share], objects, found, masks=True)


def test_hosts_merge_to_the_whole_in_any_order():
    case = EDGE_IMAGES, edge_objects(), edge_detections()
    whole = parts(case, range(6)).compute()
    first, second = parts(case, (0, 3, 4)), parts(case, (1, 2, 5))
    assert first.merge(second).compute() == second.merge(first).compute() == whole
    overlapping = parts(case, (0, 1, 2, 5))  # the last host takes images of others to fill its share
    assert first.merge(overlapping).compute() == whole
    assert len(first) == 3
    np.testing.assert_equal(first.merge_hosts().compute(), first.compute())  # one process: itself


def test_all_hosts_are_gathered(monkeypatch):
    import jax.experimental.multihost_utils as multihost

    case = EDGE_IMAGES, edge_objects(), edge_detections()
    hosts = [parts(case, (0, 3, 4)), parts(case, (1, 2, 5))]
    asked = [[], []]
    for number, host in enumerate(hosts):  # what each host hands over, in two rounds
        monkeypatch.setattr(multihost, "process_allgather", lambda x, n=number: asked[n].append(x) or x[None])
        host.merge_hosts()
    size = max(len(rounds[1]) for rounds in asked)
    answers = iter([np.stack([r[0] for r in asked]), np.stack([np.pad(r[1], (0, size - len(r[1]))) for r in asked])])
    monkeypatch.setattr(multihost, "process_allgather", lambda x: next(answers))
    assert hosts[0].merge_hosts().compute() == parts(case, range(6)).compute()


# Messages


def test_what_does_not_fit_is_refused():
    metric = CocoMetric(("a", "b"))
    metric.add_truth(1, box(0, 0, 10, 10), one())
    with pytest.raises(ValueError, match="objects of image 1 were given before"):
        metric.add_truth(1, box(0, 0, 10, 10), one())
    with pytest.raises(ValueError, match=r"image 2: label 2 among 2 classes; expected 0 to 1 .*not the category ids"):
        metric.add_truth(2, box(0, 0, 10, 10), one(2))
    with pytest.raises(ValueError, match=r"image 2: box 0 is \[5\.0, 5\.0, 4\.0, 9\.0\], whose second corner"):
        metric.add_truth(2, box(5, 5, 4, 9), one())
    with pytest.raises(ValueError, match="image 2: the boxes of its detections are not all finite"):
        metric.add_detections(2, box(0, 0, np.nan, 9), np.array([0.5]), one())
    with pytest.raises(ValueError, match="image 2: a score is not finite"):
        metric.add_detections(2, box(0, 0, 9, 9), np.array([np.nan]), one())
    metric.add_detections(1, box(0, 0, 10, 10), np.array([0.5]), one())
    with pytest.raises(ValueError, match=r"image 1 were given before.*pad a batch need weight 0"):
        metric.add_detections(1, box(0, 0, 10, 10), np.array([0.5]), one())
    with pytest.raises(ValueError, match="negative and not_exhaustive belong to the rules of LVIS"):
        metric.add_truth(2, box(0, 0, 10, 10), one(), negative=(1,))


def test_rows_that_do_not_belong_together(unchecked):
    metric = CocoMetric("a")
    with pytest.raises(ValueError, match=r"image 1: objects have boxes \(1, 4\) and labels \(2,\); expected \[n 4\]"):
        metric.add_truth(1, box(0, 0, 10, 10), np.zeros(2, np.int32))
    with pytest.raises(ValueError, match="image 1: 2 scores for 1 labels"):
        metric.add_detections(1, box(0, 0, 10, 10), np.zeros(2), one())
    with pytest.raises(ValueError, match="image 1: 2 area for 1 labels"):
        metric.add_truth(1, box(0, 0, 10, 10), one(), area=np.zeros(2))


def test_masks_that_are_missing_or_of_several_sizes():
    metric = CocoMetric("a", masks=True)
    with pytest.raises(ValueError, match="image 1: objects without masks"):
        metric.add_truth(1, box(0, 0, 10, 10), one())
    with pytest.raises(ValueError, match="image 1: 2 masks for 1 labels"):
        metric.add_truth(1, box(0, 0, 10, 10), one(), masks=[np.ones((9, 9), bool)] * 2)
    metric.add_truth(1, box(0, 0, 10, 10), one(), masks=[np.ones((9, 9), bool)])
    metric.add_detections(1, box(0, 0, 10, 10), np.array([0.5]), one(), masks=[np.ones((9, 7), bool)])
    with pytest.raises(ValueError, match=r"image 1: its masks are of different sizes.*\[\(9, 7\), \(9, 9\)\]"):
        metric.compute()
    with pytest.raises(ValueError, match=r"masks were not kept; expected CocoMetric\(\.\.\., masks=True\)"):
        CocoMetric("a").evaluate("masks")
    with pytest.raises(UnknownNameError, match="kind of COCO figures 'box' does not exist; nearest: boxes"):
        CocoMetric("a").evaluate("box")


def test_options_and_images_that_do_not_fit():
    with pytest.raises(ValueError, match=r"max_detections is \(10, 1\); expected ascending numbers"):
        CocoMetric("a", max_detections=(10, 1))
    with pytest.raises(ValueError, match=r"frequencies has 2 entries \['r', 'x'\] for 3 classes"):
        CocoMetric("abc", frequencies=("r", "x"))
    with pytest.raises(ValueError, match="class_names is empty"):
        CocoMetric(())
    with pytest.raises(ValueError, match="COCO figures of no image"):
        CocoMetric("a").compute()
    metric = CocoMetric("a")
    metric.add_detections(8, box(0, 0, 10, 10), np.array([0.5]), one())
    with pytest.raises(ValueError, match=r"detections of 1 images were given and their objects not \(first: \[8\]\)"):
        metric.compute()
    with pytest.raises(ValueError, match="class_names differs between the two metrics"):
        CocoMetric("a").merge(CocoMetric("b"))
    one_way, another = CocoMetric("a"), CocoMetric("a")
    one_way.add_truth(1, box(0, 0, 10, 10), one())
    another.add_truth(1, box(0, 0, 10, 11), one())
    with pytest.raises(ValueError, match="different objects for image 1"):
        one_way.merge(another)


def test_without_the_library_the_error_says_what_to_install(monkeypatch):
    metric = CocoMetric("a")
    metric.add_truth(1, box(0, 0, 10, 10), one())
    real = builtins.__import__

    def hidden(name, *rest, **named):
        if name == "faster_coco_eval":
            raise ModuleNotFoundError("No module named 'faster_coco_eval'")
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", hidden)
    with pytest.raises(ImportError, match=r"need faster-coco-eval .*pip install 'eqvision\[coco\]'"):
        metric.compute()
