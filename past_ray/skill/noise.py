"""Random bits that belong to an element, not to a moment.

Element ``i`` of a tensor gets the same 32 bits however the tensor is cut into chunks, whichever
thread asks and in whatever order. The mapping is a format; anyone can compute it::

    key         the 16 bytes of BLAKE2b (digest size 16) over the UTF-8 text "<seed>/<name>",
                read as a little-endian number
    block b     the four 64-bit words of Philox4x64-10 under that key for the counter b + 1
                (NumPy adds 1 to a counter before it uses it)
    element i   block i // 8, word (i % 8) // 2: its low 32 bits for even i, its high 32 for odd i

Reference:
    Philox: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor

ELEMENTS_PER_BLOCK = 8
"""One Philox block is four 64-bit words, and every word serves two elements."""


def uniform_bits(*, seed: int, name: str, start: int, count: int) -> Tensor:
    """Return ``[count]`` int64, uniform in [0, 2**32), of the elements from ``start`` on.

    Args:
        seed: Seed of the whole operation.
        name: Name of the stream. Two uses that must be independent, such as dropping and rounding
            the same tensor, need two names.
        start: Index of the first element in its tensor.
        count: Number of elements.
    """
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
    first_block, skipped = divmod(start, ELEMENTS_PER_BLOCK)
    generator = np.random.Philox(key=int.from_bytes(digest, "little"), counter=first_block)
    words = generator.random_raw((skipped + count + 1) // 2)
    halves = words.astype("<u8", copy=False).view("<u4")[skipped : skipped + count]
    return torch.from_numpy(halves.astype(np.int64))
