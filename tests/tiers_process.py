"""A process that serves jobs over a file tier, a line for each block file write: to be killed meanwhile."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tests.test_tiers import FEW, run, small
from wicore.tiers.block_file import BlockFile


def main(folder: str) -> None:
    write = BlockFile.write

    def told(*args: Any) -> Any:
        print("writing", flush=True)
        return write(*args)

    BlockFile.write = told  # type: ignore[method-assign]
    run(small(Path(folder)), FEW)
    for _ in range(100):  # whoever reads does not wait for more than there were
        print("written", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
