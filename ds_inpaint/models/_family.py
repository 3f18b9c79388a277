"""What the recipe sections of all model families have in common."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from ds_inpaint.models._folder import FolderLayout, path_problem
from ds_inpaint.models._outline import published, read_configs
from ds_inpaint.outline import Configs


class Family:
    """A base of these sections; it declares no keys."""

    part: ClassVar[str]
    """Name that pipelines have for the denoiser, and its subfolder."""
    layout: ClassVar[FolderLayout]
    """What the family's folders hold."""
    path: str
    revision: str | None
    denoiser: Path | None

    def problem(self) -> str | None:
        """Why ``path`` cannot be a model of this family; None when it can, as far as is known without the network."""
        problem = path_problem(self.path, self.revision, self.layout)
        folder = Path(self.path)
        return problem or (self._unfit(folder) if folder.is_dir() else None)

    def configs(self) -> Configs:
        """The configurations of the model's parts, without the network.

        Raises:
            InputError: it is a hub model that is not at hand.
        """
        return read_configs(self.path, self.revision, self.denoiser, self.part, self.layout)

    def published(self, shape: str) -> Configs:
        """Those of a published model instead.

        Raises:
            InputError: there is none of this family and name.
        """
        return published(shape, self.part)

    def _unfit(self, folder: Path) -> str | None:
        """Why the model in a folder cannot be trained; None when it can."""
        raise NotImplementedError
