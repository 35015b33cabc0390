from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

class Ring:
    def __init__(self, depth: int) -> None: ...
    def run(
        self,
        write: bool,
        requests: Sequence[tuple[int, int, npt.NDArray[np.uint8] | memoryview[Any]]],
    ) -> list[int]: ...
