"""Many short strings in two arrays: a million file names that cost little to store and to send to a process."""

import os
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8


class PackedStrings(NamedTuple):
    """Strings one behind the other in file system encoding; string i ends before ``ends[i]``."""

    characters: UInt8[np.ndarray, " m"]
    ends: Int[np.ndarray, " n"]

    def text(self, index: int) -> str:
        """String number ``index``."""
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.characters[start : self.ends[index]].tobytes())


def pack_strings(strings: Iterable[str]) -> PackedStrings:
    """The strings, packed; file names that are no valid text survive."""
    encoded = [os.fsencode(string) for string in strings]
    ends = np.cumsum([len(each) for each in encoded], dtype=np.int64)
    return PackedStrings(np.frombuffer(b"".join(encoded), np.uint8), ends)
