"""Images with captions: sources and streams for contrastive training."""

from eqvision.data.pairs.coco import coco_captions as coco_captions
from eqvision.data.pairs.coco import find_captions as find_captions
from eqvision.data.pairs.digits import SENTENCES as SENTENCES
from eqvision.data.pairs.digits import TEMPLATES as TEMPLATES
from eqvision.data.pairs.digits import CaptionedDigits as CaptionedDigits
from eqvision.data.pairs.digits import digit_captions as digit_captions
from eqvision.data.pairs.files import CaptionedFiles as CaptionedFiles
from eqvision.data.pairs.files import CaptionRow as CaptionRow
from eqvision.data.pairs.folder import captioned_folder as captioned_folder
from eqvision.data.pairs.source import PairExample as PairExample
from eqvision.data.pairs.source import PairSource as PairSource
from eqvision.data.pairs.stream import PairsStream as PairsStream
from eqvision.data.pairs.stream import TextEncoder as TextEncoder
from eqvision.data.pairs.stream import count_cut as count_cut
from eqvision.data.pairs.stream import drawn_caption as drawn_caption
from eqvision.data.pairs.stream import pairs_eval_stream as pairs_eval_stream
from eqvision.data.pairs.stream import pairs_train_stream as pairs_train_stream
from eqvision.data.pairs.texts import TextGallery as TextGallery
from eqvision.data.pairs.texts import all_captions as all_captions
from eqvision.data.pairs.texts import text_gallery as text_gallery
