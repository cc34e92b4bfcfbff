"""What stands in a prompt's ids where an image is: ids that name the image's content. Pure.

All that is addressed by tokens (the KV cache, the look-ahead) then tells images apart with nothing more to
know. They are negative, so that no vocabulary has them.
"""

from __future__ import annotations

import hashlib

import numpy as np


def content_ids(digest: bytes, count: int) -> list[int]:
    """`count` ids, from -2**31 to -1, for the tokens of the image whose content `digest` names.

    Equal digests give equal ids, different ones different ids: 31 bits a token, and what is addressed by
    tokens covers whole images (`wicore.hmt.chain`).
    """
    stream = hashlib.shake_256(digest).digest(4 * count)
    ids: list[int] = (np.frombuffer(stream, "<u4") | np.uint32(1 << 31)).view(np.int32).tolist()
    return ids
