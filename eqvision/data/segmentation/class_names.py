"""Classes of the data sets whose files do not name them."""

from eqvision.data.detection.coco_classes import COCO_THINGS

PET_CLASSES = ("pet", "background", "border")  # of Oxford-IIIT Pet's trimaps, in the order of their values 1, 2, 3

# Cityscapes (Cordts et al. 2016): the id that the annotation files have for each of the 19 classes of the benchmark
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
CITYSCAPES_CLASSES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip

# COCO-Stuff (Caesar et al. 2018): ids 92 to 182, without gaps
_STUFF = """
banner, blanket, branch, bridge, building-other, bush, cabinet, cage, cardboard, carpet, ceiling-other, ceiling-tile,
cloth, clothes, clouds, counter, cupboard, curtain, desk-stuff, dirt, door-stuff, fence, floor-marble, floor-other,
floor-stone, floor-tile, floor-wood, flower, fog, food-other, fruit, furniture-other, grass, gravel, ground-other, hill,
house, leaves, light, mat, metal, mirror-stuff, moss, mountain, mud, napkin, net, paper, pavement, pillow, plant-other,
plastic, platform, playingfield, railing, railroad, river, road, rock, roof, rug, salad, sand, sea, shelf, sky-other,
skyscraper, snow, solid-other, stairs, stone, straw, structural-other, table, tent, textile-other, towel, tree,
vegetable, wall-brick, wall-concrete, wall-other, wall-panel, wall-stone, wall-tile, wall-wood, water-other, waterdrops,
window-blind, window-other, wood"""

# The 80 things and 91 kinds of stuff by id; label files have the id less one
COCO_STUFF_CLASSES: dict[int, str] = {
    **COCO_THINGS,
    **{92 + place: name.strip() for place, name in enumerate(_STUFF.replace("\n", " ").split(","))},
}
