"""Progress bars of long work."""

from __future__ import annotations

from tqdm import tqdm


class Bars:
    """One progress bar a stage, on standard error."""

    def __init__(self, *, disabled: bool) -> None:
        self._disabled = disabled
        self._stage = ""
        self._bar: tqdm[None] | None = None

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self.__exit__()
            self._stage = stage
            unit = "weights" if stage == "convert" else "B"
            self._bar = tqdm(
                desc=f"{stage:<8}", total=total, unit=unit, unit_scale=True, disable=self._disabled
            )
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
